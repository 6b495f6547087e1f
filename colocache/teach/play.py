# SPDX-License-Identifier: Apache-2.0
"""Running chapters and writing down what the engine holds at each step.

A chapter is a function with a @chapter line above it:

    @chapter("union", "The union", question="...", answer="...")
    def union(play: Play) -> None:
        with play.pair_in_step() as pair:
            pair.pvm_writes(play.shape.pvm)
            play.step(pair, "A title", "Two sentences.", actor="pvm")

It drives the real engine through `pair`; `play.step` reads everything there is to see. List the function in
colocache/teach/chapters/__init__.py, and it is part of the lesson, the web page, the export and the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from colocache.teach import judge
from colocache.teach.pair import Pair, new_pair, pair_in_step
from colocache.teach.recording import Chapter, Lesson, Step
from colocache.teach.shape import Shape


class Play:
    """One run of one chapter."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.steps: list[Step] = []
        self.epochs: dict[int, tuple[str, ...]] = {}

    def new_pair(self, *, killable: bool = False) -> AbstractContextManager[Pair]:
        """Two machines before the initial copy."""
        return new_pair(self.shape, killable=killable)

    def pair_in_step(
        self, *, killable: bool = False, bounded: bool = False, outside: bool = False
    ) -> AbstractContextManager[Pair]:
        """Two machines whose epoch 1 is committed; see Pair."""
        return pair_in_step(self.shape, killable=killable, bounded=bounded, outside=outside)

    def step(
        self,
        pair: Pair,
        title: str,
        text: str,
        *,
        actor: str = "nobody",
        call: str = "",
        message: str = "",
        target: int = 0,
        focus: Iterable[int] = (),
    ) -> None:
        """Read everything and write it down.

        `target`: the epoch that SVM memory should be here; `focus`: pages that the text speaks of.
        """
        n_pages = self.shape.n_pages
        self.epochs.update(pair.epochs)
        images = pair.images()
        ram = images.pop("ram", ())
        own = pair.pvm.bits() if pair.pvm.alive else {"unacked": "0" * n_pages, "pending": "0" * n_pages}
        bits = {**pair.svm_bits(), **own}
        if pair.svm_list is not None:
            bits["flush"] = pair.svm_list
        verdict = judge.judge(images["svm"], pair.epochs)
        wrong = judge.wrong_pages(images["svm"], pair.epochs[target]) if target else "0" * n_pages
        status = pair.status()
        state = judge.flush_state(status, own_list=pair.svm_list is not None)
        alive = {"pvm": pair.pvm.alive, "svm": pair.svm_alive}
        runs = pair.svm_alive and status["phase"] != "empty"
        said = judge.sentence(verdict, svm_runs=runs, n_wrong=wrong.count("1"), target=target)
        looked_at = set(focus)
        self.steps.append(
            Step(
                title=title,
                text=text,
                actor=actor,
                call=call,
                message=message,
                images=images,
                ram=ram,
                bitmaps=bits,
                origin="".join(o if b == "1" else "." for o, b in zip(pair.origin, bits["flush"], strict=True)),
                flush_state=state,
                focus="".join("1" if pfn in looked_at else "0" for pfn in range(n_pages)),
                status=status,
                alive=alive,
                verdict={"kind": verdict.kind, "epoch": verdict.epoch, "sentence": said},
                target=target,
                wrong=wrong,
                if_now=judge.if_now(status, alive, verdict, bounded=pair.bounded),
            )
        )


@dataclass(frozen=True)
class Script:
    """A chapter that can be run."""

    id: str
    kind: str
    title: str
    question: str
    answer: str
    run: Callable[[Play], None]

    def record(self, shape: Shape) -> Chapter:
        """Run it on the real engine."""
        play = Play(shape)
        self.run(play)
        memory = "bounded" if any(step.ram for step in play.steps) else "mirror"
        steps, epochs = tuple(play.steps), dict(play.epochs)
        return Chapter(self.id, self.kind, self.title, self.question, self.answer, memory, epochs, steps)


def chapter(
    name: str, title: str, *, question: str, answer: str, kind: str = "lesson"
) -> Callable[[Callable[[Play], None]], Script]:
    """Make a chapter of a function; see the head of this file."""

    def wrap(run: Callable[[Play], None]) -> Script:
        return Script(name, kind, title, question, answer, run)

    return wrap


def record(scripts: Iterable[Script], n_pages: int = 64) -> Lesson:
    """Run these chapters, each with machines of its own."""
    from colocache import __version__

    shape = Shape.of(n_pages)
    chapters = tuple(script.record(shape) for script in scripts)
    engine = {"version": __version__, "backing": "shm", "copy": _copy_name(shape)}
    return Lesson(n_pages, shape.columns, engine, chapters)


def _copy_name(shape: Shape) -> str:
    """How this machine copies pages: a cache knows."""
    with new_pair(shape) as pair:
        return pair.svm.cache.status().copy if pair.svm else ""
