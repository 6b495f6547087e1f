# SPDX-License-Identifier: Apache-2.0
"""A run as the object of `bench --json`, as comma-separated values, and read again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from numbers import Real
from pathlib import Path
from typing import Any

from colocache.errors import ArgumentError
from colocache.measure.session import Result
from colocache.writing import write_file

CSV_FIELDS = (
    "case", "backing", "strategy", "ram_bytes", "dirty_ratio", "run_pages", "threads", "pattern", "warm", "n_pages",
    "n_runs", "n_bytes", "rounds", "seconds_p10", "seconds_p50", "seconds_p90", "gb_per_s", "of_peak", "baseline",
    "baseline_ratio", "numpy_ratio", "in_place_ratio", "error",
)  # fmt: skip
NUMBERS = ("ram_bytes", "dirty_ratio", "run_pages", "threads", "gb_per_s")  # of a row, besides its times
TEXTS = ("case", "backing", "strategy")


def to_json(result: Result) -> dict[str, Any]:
    """The object of `bench --json`; `colocache bench --help` says what its fields mean."""
    peaks: dict[str, dict[str, float]] = {}
    for (backing, threads), spread in result.peak_spreads().items():
        peaks.setdefault(backing, {})[str(threads)] = spread.p50
    return {
        "host": dataclasses.asdict(result.host),
        "peak_gb_per_s": peaks,
        "rows": [row.to_json() for row in result.rows],
        "noise": result.noise,
        "notes": result.notes,
        "rounds": result.rounds,
        "cold_by": result.cold_by,
        "seconds": result.seconds,
    }


def write_csv(result: Result, path: Path) -> None:
    """One line per row; times in seconds, what is not known left empty. SystemCallError."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore")
    writer.writeheader()
    for row in result.rows:
        times = {f"seconds_{name}": value for name, value in row.seconds.to_json().items()}
        in_place = row.ratios.get("in_place")
        writer.writerow({**row.__dict__, **times, "in_place_ratio": in_place.p50 if in_place else None})
    write_file(path, text.getvalue().encode())


def read_json(path: Path) -> dict[str, Any]:
    """The report in a file: its last line that is one. ArgumentError if there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} can't be read: {error}") from error
    for text in ("\n".join(lines), *reversed(lines)):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_report(found):
            report: dict[str, Any] = found
            return report
    raise ArgumentError(f"{path} holds no report of `colocache bench --json`")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("seconds"), dict):
        return False
    times = row["seconds"]
    return (
        all(_is_number(row.get(name)) for name in NUMBERS)
        and all(isinstance(row.get(name), str) for name in TEXTS)
        and _is_number(times.get("p50"))
        and all(times.get(name) is None or _is_number(times[name]) for name in ("p10", "p90"))
    )


def _is_peaks(peaks: Any) -> bool:
    return isinstance(peaks, dict) and all(
        isinstance(by, dict) and all(count.isdigit() and _is_number(speed) for count, speed in by.items())
        for by in peaks.values()
    )


def _is_report(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("host"), dict)
        and _is_peaks(found.get("peak_gb_per_s"))
        and isinstance(found.get("rows"), list)
        and all(_is_row(row) for row in found["rows"])
    )
