# SPDX-License-Identifier: Apache-2.0
"""The answer to "how long will my VM stand still" in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from colocache.fitted_table import Column, print_fitted
from colocache.measure import words
from colocache.measure.report import say
from colocache.measure.standstill import RUN_PAGES, Answer, Pause

NAMES = {"log_sync": "log sync", "transfer": "transfer", "seal": "seal", "flush": "flush", "load": "load"}


def first_line(answer: Answer) -> str:
    """The answer itself."""
    asked = answer.asked
    network = "this machine's own socket" if answer.bits_per_s is None else f"{answer.bits_per_s / 1e9:g} Gbit/s"
    how = "measured" if asked.flush.measured else "estimated"
    return (
        f"{words.ram(answer.asked_bytes)} dirty over {network}: your VM stands still for about "
        f"{words.time(asked.seconds)} (estimated); the flush's part of it, seal and flush, is "
        f"{words.time(asked.flush_part.p50)} ({how})."
    )


def _sizes(pauses: Sequence[Pause], console: Console) -> None:
    columns = [
        Column("dirty"), Column("log\nsync", 2), Column("transfer", 3), Column("seal", 1), Column("flush", 1),
        Column("load", 2), Column("flush's\npart"), Column("p10–p90", 4), Column("whole\npause"),
    ]  # fmt: skip
    body = []
    for pause in pauses:
        times = {
            name: words.NONE if part is None else ("" if part.measured else "~") + words.time(part.seconds)
            for name, part in pause.parts.items()
        }
        part = pause.flush_part
        body.append([
            words.dirty(pause.dirty_bytes), times["log_sync"], times["transfer"], times["seal"], times["flush"],
            times["load"], ("" if pause.flush.measured else "~") + words.time(part.p50),
            words.spread(part) if part.known else "", f"~{words.time(pause.seconds)}",
        ])  # fmt: skip
    print_fitted(console, "By size; ~: estimated", columns, body)


def show(answer: Answer, console: Console) -> None:
    """Everything, for a person."""
    say(console, first_line(answer))
    console.print()
    columns = [
        Column("part", justify="left"), Column("time"), Column("", justify="left"), Column("from", 1, justify="left"),
    ]  # fmt: skip
    body = []
    for name, part in answer.asked.parts.items():
        if part is None:
            body.append([NAMES[name], words.NONE, "not known", ""])
        else:
            kind = "measured" if part.measured else "estimated"
            body.append([NAMES[name], words.time(part.seconds), kind, part.source])
    body.append(["[bold]whole pause[/]", f"[bold]{words.time(answer.asked.seconds)}[/]", "estimated", ""])
    print_fitted(console, f"{words.ram(answer.asked_bytes)} dirty, the parts of the pause", columns, body)
    console.print()
    _sizes(answer.pauses, console)
    console.print()
    say(
        console,
        f"Measured on {answer.backing}, {words.ram(answer.ram_bytes)}, {words.threads(answer.n_threads)}, "
        f"{words.rounds(answer.rounds)}, runs of {RUN_PAGES} pages, caches cold.",
    )
    say(
        console,
        "All of the dirty pages are taken to travel while the machine stands, and both machines' writes to be among "
        "them: pages that are sent before the stop need not be waited for.",
    )
    say(console, str(answer.host))
    widest = max((pause.flush_part.width for pause in answer.pauses if pause.flush_part.known), default=0.0)
    if widest > words.NOISY:
        say(console, f"The rounds varied by up to {widest:.0%}: something else was running here, measure again.")
    for note in answer.notes:
        say(console, f"Note: {note}.")
