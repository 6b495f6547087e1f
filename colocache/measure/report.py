# SPDX-License-Identifier: Apache-2.0
"""A run as a person reads it: the answer first, then the tables, then what to think of them."""

from __future__ import annotations

import math

from rich.console import Console

from colocache.measure import tables, words
from colocache.measure.cells import CASES
from colocache.measure.clock import MIN_ROUNDS
from colocache.measure.rows import Row
from colocache.measure.session import PAUSE_BYTES, Result

ASK = "How long a whole pause is: colocache bench --dirty 4G --network 10G."


def say(console: Console, sentence: str) -> None:
    """A sentence: broken between words on a terminal, on one line in a pipe."""
    console.print(sentence, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def answer(result: Result) -> list[str]:
    """The flush's part of a pause for about 100 MB, or what comes next to it, per backing, by all threads."""
    most = max((row.threads for row in result.rows), default=1)
    rows = [
        row for row in result.rows if row.case == "pause" and row.threads == most and not row.warm and not row.error
    ]
    lines = []
    for backing in dict.fromkeys(row.backing for row in rows):
        row = min(
            (row for row in rows if row.backing == backing), key=lambda row: abs(math.log(row.n_bytes / PAUSE_BYTES))
        )
        times = "" if row.baseline_ratio is None else f", {row.baseline_ratio:.2f} times as fast as QEMU's way"
        lines.append(
            f"{words.dirty(row.n_bytes)} dirty, {words.runs(row.run_pages)}, {backing}, {words.threads(most)}: the "
            f"flush's part of the pause is {words.time(row.seconds.p50)} ({row.gb_per_s:.1f} GB/s{times})."
        )
    return [*lines, ASK]


def verdicts(result: Result) -> list[str]:
    """What the rows say together, a sentence each: peaks, large guests, what is slower, wrong or not to be believed."""
    lines = []
    for (backing, threads), spread in result.peak_spreads().items():
        lines.append(f"Peak copy bandwidth on {backing}, {words.threads(threads)}: {spread.p50:.2f} GB/s.")
    lines += [_large(row) for row in result.rows if row.pattern in ("scattered", "nothing dirty")]
    slower = [row for row in result.rows if row.slower]
    if slower:
        lines.append(
            f"Slower than QEMU's way beyond the spread of the rounds: {'; '.join(str(row) for row in slower)}."
        )
    if result.rows and result.rounds < MIN_ROUNDS:
        lines.append(
            f"{words.rounds(result.rounds).capitalize()}: no spread and no verdict from fewer than {MIN_ROUNDS}."
        )
    wrong = [row for row in result.rows if row.wrong]
    lines += [f"WRONG RESULT in {row}: {row.error}." for row in wrong]
    errors = [row for row in result.rows if row.error and not row.wrong]
    if errors:
        cells = "; ".join(f"{row} ({row.of_peak or 0.0:.2f})" for row in errors)
        lines.append(
            f"Not to be believed, {len(errors)} of {len(result.rows)} cells, a measuring error each, as nothing copies "
            f"faster than the peak, here 1: {cells}."
        )
    lines += [f"Note: {note}." for note in result.notes]
    lines.append(words.noise(result.noise))
    return lines


def _large(row: Row) -> str:
    heat = "warm" if row.warm else "cold"
    if row.case == "checkpoint":
        return f"An idle checkpoint of a {words.ram(row.ram_bytes)} guest, {heat}: {words.time(row.seconds.p50)}."
    text = f"{row.n_pages:,} dirty pages of a {words.ram(row.ram_bytes)} guest, {heat}: united, counted and cleared in "
    text += (
        f"{words.time(row.seconds.p50)} ({words.ratio(row.baseline_ratio)} times as fast as QEMU's way), runs found in "
    )
    text += words.time(row.more["scan_ns"] / 1e9)
    if "ns_per_run" in row.more:
        text += f" ({row.more['ns_per_run']:.2f} ns a run)"
    return text + "."


def show(result: Result, console: Console) -> None:
    """Everything, for a person."""
    for line in answer(result):
        say(console, line)
    console.print()
    say(console, str(result.host))
    for case in reversed(CASES):
        tables.show(result.rows, case, console)
    console.print()
    for line in (words.GB_PER_S, tables.QEMU_NOTE, tables.CHECKPOINT_NOTE, *verdicts(result)):
        say(console, line)
