# SPDX-License-Identifier: Apache-2.0
"""Three plots of a run, as PNG and SVG."""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colocache.errors import SystemCallError, UnsupportedError, reason_of
from colocache.measure.rows import Row
from colocache.measure.session import Result
from colocache.writing import write_file

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. UnsupportedError with what to install if it is not there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UnsupportedError(
            "plots need matplotlib, which is not installed", hint="pip install 'colocache[bench]'"
        ) from error
    return plt


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw what the rows allow; the files that were written."""
    plt = pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        code = error.errno or errno.EIO
        raise SystemCallError(f"{folder} can't be made: {reason_of(error)}", errno=code) from error
    rows = [row for row in result.rows if not row.wrong and not row.warm and row.pattern == "synthetic"]
    if not rows:
        return []
    ram = max(row.ram_bytes for row in rows)
    rows = [row for row in rows if row.ram_bytes == ram]
    written: list[Path] = []
    for name, figure in (
        ("throughput", _throughput(plt, result, rows)),
        ("pause", _pause(plt, result, rows)),
        ("scaling", _scaling(plt, result, rows)),
    ):
        if figure is None:
            continue
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            drawn = io.BytesIO()
            figure.savefig(drawn, format=suffix, dpi=130)
            write_file(path, drawn.getvalue())
            written.append(path)
        plt.close(figure)
    return written


def _frame(plt: Any, result: Result, title: str, columns: int = 1) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(1.5 + 5.2 * columns, 4.6), squeeze=False, layout="constrained")
    host = result.host
    figure.suptitle(f"{title}\n{host.cpu}, {host.cores} cores, Linux {host.kernel}", fontsize=10)
    for axis in axes[0]:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[0]


def _line(axis: Any, rows: Sequence[Row], x: Sequence[float], index: int, label: str) -> None:
    """GB/s with the spread of the rounds."""
    y = [row.gb_per_s for row in rows]
    low = [max(0.0, value - row.n_bytes / row.seconds.p90 / 1e9) for row, value in zip(rows, y, strict=True)]
    high = [max(0.0, row.n_bytes / row.seconds.p10 / 1e9 - value) for row, value in zip(rows, y, strict=True)]
    axis.errorbar(
        x, y, yerr=[low, high], color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)], markersize=4,
        linewidth=1.4, elinewidth=0.8, capsize=2, label=label,
    )  # fmt: skip


def _throughput(plt: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Flush GB/s over dirty share, one panel per backing, one line per run length, with the peak and QEMU's way."""
    most = max(row.threads for row in rows)
    rows = [row for row in rows if row.case == "flush" and row.threads == most]
    backings = sorted({row.backing for row in rows})
    if not rows:
        return None
    figure, axes = _frame(
        plt, result, f"Flush throughput, {rows[0].ram_bytes >> 20} MiB guest, threads: {most}", len(backings)
    )
    top = max([row.gb_per_s for row in rows] + [s.p50 for (_, n), s in result.peak_spreads().items() if n == most])
    for axis, backing in zip(axes, backings, strict=True):
        here = [row for row in rows if row.backing == backing]
        whole = [row for row in here if row.dirty_ratio >= 1]
        for index, run in enumerate(sorted({round(row.run_pages) for row in here if row.dirty_ratio < 1})):
            line = sorted((row for row in here if round(row.run_pages) == run), key=lambda row: row.dirty_ratio) + whole
            _line(
                axis,
                line,
                [100 * row.dirty_ratio for row in line],
                index,
                f"runs of {run}" if run > 1 else "single pages",
            )
        single = sorted(
            (row for row in here if round(row.run_pages) == 1 or row in whole), key=lambda row: row.dirty_ratio
        )
        qemu = [
            (100 * row.dirty_ratio, row.n_bytes / row.baseline_seconds.p50 / 1e9)
            for row in single
            if row.baseline_seconds
        ]
        if qemu:
            axis.plot(*zip(*qemu, strict=True), color=GREY, linestyle=":", marker="x", label="QEMU's way, single pages")
        peak = result.peak_spreads().get((backing, most))
        if peak:
            axis.axhspan(peak.p10, peak.p90, color="#000000", alpha=0.07, linewidth=0)
            axis.axhline(peak.p50, color="black", linestyle="--", linewidth=1, label="peak copy (band: p10 to p90)")
        axis.set_xscale("log")
        axis.set_xticks([0.1, 1, 10, 50, 100], ["0.1", "1", "10", "50", "100"])
        axis.minorticks_off()
        axis.set_ylim(0, 1.3 * top)
        axis.set_xlabel("dirty share of guest RAM, %")
        axis.set_ylabel("GB/s copied")
        axis.set_title(backing, fontsize=10)
        axis.legend(fontsize=7, ncols=2, loc="upper left")
    return figure


def _pause(plt: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Seal and flush over dirty bytes, beside QEMU's union and flush."""
    rows = [row for row in rows if row.case == "pause" and row.n_bytes]
    most = max((row.threads for row in rows), default=0)
    rows = [row for row in rows if row.threads == most and (round(row.run_pages) == 8 or row.dirty_ratio >= 1)]
    if not rows:
        return None
    figure, (axis,) = _frame(plt, result, f"Pause (seal + flush), runs of 8 pages, threads: {most}")
    for index, backing in enumerate(sorted({row.backing for row in rows})):
        line = sorted((row for row in rows if row.backing == backing), key=lambda row: row.n_bytes)
        x = [row.n_bytes / 1e6 for row in line]
        y = [row.seconds.p50 * 1e3 for row in line]
        spread = [
            [(row.seconds.p50 - row.seconds.p10) * 1e3 for row in line],
            [(row.seconds.p90 - row.seconds.p50) * 1e3 for row in line],
        ]
        color = COLORS[index % len(COLORS)]
        axis.errorbar(
            x, y, yerr=spread, color=color, marker=MARKERS[index], markersize=4, capsize=2, label=f"{backing}"
        )
        qemu = [row.baseline_seconds.p50 * 1e3 for row in line if row.baseline_seconds]
        if len(qemu) == len(x):
            axis.plot(x, qemu, color=color, linestyle=":", marker="x", alpha=0.8, label=f"QEMU's way onto {backing}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(plt.NullFormatter())
    axis.set_xlabel("dirty, MB")
    axis.set_ylabel("pause, ms")
    axis.legend(fontsize=8)
    return figure


def _scaling(plt: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Flush GB/s over threads at half of the guest dirty."""
    rows = [row for row in rows if row.case == "flush" and abs(row.dirty_ratio - 0.5) < 0.02]
    counts = sorted({row.threads for row in rows})
    if len(counts) < 2:
        return None
    backings = sorted({row.backing for row in rows})
    figure, axes = _frame(plt, result, "Flush throughput over threads, 50 % dirty", len(backings))
    top = max([row.gb_per_s for row in rows] + [spread.p50 for spread in result.peak_spreads().values()])
    for axis, backing in zip(axes, backings, strict=True):
        here = [row for row in rows if row.backing == backing]
        for index, run in enumerate(sorted({round(row.run_pages) for row in here})):
            line = sorted((row for row in here if round(row.run_pages) == run), key=lambda row: row.threads)
            if len(line) > 1:
                label = "single pages" if run == 1 else f"runs of {run}"
                _line(axis, line, [row.threads for row in line], index, label)
        peaks = result.peak_spreads()
        peak = [(n, peaks[backing, n].p50) for n in sorted({row.threads for row in here}) if (backing, n) in peaks]
        axis.plot(*zip(*peak, strict=True), color="black", linestyle="--", linewidth=1, label="peak copy")
        axis.set_xticks(counts)
        axis.set_ylim(0, 1.2 * top)
        axis.set_xlabel("threads of the flush")
        axis.set_ylabel("GB/s copied")
        axis.set_title(backing, fontsize=10)
        axis.legend(fontsize=8, loc="lower right")
    return figure
