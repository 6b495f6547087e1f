# SPDX-License-Identifier: Apache-2.0
"""Two reports side by side: like with like, or with a loud note of what is not alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console

from colocache.fitted_table import Column, print_fitted
from colocache.measure import words
from colocache.measure.cells import CASES
from colocache.measure.clock import MIN_ROUNDS, Spread
from colocache.measure.report import say

Raw = dict[str, Any]  # a row of a report


def _cell(row: Raw) -> tuple[Any, ...]:
    """What two rows must share to be set side by side; shares to two digits, as a page more or less is no matter."""
    return (
        CASES.index(row["case"]) if row["case"] in CASES else len(CASES), row["case"], row["backing"],
        str(row.get("pattern", "synthetic")), float(f"{row['dirty_ratio']:.2g}"), round(row["run_pages"]),
        bool(row.get("warm", False)),
    )  # fmt: skip


def _conditions(row: Raw) -> tuple[int, int]:
    """What they must share to be alike: guest RAM and threads."""
    return int(row["ram_bytes"]), int(row["threads"])


def _seconds(row: Raw) -> Spread:
    times = row["seconds"]
    known = times.get("p10") is not None and times.get("p90") is not None and _rounds(row) >= MIN_ROUNDS
    nan = float("nan")
    return Spread(times["p10"], times["p50"], times["p90"]) if known else Spread(nan, times["p50"], nan)


def _rounds(row: Raw) -> int:
    return int(row.get("rounds") or MIN_ROUNDS)  # a report of an older version may not say


@dataclass(frozen=True)
class Pair:
    """One cell in both reports."""

    a: Raw
    b: Raw

    @property
    def alike(self) -> bool:
        return _conditions(self.a) == _conditions(self.b)

    @property
    def b_faster(self) -> float:
        """B's speed over A's; of GB/s where there are any, else of the time."""
        if self.a["gb_per_s"] > 0 and self.b["gb_per_s"] > 0:
            return float(self.b["gb_per_s"] / self.a["gb_per_s"])
        return float(self.a["seconds"]["p50"] / self.b["seconds"]["p50"])

    @property
    def verdict(self) -> str:
        """B against A in words; why nothing can be said, where nothing can."""
        bad = [name for name, row in (("A", self.a), ("B", self.b)) if row.get("error")]
        if bad:
            return f"error in {' and '.join(bad)}"
        one, two = _seconds(self.a), _seconds(self.b)
        if not (one.known and two.known):
            return f"fewer than {MIN_ROUNDS} rounds"
        if one.p10 <= two.p90 and two.p10 <= one.p90:
            return "within the spread"
        has_speed = self.a["gb_per_s"] > 0 and self.b["gb_per_s"] > 0
        change = self.b_faster - 1 if has_speed else 1 / self.b_faster - 1
        return f"{abs(change):.0%} {'more' if change > 0 else 'less'} {'GB/s' if has_speed else 'time'}".replace(
            "%", " %"
        )

    def to_json(self) -> dict[str, Any]:
        """For --json: b_faster is B's GB/s over A's; alike false means RAM or threads differ."""
        found = {name: self.a[name] for name in ("case", "backing", "dirty_ratio", "run_pages")}
        found["pattern"] = self.a.get("pattern", "synthetic")
        for name, row in (("a", self.a), ("b", self.b)):
            found[f"{name}_seconds"] = row["seconds"]["p50"]
            found[f"{name}_threads"], found[f"{name}_ram_bytes"] = row["threads"], row["ram_bytes"]
            found[f"{name}_error"] = row.get("error")
        return {**found, "alike": self.alike, "b_faster": self.b_faster, "verdict": self.verdict}


def _by_cell(rows: Sequence[Raw]) -> dict[tuple[Any, ...], list[Raw]]:
    found: dict[tuple[Any, ...], list[Raw]] = defaultdict(list)
    for row in rows:
        if row["seconds"]["p50"] > 0:
            found[_cell(row)].append(row)
    return found


def pairs(a: Raw, b: Raw) -> tuple[list[Pair], int]:
    """The cells that both reports have, and how many are in one only.

    Of each cell the rows of the same RAM and threads, the most of both; and where one machine has more threads, also
    each with all of its own: whole machine against whole machine.
    """
    rows_a, rows_b = _by_cell(a["rows"]), _by_cell(b["rows"])
    found: list[Pair] = []
    for key in sorted(rows_a.keys() & rows_b.keys()):
        ones = {_conditions(row): row for row in rows_a[key]}
        twos = {_conditions(row): row for row in rows_b[key]}
        shared = ones.keys() & twos.keys()
        if shared:
            found.append(Pair(ones[max(shared)], twos[max(shared)]))
        most = Pair(*(max(side.values(), key=lambda row: (row["threads"], row["ram_bytes"])) for side in (ones, twos)))
        if not most.alike:
            found.append(most)
    return found, len(rows_a.keys() ^ rows_b.keys())


def _heading(pair: Pair) -> str:
    ram, threads = ([row[name] for row in (pair.a, pair.b)] for name in ("ram_bytes", "threads"))
    if pair.alike:
        return f"{pair.a['backing']}, {words.ram(ram[0])}, {words.threads(threads[0])}"
    sides = [f"{words.ram(size)} on {words.threads(count)}" for size, count in zip(ram, threads, strict=True)]
    return f"[bold red]NOT ALIKE[/] {pair.a['backing']}, A {sides[0]}, B {sides[1]}"


def _order(pair: Pair) -> tuple[Any, ...]:
    return (not pair.alike, pair.a["backing"], *_conditions(pair.a), *_conditions(pair.b), *_cell(pair.a))


def _pattern(row: Raw) -> str:
    name = str(row.get("pattern", "synthetic"))
    if name != "synthetic":
        return name
    return "one run" if row["dirty_ratio"] >= 1 else words.runs(row["run_pages"])


def _cells(found: Sequence[Pair], console: Console) -> None:
    columns = [
        Column("case", justify="left"), Column("dirty"), Column("pattern", justify="left"), Column("A"),
        Column("p10–p90", 2), Column("B"), Column("p10–p90", 2), Column("B against A", justify="left"),
    ]  # fmt: skip
    # A group is what one heading is true of.
    for _, group in groupby(sorted(found, key=_order), key=_heading):
        members = list(group)
        body = []
        for pair in members:
            one, two = _seconds(pair.a), _seconds(pair.b)
            mark = "red" if pair.a.get("error") or pair.b.get("error") else "default"
            body.append([
                str(pair.a["case"]), words.share(pair.a["dirty_ratio"]), _pattern(pair.a), words.time(one.p50),
                words.spread(one), words.time(two.p50), words.spread(two), f"[{mark}]{pair.verdict}[/]",
            ])  # fmt: skip
        console.print()
        print_fitted(console, _heading(members[0]), columns, body)


def _peaks(a: Raw, b: Raw, console: Console) -> None:
    columns = [Column("backing", justify="left"), Column("threads"), Column("A"), Column("B"), Column("B / A")]
    keys = sorted({(k, int(t)) for report in (a, b) for k, by in report["peak_gb_per_s"].items() for t in by})
    body = []
    for backing, threads in keys:
        one, two = (report["peak_gb_per_s"].get(backing, {}).get(str(threads)) for report in (a, b))
        over = two / one if one and two else None
        body.append([backing, str(threads), words.ratio(one), words.ratio(two), words.ratio(over)])
    console.print()
    print_fitted(console, "peak copy bandwidth, GB/s", columns, body)


def _machines(a: Raw, b: Raw) -> Iterator[str]:
    for name, report in (("A", a), ("B", b)):
        host = report["host"]
        rounds = report.get("rounds")
        counted = f", {words.rounds(rounds)}" if isinstance(rounds, int) else ""
        noise = report.get("noise")
        cpu, cores, kernel = (host.get(field, "?") for field in ("cpu", "cores", "kernel"))
        yield (
            f"{name}: {cpu}, {cores} cores, Linux {kernel}{counted}. "
            + words.noise(noise if isinstance(noise, float) else None)
        )
    ways = [report.get("cold_by", "touching") for report in (a, b)]
    if ways[0] != ways[1]:
        yield (
            f"NOT ALIKE: the CPU's caches were made cold by {ways[0]} in A and by {ways[1]} in B (one is of --quick): "
            "measure both in the same way."
        )


def compare(a: Raw, b: Raw, console: Console) -> dict[str, Any]:
    """Two reports side by side; what was compared, for JSON."""
    for line in _machines(a, b):
        say(console, line)
    _peaks(a, b, console)
    found, only = pairs(a, b)
    _cells(found, console)
    console.print()
    different = sum(not pair.alike for pair in found)
    if different:
        say(
            console,
            f"NOT ALIKE: in {different} of {len(found)} comparisons RAM or threads differ. Measure both with the same "
            "--ram and --threads to compare like with like.",
        )
    if only:
        say(console, f"{only} cells are in one of the two only.")
    if not found:
        say(console, "The two have no cell in common.")
    return {"a": a["host"], "b": b["host"], "rows": [pair.to_json() for pair in found], "only_in_one": only}
