# SPDX-License-Identifier: Apache-2.0
"""The exercise: two bitmaps are shown, the flush set is asked for, and why. The engine itself knows the answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from colocache import bitmap
from colocache.teach.draw import EMPTY, PVM, SVM
from colocache.teach.pair import pair_in_step
from colocache.teach.shape import PAGES_MIN, Shape

ROW = 16
SHOWN = 32  # pages that the exercise uses; the guest has more
ASK = "Flush set, as pages and ranges (like 0-3 7 12), or none"


@dataclass(frozen=True)
class Why:
    """A question with its choices, of which the first is right; they are shown in random order."""

    question: str
    choices: tuple[str, ...]
    because: str


WHYS = (
    Why(
        "Page {svm_only} was written by the SVM alone, so nothing was sent for it. Why is it flushed?",
        (
            "Guest RAM there holds what the PVM never had; the right bytes are in the cache, from an older epoch.",
            "It need not be: what was not sent has not changed.",
            "So that the cache gets the SVM's bytes too.",
        ),
        "Memory may differ wherever either machine wrote. The cache is a full copy, so it has the PVM's bytes of "
        "every page.",
    ),
    Why(
        "Page {pvm_only} was written by the PVM alone. Its bytes are in the cache already. Why is it flushed?",
        (
            "The SVM runs on guest RAM, not on the cache; guest RAM there still holds the epoch before.",
            "It need not be: it has arrived.",
            "To clear its bit in the PVM bitmap.",
        ),
        "Arriving pages never touch guest RAM, because half a checkpoint would be worthless. Only the flush "
        "moves them there.",
    ),
    Why(
        "Half of these pages are copied when the secondary's process is killed. What happens?",
        (
            "The next process copies all of the flush set again, and has exactly the sealed epoch.",
            "The secondary goes back to the epoch before.",
            "All of RAM must be sent again.",
        ),
        "From the seal on there is only forward: cache and flush set stay whole until the epoch is committed, "
        "and copying twice does no harm.",
    ),
    Why(
        "When may the PVM be told RECEIVED and let its output out?",
        (
            "After the seal, because from then on the epoch can no longer be lost.",
            "As soon as the last page has arrived.",
            "Only after the flush, when guest RAM is the epoch.",
        ),
        "The seal is the commit point: before it the epoch may still be dropped, after it whoever attaches "
        "finishes it.",
    ),
)


@dataclass(frozen=True)
class Exercise:
    """Two bitmaps, and the flush set that the engine made of them."""

    pvm: frozenset[int]
    svm: frozenset[int]
    flush: frozenset[int]


def make_exercise(rng: random.Random) -> Exercise:
    """Let both machines of a real pair write at random, seal, and read what the engine will flush."""
    pages = range(SHOWN)
    pvm = set(rng.sample(pages, rng.randint(4, 9)))
    svm = set(rng.sample(pages, rng.randint(4, 9)))
    shared = rng.sample(pages, 2)  # at least one page of each kind: both, PVM only, SVM only
    pvm, svm = pvm | {shared[0]}, svm | {shared[0]}
    for one, other in ((pvm, svm), (svm, pvm)):
        if one <= other:
            one.add(next(pfn for pfn in rng.sample(pages, SHOWN) if pfn not in one | other))
    with pair_in_step(Shape.of(PAGES_MIN)) as pair:
        pair.pvm_writes(sorted(pvm))
        pair.svm_writes(sorted(svm))
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("sync")
        pair.on_svm("device_state", 2)
        shown = pair.svm_bits()
        pair.seal(2)
        flush = pair.svm_bits()["flush"]
    return Exercise(_set(shown["pvm"]), _set(shown["svm"]), _set(flush))


def _set(bits: str) -> frozenset[int]:
    return frozenset(pfn for pfn, bit in enumerate(bits) if bit == "1")


def parse_pages(text: str) -> frozenset[int] | None:
    """Pages of an answer such as `0-3, 7 12`; None if it can't be read."""
    found: set[int] = set()
    if text.strip().lower() in ("none", "-"):
        return frozenset()
    for part in text.replace(",", " ").split():
        first, dash, last = part.partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            return None
        start, end = int(first), int(last) if dash else int(first)
        if not start <= end < SHOWN:
            return None
        found.update(range(start, end + 1))
    return frozenset(found) if found else None


def pages_text(pages: frozenset[int]) -> str:
    """Pages as ranges: `0-3 7 12`."""
    if not pages:
        return "none"
    runs = bitmap.runs(bitmap.from_pfns(pages, SHOWN))
    return " ".join(f"{first}-{first + n - 1}" if n > 1 else str(first) for first, n in runs)


def grid(pages: frozenset[int], letter: str, style: str) -> Text:
    """Rows of pages with the number of each row's first page."""
    text = Text()
    for pfn in range(SHOWN):
        if pfn % ROW == 0:
            text.append(f"\n  {pfn:>3}  " if pfn else f"  {pfn:>3}  ", "bright_black")
        text.append(f"{letter} " if pfn in pages else "· ", style if pfn in pages else EMPTY)
    return text


def run(console: Console, ask: Callable[[str], str | None], *, rounds: int, seed: int | None) -> tuple[int, int]:
    """Ask `rounds` times; (right answers, questions). `ask` shows a prompt and gives a line, or None at the end."""
    rng = random.Random(seed)  # noqa: S311 exercises, not secrets
    right = asked = 0
    whys = rng.sample(WHYS, len(WHYS))
    for number in range(rounds):
        exercise = make_exercise(rng)
        console.print(
            f"\n[bold]Exercise {number + 1} of {rounds}.[/] An epoch has arrived, and the SVM's log is taken."
        )
        console.print("PVM bitmap")
        console.print(grid(exercise.pvm, "P", PVM))
        console.print("SVM bitmap")
        console.print(grid(exercise.svm, "S", SVM))
        line = ask(ASK)
        if line is None:
            break
        asked += 1
        right += _check_pages(console, exercise, line)
        answer = _ask_why(console, ask, whys[number % len(whys)], exercise, rng)
        if answer is None:
            break
        asked += 1
        right += answer
    return right, asked


def _check_pages(console: Console, exercise: Exercise, line: str) -> bool:
    answer = parse_pages(line)
    if answer is None:
        console.print(f"[red]✗[/] That can't be read as pages from 0 to {SHOWN - 1}.")
    elif answer == exercise.flush:
        console.print(f"[green]✓[/] Right: the engine flushes the same {len(answer)} pages, the union of both bitmaps.")
        return True
    else:
        missing, extra = exercise.flush - answer, answer - exercise.flush
        if missing:
            console.print(f"[red]✗[/] Missing: {pages_text(missing)}. There guest RAM would not be what the PVM had.")
        if extra:
            console.print(f"[red]✗[/] Too many: {pages_text(extra)}. No harm, a needless copy: nobody wrote there.")
    console.print(f"  The engine's flush set: {pages_text(exercise.flush)}")
    return False


def _ask_why(
    console: Console, ask: Callable[[str], str | None], why: Why, exercise: Exercise, rng: random.Random
) -> bool | None:
    names = {"svm_only": min(exercise.svm - exercise.pvm), "pvm_only": min(exercise.pvm - exercise.svm)}
    console.print(Text(why.question.format(**names)))
    order = rng.sample(range(len(why.choices)), len(why.choices))
    for letter, index in zip("abc", order, strict=True):
        console.print(Text(f"  {letter}) {why.choices[index]}"))
    line = ask("Which, a, b or c")
    if line is None:
        return None
    chosen = "abc".find(line.strip().lower()) if len(line.strip()) == 1 else -1
    good = chosen >= 0 and order[chosen] == 0
    console.print(f"[green]✓[/] {why.because}" if good else f"[red]✗[/] It is {'abc'[order.index(0)]}. {why.because}")
    return good
