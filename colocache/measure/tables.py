# SPDX-License-Identifier: Apache-2.0
"""The rows of a run as tables: what a group of rows has in common stands in its heading, not in columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console

from colocache.fitted_table import Column, print_fitted
from colocache.measure import words
from colocache.measure.baseline import QEMU_VERSION
from colocache.measure.rows import Row

AGAINST = {"flush": "QEMU", "pause": "QEMU", "union": "QEMU", "receive": "numpy", "checkpoint": "socket\n+ QEMU"}
TITLES = {
    "flush": "Flush: dirty pages from the cache over guest RAM",
    "pause": "The flush's part of a pause: seal and flush, against QEMU's union and flush",
    "union": "Union: the two bitmaps united, counted and cleared",
    "receive": "Receive: pages from memory into the cache, against numpy",
    "checkpoint": "Checkpoint: socket to running, against bytes through a socket, or pages in place, and QEMU's flush",
}
BESIDE = (Column("p10–p90", 2), Column("times\nin place\n+ QEMU"), Column("p10–p90", 2))
CHECKPOINT_NOTE = (
    "Checkpoint: “socket” sends as many bytes from one buffer into another, which stay in the CPU's caches, and stores "
    "nothing: no checkpoint could do that. “in place” sends the dirty pages from where they lie to where they belong, "
    "both known before: the least that a checkpoint must do. Both then flush as QEMU does."
)
QEMU_NOTE = f"QEMU: the algorithm of QEMU {QEMU_VERSION}, which has one thread; “one thread”: ours on one thread too."


def _group(row: Row) -> tuple[Any, ...]:
    return (row.backing, row.ram_bytes, row.pattern in ("scattered", "nothing dirty"), row.threads, row.rounds)


def _order(row: Row) -> tuple[Any, ...]:
    return (
        *_group(row),
        row.warm,
        row.pattern != "synthetic",
        float(f"{row.dirty_ratio:.1g}"),
        row.run_pages,
    )


def _same_cell(row: Row) -> tuple[Any, ...]:
    return (row.case, row.backing, row.ram_bytes, row.pattern, row.warm, f"{row.dirty_ratio:.2g}", round(row.run_pages))


def one_to_one(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """Our one thread against QEMU's, per cell."""
    return {
        _same_cell(row): row.baseline_ratio
        for row in rows
        if row.threads == 1 and row.baseline == "qemu" and row.baseline_ratio is not None
    }


def _remark(row: Row) -> str:
    if row.error:
        return "[red]WRONG RESULT[/]" if row.wrong else "[red]error[/]"
    return "[yellow]slower[/]" if row.slower else ""


def _beside(row: Row) -> tuple[str, str, str]:
    """How far the ratio to the socket spreads; the ratio to pages in place, and how far that does."""
    socket, in_place = row.ratios.get("socket"), row.ratios.get("in_place")
    spreads = [words.spread_of_ratio(spread) if spread else "" for spread in (socket, in_place)]
    return spreads[0], words.ratio(in_place.p50) if in_place else "", spreads[1]


def _heading(row: Row) -> str:
    backing = "bitmaps alone" if row.backing == "none" else row.backing
    return f"{backing}, {words.ram(row.ram_bytes)}, {words.threads(row.threads)}, {words.rounds(row.rounds)}"


def tables(rows: Sequence[Row], case: str) -> Iterator[tuple[str, list[Column], list[list[str]]]]:
    """(heading, columns, rows) of each group of one case."""
    columns = [
        Column("dirty"), Column("pattern", justify="left"), Column("time\np50"), Column("p10–p90", 4), Column("GB/s"),
        Column("of\npeak", 2), Column(f"times\n{AGAINST[case]}", 1),
        *(BESIDE if case == "checkpoint" else ()),
        Column("one\nthread", 3), Column("", justify="left"),
    ]  # fmt: skip
    single = one_to_one(rows)
    chosen = sorted((row for row in rows if row.case == case), key=_order)
    for _, group in groupby(chosen, key=_group):
        members = list(group)
        body = []
        for row in members:
            alone = single.get(_same_cell(row)) if row.threads > 1 else None
            body.append([
                words.share(row.dirty_ratio), words.pattern(row) + (" (warm)" if row.warm else ""),
                words.time(row.seconds.p50), words.spread(row.seconds) if row.seconds.known else "",
                words.ratio(row.gb_per_s) if row.n_bytes else "", "" if row.of_peak is None else f"{row.of_peak:.0%}",
                "" if row.baseline_ratio is None else words.ratio(row.baseline_ratio),
                *(_beside(row) if case == "checkpoint" else ()),
                "" if alone is None else words.ratio(alone), _remark(row),
            ])  # fmt: skip
        yield _heading(members[0]), columns, body


def show(rows: Sequence[Row], case: str, console: Console) -> None:
    """All rows of one case."""
    first = True
    for heading, columns, body in tables(rows, case):
        console.print()
        if first:
            console.print(f"[bold]{TITLES[case]}[/]", highlight=False)
            first = False
        print_fitted(console, heading, columns, body)
