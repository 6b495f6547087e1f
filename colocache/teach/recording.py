# SPDX-License-Identifier: Apache-2.0
"""A recorded lesson, and the format of `colocache teach --export run.json`.

The file is one JSON object:

    format      "colocache-lesson"
    version     1
    engine      {version, copy, backing}: the engine that ran, and what its memory was made of
    guest       {n_pages, page_bytes, columns}: the guest; `columns` is only how it is drawn
    chapters    a list, in the order of the lesson; each
      id          short name, unique in the file
      kind        "lesson", "death" or "counter" (run wrongly on purpose)
      title, question, answer      text
      memory      "mirror" (two whole images) or "bounded" (guest RAM, and the pages of the open epoch); if it is not
                  there, "mirror"
      epochs      {"1": image, ...}: PVM memory as it stood when the PVM paused for that checkpoint
      steps       a list; each
        title, text         text; `text` is two sentences
        actor               "pvm", "svm", "wire" or "nobody": who acts in this step
        call                the call of the Python API that did it, or the command that a QEMU is given, or ""
        message             the message on the wire that goes with it, or ""
        images              {pvm, cache, svm}: PVM memory, cache, SVM memory; each an image. With bounded memory svm is
                            what the SVM sees through its private mapping; of a dead process, what the next would see
        ram                 with bounded memory guest RAM, an image; else [], as the SVM runs on guest RAM itself
        bitmaps             {pvm, svm, flush, unacked, pending}: each a bitmap; unacked and pending are the PVM's
        origin              one character per page of the flush set: P, S or B (both) for who wrote it, "." if not in it
        flush_state         "none", "due" (sealed, to be copied), "done" (committed) or "own": then `flush` is
                            not the engine's, but a list that a wrong secondary keeps
        focus               a bitmap: pages that the text speaks of
        status              {phase, sealed, committed, receiving}: of the control region (colocache.h)
        alive               {pvm, svm}: true or false
        verdict             {kind, epoch, sentence}: what SVM memory is (colocache.teach.judge)
        target              the epoch that SVM memory should be in this step, 0 if none is claimed
        wrong               a bitmap: pages of SVM memory that are not those of `target`; all 0 if target is 0
        if_now              {pvm, svm}: what would happen if that side died at this moment, or ""

    image       a list of n_pages stamps: "P2" (written by the PVM on the way to epoch 2), "S2" (by the SVM),
                "-" (never written) or "?" (torn)
    bitmap      a string of n_pages characters, "1" or "0"; page 0 comes first

A reader must take no notice of fields that it does not know; a change that breaks readers raises `version`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from colocache.errors import ColocacheError
from colocache.teach import judge, tags
from colocache.teach.shape import PAGES_MAX, PAGES_MIN

FORMAT, VERSION = "colocache-lesson", 1
IMAGES = ("pvm", "cache", "svm")
BITMAPS = ("pvm", "svm", "flush", "unacked", "pending")
ACTORS = ("pvm", "svm", "wire", "nobody")
CHAPTER_KINDS = ("lesson", "death", "counter")
MEMORIES = ("mirror", "bounded")
FLUSH_STATES = ("none", "due", "done", "own")
PHASES = ("empty", "live", "sealing", "load_failed", "failed_over")


class LessonFormatError(ColocacheError):
    """A file that is no recorded lesson."""


@dataclass(frozen=True)
class Step:
    """One look at everything; the fields are those of the module's text."""

    title: str
    text: str
    actor: str
    call: str
    message: str
    images: dict[str, tuple[str, ...]]
    ram: tuple[str, ...]
    bitmaps: dict[str, str]
    origin: str
    flush_state: str
    focus: str
    status: dict[str, Any]
    alive: dict[str, bool]
    verdict: dict[str, Any]
    target: int
    wrong: str
    if_now: dict[str, str]


@dataclass(frozen=True)
class Chapter:
    """A chapter that was run."""

    id: str
    kind: str
    title: str
    question: str
    answer: str
    memory: str
    epochs: dict[int, tuple[str, ...]]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Lesson:
    """All chapters that were run."""

    n_pages: int
    columns: int
    engine: dict[str, str]
    chapters: tuple[Chapter, ...]

    def chapter(self, name: str) -> Chapter:
        """The chapter of this id. KeyError."""
        return {chapter.id: chapter for chapter in self.chapters}[name]

    def to_json(self) -> str:
        """The file's text."""
        guest = {"n_pages": self.n_pages, "page_bytes": tags.PAGE_BYTES, "columns": self.columns}
        chapters = [asdict(chapter) for chapter in self.chapters]
        whole = {"format": FORMAT, "version": VERSION, "engine": self.engine, "guest": guest, "chapters": chapters}
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def read_lesson(text: str) -> Lesson:
    """A lesson from a file's text, every field checked. LessonFormatError says which one is wrong."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise LessonFormatError(f"this is no JSON: {error}") from error
    _need(isinstance(whole, dict) and whole.get("format") == FORMAT, f"`format` is not {FORMAT}")
    _need(whole.get("version") == VERSION, f"`version` is {whole.get('version')}, this reads {VERSION}")
    try:
        guest = whole["guest"]
        n_pages, columns = guest["n_pages"], guest["columns"]
        _need(type(n_pages) is int and PAGES_MIN <= n_pages <= PAGES_MAX, f"guest.n_pages is {n_pages}")
        _need(type(columns) is int and 0 < columns <= n_pages, f"guest.columns is {columns}")
        _need(guest["page_bytes"] == tags.PAGE_BYTES, f"guest.page_bytes is {guest['page_bytes']}")
        chapters = tuple(_chapter(one, n_pages) for one in whole["chapters"])
        ids = [chapter.id for chapter in chapters]
        _need(len(set(ids)) == len(ids), f"chapter ids are not unique: {ids}")
        return Lesson(n_pages, columns, {str(k): str(v) for k, v in whole["engine"].items()}, chapters)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise LessonFormatError(f"a field is missing or has the wrong type: {error!r}") from error


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise LessonFormatError(sentence)


def _chapter(found: dict[str, Any], n_pages: int) -> Chapter:
    where = f"chapter {found['id']}"
    _need(found["kind"] in CHAPTER_KINDS, f"{where}: kind is {found['kind']}")
    memory = found.get("memory", "mirror")
    _need(memory in MEMORIES, f"{where}: memory is {memory}")
    epochs = {int(key): _image(image, n_pages, f"{where}, epoch {key}") for key, image in found["epochs"].items()}
    steps = tuple(_step(one, n_pages, f"{where}, step {n}") for n, one in enumerate(found["steps"], 1))
    _need(bool(steps), f"{where} has no step")
    text = {name: str(found[name]) for name in ("id", "kind", "title", "question", "answer")}
    made = Chapter(**text, memory=memory, epochs=epochs, steps=steps)
    for n, step in enumerate(steps, 1):
        _need(bool(step.ram) == (memory == "bounded"), f"{where}, step {n}: guest RAM does not go with {memory} memory")
        truth = judge.judge(step.images["svm"], epochs)
        said = (step.verdict["kind"], step.verdict["epoch"])
        _need(said == (truth.kind, truth.epoch), f"{where}, step {n}: verdict is {said}, the image says {truth}")
        due = judge.wrong_pages(step.images["svm"], epochs[step.target]) if step.target else "0" * n_pages
        _need(step.wrong == due, f"{where}, step {n}: `wrong` is not what image and target say")
    return made


def _step(found: dict[str, Any], n_pages: int, where: str) -> Step:
    _need(found["actor"] in ACTORS, f"{where}: actor is {found['actor']}")
    _need(set(found["images"]) == set(IMAGES), f"{where}: images are {sorted(found['images'])}")
    _need(set(found["bitmaps"]) == set(BITMAPS), f"{where}: bitmaps are {sorted(found['bitmaps'])}")
    _need(found["flush_state"] in FLUSH_STATES, f"{where}: flush_state is {found['flush_state']}")
    _need(found["status"]["phase"] in PHASES, f"{where}: phase is {found['status']['phase']}")
    for name in ("sealed", "committed", "receiving"):
        _need(type(found["status"][name]) is int, f"{where}: status.{name} is no number")
    _need(type(found["target"]) is int, f"{where}: target is no number")
    for name in ("pvm", "svm"):
        _need(type(found["alive"][name]) is bool, f"{where}: alive.{name} is not true or false")
    return Step(
        title=str(found["title"]),
        text=str(found["text"]),
        actor=found["actor"],
        call=str(found["call"]),
        message=str(found["message"]),
        images={name: _image(found["images"][name], n_pages, f"{where}, image {name}") for name in IMAGES},
        ram=_image(found["ram"], n_pages, f"{where}, guest RAM") if found.get("ram") else (),
        bitmaps={name: _string(found["bitmaps"][name], "01", n_pages, f"{where}, bitmap {name}") for name in BITMAPS},
        origin=_string(found["origin"], ".PSB", n_pages, f"{where}, origin"),
        flush_state=found["flush_state"],
        focus=_string(found["focus"], "01", n_pages, f"{where}, focus"),
        status=dict(found["status"]),
        alive=dict(found["alive"]),
        verdict=dict(found["verdict"]),
        target=found["target"],
        wrong=_string(found["wrong"], "01", n_pages, f"{where}, wrong"),
        if_now={name: str(found["if_now"][name]) for name in ("pvm", "svm")},
    )


def _image(found: Any, n_pages: int, where: str) -> tuple[str, ...]:
    good = isinstance(found, list) and len(found) == n_pages and all(tags.is_stamp(page) for page in found)
    _need(good, f"{where} is no list of {n_pages} stamps")
    return tuple(found)


def _string(found: Any, letters: str, n_pages: int, where: str) -> str:
    good = isinstance(found, str) and len(found) == n_pages and set(found) <= set(letters)
    _need(good, f"{where} is not {n_pages} characters of {letters!r}")
    return str(found)
