# SPDX-License-Identifier: Apache-2.0
"""A run in words, tables, JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from colocache.errors import ArgumentError
from colocache.measure.cells import CASES
from colocache.measure.rows import Row
from colocache.measure.session import PAUSE_BYTES, Result

QUIET, NOISY = 0.10, 0.30  # spread of the peak
CSV_FIELDS = (
    "case", "backing", "strategy", "ram_bytes", "dirty_ratio", "run_pages", "threads", "pattern", "warm", "n_pages",
    "n_runs", "n_bytes", "rounds", "seconds_p10", "seconds_p50", "seconds_p90", "gb_per_s", "of_peak", "baseline",
    "baseline_ratio", "numpy_ratio", "error",
)  # fmt: skip
ROW_FIELDS = (
    "case", "backing", "strategy", "ram_bytes", "dirty_ratio", "run_pages", "threads", "seconds", "gb_per_s", "of_peak",
    "baseline_ratio",
)  # fmt: skip


def noise_sentence(noise: float) -> str:
    """How far the figures can be trusted."""
    how = "quiet" if noise <= QUIET else "noisy" if noise <= NOISY else "very noisy"
    advice = (
        ""
        if noise <= QUIET
        else "; trust the ratios more than the figures"
        if noise <= NOISY
        else ("; something else was running here: stop it and measure again")
    )
    return f"This machine was {how}: its peak copy bandwidth varied by {noise:.0%} (p10 to p90 of the rounds){advice}."


# ---- JSON and CSV -------------------------------------------------------------------------------------------


def to_json(result: Result) -> dict[str, Any]:
    """The object of `bench --json`."""
    peaks: dict[str, dict[str, float]] = {}
    for (backing, threads), spread in result.peak_spreads().items():
        peaks.setdefault(backing, {})[str(threads)] = spread.p50
    return {
        "host": dataclasses.asdict(result.host),
        "peak_gb_per_s": peaks,
        "rows": [row.to_json() for row in result.rows],
        "noise": result.noise,
        "notes": result.notes,
        "rounds": result.plan.n_rounds,
        "seconds": result.seconds,
    }


def write_csv(result: Result, path: Path) -> None:
    """One line per row; times in seconds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore")
        writer.writeheader()
        for row in result.rows:
            spread = row.seconds
            times = {"seconds_p10": spread.p10, "seconds_p50": spread.p50, "seconds_p90": spread.p90}
            writer.writerow({**row.__dict__, **times})


def read_json(path: Path) -> dict[str, Any]:
    """The report in a file: its last line that is an object with rows. ArgumentError if there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} can't be read: {error}") from error
    for text in ("\n".join(lines), *reversed(lines)):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if not isinstance(found, dict):
            continue
        if {"host", "peak_gb_per_s", "rows"} <= found.keys() and all(
            set(ROW_FIELDS) <= row.keys() for row in found["rows"]
        ):
            return found
    raise ArgumentError(f"{path} holds no report of `colocache bench --json`")


# ---- tables ------------------------------------------------------------------------------------------------------


def _time(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} µs"


def _share(value: float) -> str:
    if value >= 0.095 or not value:
        return f"{value:.0%}"
    return f"{value:.1%}" if value >= 0.0009 else f"{100 * value:.1g}%"


def _ratio(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.2f}{unit}"


def _pattern(row: Row) -> str:
    return (
        row.pattern
        if row.pattern != "synthetic"
        else f"runs of {row.run_pages:.0f}"
        if row.dirty_ratio < 1
        else "one run"
    )


def _order(row: Row) -> tuple[Any, ...]:
    return (
        row.backing,
        row.ram_bytes,
        row.pattern != "synthetic",
        row.threads,
        row.warm,
        float(f"{row.dirty_ratio:.1g}"),
        row.run_pages,
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _ram(n_bytes: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if n_bytes >= size:
            return f"{n_bytes / size:g} {unit}"
    return f"{n_bytes >> 20} MiB"


AGAINST = {"flush": "QEMU", "pause": "QEMU", "union": "QEMU", "receive": "numpy", "checkpoint": "socket+QEMU"}
TITLES = {
    "flush": "flush: dirty pages from the cache over guest RAM",
    "pause": "pause: seal and flush, against QEMU's union and flush",
    "union": "union: the two bitmaps united, counted and cleared",
    "receive": "receive: pages from memory into the cache, one thread, against numpy",
    "checkpoint": "checkpoint: socket to running, against the raw socket and QEMU's flush",
}


def table(rows: Sequence[Row], case: str) -> Table:
    """All rows of one case."""
    made = Table(title=TITLES[case], title_justify="left", show_edge=False, pad_edge=False)
    for name, justify in (
        ("backing", "left"), ("RAM", "right"), ("threads", "right"), ("dirty", "right"), ("pattern", "left"),
        ("time p50", "right"), ("p10 … p90", "right"), ("GB/s", "right"), ("of peak", "right"),
        (f"× {AGAINST[case]}", "right"), ("", "left"),
    ):  # fmt: skip
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in sorted((row for row in rows if row.case == case), key=_order):
        spread = f"{_time(row.seconds.p10)} … {_time(row.seconds.p90)}"
        remark = "[yellow]slower than QEMU[/]" if row.slower else ""
        if row.error:
            remark = "[red]WRONG RESULT[/]" if row.wrong else "[red]measuring error[/]"
        made.add_row(
            row.backing, _ram(row.ram_bytes), str(row.threads), _share(row.dirty_ratio),
            _pattern(row) + (" (warm)" if row.warm else ""), _time(row.seconds.p50), spread,
            f"{row.gb_per_s:.2f}", "–" if row.of_peak is None else f"{row.of_peak:.0%}", _ratio(row.baseline_ratio),
            remark,
        )  # fmt: skip
    return made


def summary(result: Result) -> list[str]:
    """What somebody who chooses hardware wants to know, one sentence a line."""
    lines = []
    for (backing, threads), spread in result.peak_spreads().items():
        lines.append(f"Peak copy bandwidth on {backing}, {_threads(threads)}: {spread.p50:.2f} GB/s.")
    most = max((row.threads for row in result.rows), default=1)
    for row in result.rows:
        near = abs(row.n_bytes - PAUSE_BYTES) < 0.01 * PAUSE_BYTES
        if row.case == "pause" and row.threads == most and near and not row.warm and not row.error:
            times = "" if row.baseline_ratio is None else f", {row.baseline_ratio:.2f} times as fast as QEMU's way"
            lines.append(
                f"Pause for 100 MB dirty in runs of {row.run_pages:.0f} on {row.backing}: "
                f"{row.seconds.p50 * 1e3:.1f} ms "
                f"({row.gb_per_s:.1f} GB/s{times})."
            )
    lines += [_large(row) for row in result.rows if row.pattern in ("scattered", "nothing dirty")]
    slower = [row for row in result.rows if row.slower]
    if slower:
        lines.append(
            f"Slower than QEMU's way beyond the spread of the rounds: {'; '.join(str(row) for row in slower)}."
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
    lines.append(noise_sentence(result.noise))
    return lines


def _large(row: Row) -> str:
    heat = "warm" if row.warm else "cold"
    if row.case == "checkpoint":
        return f"An idle checkpoint of a {_ram(row.ram_bytes)} guest, {heat}: {_time(row.seconds.p50)}."
    text = f"{row.n_pages:,} dirty pages of a {_ram(row.ram_bytes)} guest, {heat}: united, counted and cleared in "
    text += f"{_time(row.seconds.p50)} ({_ratio(row.baseline_ratio)} times as fast as QEMU's way), runs found in "
    text += _time(row.more["scan_ns"] / 1e9)
    if "ns_per_run" in row.more:
        text += f" ({row.more['ns_per_run']:.2f} ns a run)"
    return text + "."


def show(result: Result, console: Console) -> None:
    """Everything, for a person."""
    console.print(str(result.host), highlight=False, markup=False, soft_wrap=True)
    for case in reversed(CASES):
        if any(row.case == case for row in result.rows):
            console.print()
            console.print(table(result.rows, case))
    console.print()
    for line in summary(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


# ---- two machines ---------------------------------------------------------------------------------------------------


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows of two machines the same cell; shares to two digits: a page more or less is no matter."""
    pattern = row.get("pattern", "synthetic")
    return (
        CASES.index(row["case"]) if row["case"] in CASES else len(CASES), row["case"], row["backing"], pattern,
        float(f"{row['dirty_ratio']:.2g}"), round(row["run_pages"]), bool(row.get("warm", False)),
    )  # fmt: skip


def _most_threads(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Of each cell the row with the most threads: machines are compared as wholes."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["seconds"]["p50"] <= 0:
            continue
        key = _key(row)
        if key not in best or row["threads"] > best[key]["threads"]:
            best[key] = row
    return best


def compare(a: dict[str, Any], b: dict[str, Any], console: Console) -> dict[str, Any]:
    """Two reports side by side; what was compared, for JSON."""
    for name, report in (("A", a), ("B", b)):
        host = report["host"]
        console.print(
            f"{name}: {host.get('cpu', '?')}, {host.get('cores', '?')} cores, Linux {host.get('kernel', '?')}; "
            + noise_sentence(float(report.get("noise", 0.0))),
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    peaks = Table(title="peak copy bandwidth, GB/s", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("backing", "threads", "A", "B", "B / A"):
        peaks.add_column(name, justify="left" if name == "backing" else "right")
    pairs = sorted({(k, int(t)) for report in (a, b) for k, by in report["peak_gb_per_s"].items() for t in by})
    for backing, threads in pairs:
        one, two = (report["peak_gb_per_s"].get(backing, {}).get(str(threads)) for report in (a, b))
        ratio = two / one if one and two else None
        peaks.add_row(backing, str(threads), _ratio(one), _ratio(two), _ratio(ratio))
    console.print()
    console.print(peaks)
    rows_a, rows_b = _most_threads(a["rows"]), _most_threads(b["rows"])
    both = sorted(rows_a.keys() & rows_b.keys())
    cells = Table(
        title="time of each cell that both have, with all threads",
        title_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    for name in ("case", "backing", "dirty", "pattern", "A", "B", "A GB/s", "B GB/s", "B is faster"):
        cells.add_column(name, justify="left" if name in ("case", "backing", "pattern") else "right")
    found = []
    for key in both:
        one, two = rows_a[key], rows_b[key]
        faster = two["gb_per_s"] / one["gb_per_s"] if one["gb_per_s"] else one["seconds"]["p50"] / two["seconds"]["p50"]
        whole = "one run" if one["dirty_ratio"] >= 1 else f"runs of {key[5]}"
        pattern = key[3] if key[3] != "synthetic" else whole
        cells.add_row(
            one["case"], one["backing"], _share(one["dirty_ratio"]), pattern, _time(one["seconds"]["p50"]),
            _time(two["seconds"]["p50"]), _ratio(one["gb_per_s"]), _ratio(two["gb_per_s"]), f"{faster:.2f}×",
        )  # fmt: skip
        found.append(
            {
                **{name: one[name] for name in ("case", "backing", "dirty_ratio", "run_pages")},
                "pattern": key[3],
                "a_seconds": one["seconds"]["p50"],
                "b_seconds": two["seconds"]["p50"],
                "a_threads": one["threads"],
                "b_threads": two["threads"],
                "b_faster": faster,
            }
        )
    console.print()
    console.print(cells)
    only = len(rows_a.keys() ^ rows_b.keys())
    if only:
        console.print(f"{only} cells are in one of the two only.", highlight=False)
    return {"a": a["host"], "b": b["host"], "rows": found, "only_in_one": only}
