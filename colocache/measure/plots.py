# SPDX-License-Identifier: Apache-2.0
"""Three plots of a run, as PNG and SVG. A run length has the same colour in all of them, QEMU and the peak theirs."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from colocache.errors import SystemCallError, UnsupportedError, reason_of
from colocache.extras import install_command
from colocache.measure import words
from colocache.measure.baseline import QEMU_VERSION
from colocache.measure.clock import Spread
from colocache.measure.rows import Row
from colocache.measure.session import Result
from colocache.writing import write_file

# By run length in pages; one that is not here takes the next colour that is left.
LOOKS = {1: ("#0072b2", "o"), 8: ("#d55e00", "s"), 64: ("#009e73", "^"), 512: ("#cc79a7", "D")}
SPARE = (("#56b4e9", "v"), ("#e69f00", "P"))
QEMU_COLOR, PEAK_COLOR, ERROR_COLOR = "#777777", "black", "#cc0000"
QEMU = f"QEMU {QEMU_VERSION}'s way, one thread"
SIZE_TICKS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)  # MB, and ms


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. UnsupportedError with what to install if it is not there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UnsupportedError(
            "plots need matplotlib, which is not installed", hint=install_command("bench")
        ) from error
    plt.rcParams["svg.fonttype"] = "none"  # text stays text: it can be searched, and edited
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
    for name, drawing in (("throughput", _throughput), ("pause", _pause), ("scaling", _scaling)):
        figure = drawing(plt, result, rows)
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


# ---- what they share -------------------------------------------------------------------------------------------


def _frame(plt: Any, result: Result, title: str, rows: Sequence[Row], backings: Sequence[str]) -> tuple[Any, Any]:
    """A panel per backing, under a title that says what was measured, on what, and how often."""
    width = 1.5 + 5.2 * len(backings)
    figure, axes = plt.subplots(1, len(backings), figsize=(width, 5.0), squeeze=False, layout="constrained")
    counts = sorted({row.threads for row in rows})
    threads = words.threads(counts[0]) if len(counts) == 1 else f"{', '.join(str(n) for n in counts)} threads"
    how = f"{words.ram(rows[0].ram_bytes)} guest, {threads}, {words.rounds(result.rounds)} (bars: p10 to p90)"
    host = result.host
    machine = f"{host.cpu}, {host.cores} cores, Linux {host.kernel}"
    lines = (title, how, machine) if len(backings) > 1 else (title, how, host.cpu, f"{host.cores} cores, {host.kernel}")
    figure.suptitle("\n".join(lines), fontsize=10)
    for axis, backing in zip(axes[0], backings, strict=True):
        axis.grid(True, which="major", color="#cccccc", linewidth=0.6)
        axis.grid(True, which="minor", color="#eeeeee", linewidth=0.4)
        axis.set_axisbelow(True)
        axis.set_title(backing, fontsize=10)
    return figure, axes[0]


def _looks(run: int, others: Sequence[int]) -> tuple[str, str]:
    if run in LOOKS:
        return LOOKS[run]
    return SPARE[sorted(set(others) - LOOKS.keys()).index(run) % len(SPARE)]


def _runs(rows: Sequence[Row]) -> list[int]:
    return sorted({round(row.run_pages) for row in rows if row.dirty_ratio < 1})


def _bars(rows: Sequence[Row], y: Callable[[Row, float], float]) -> list[list[float]]:
    """How far the bars reach below and above each median; nothing where a spread is not known."""
    low, high = [], []
    for row in rows:
        times = row.seconds
        ends = sorted((y(row, times.p10), y(row, times.p90))) if times.known else [y(row, times.p50)] * 2
        low.append(max(0.0, y(row, times.p50) - ends[0]))
        high.append(max(0.0, ends[1] - y(row, times.p50)))
    return [low, high]


def _errors(axis: Any, marked: Sequence[tuple[float, float]]) -> None:
    """A cross in a ring over each cell that is not to be believed."""
    if marked:
        axis.scatter(
            *zip(*marked, strict=True), s=90, facecolors="none", edgecolors=ERROR_COLOR, linewidths=1.6, zorder=5,
            label="measuring error: above its rounds' peak",
        )  # fmt: skip
        axis.scatter(*zip(*marked, strict=True), s=40, color=ERROR_COLOR, marker="x", linewidths=1.6, zorder=5)


def _lines(
    axis: Any, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row, float], float], whole: Sequence[Row]
) -> None:
    """One line per run length, each of `rows` at x, at y of its time; `whole`, all dirty, ends every line."""
    for run in _runs(rows):
        color, marker = _looks(run, _runs(rows))
        line = sorted((row for row in rows if round(row.run_pages) == run and row not in whole), key=x) + list(whole)
        axis.errorbar(
            [x(row) for row in line], [y(row, row.seconds.p50) for row in line], yerr=_bars(line, y), color=color,
            marker=marker, markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2, label=words.runs(run),
        )  # fmt: skip
    _errors(axis, sorted({(x(row), y(row, row.seconds.p50)) for row in rows if row.error}))


def _speed(row: Row, seconds: float) -> float:
    return row.n_bytes / seconds / 1e9


def _peak(axis: Any, spread: Spread | None) -> None:
    if spread is None:
        return
    if spread.known:
        axis.axhspan(spread.p10, spread.p90, color=PEAK_COLOR, alpha=0.07, linewidth=0)
    axis.axhline(spread.p50, color=PEAK_COLOR, linestyle="--", linewidth=1, label="peak copy (band: p10 to p90)")


def _plain_ticks(plt: Any, axis: Any, ticks: Sequence[float]) -> None:
    """1, 3, 10 ... in full on a logarithmic axis, with a mark at each of 2, 4, 5 ... between them."""
    from matplotlib.ticker import FixedLocator, LogLocator

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(LogLocator(subs=[1, 2, 3, 4, 5, 6, 7, 8, 9], numticks=20))
    axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(plt.NullFormatter())


# ---- the three -------------------------------------------------------------------------------------------------


def _throughput(plt: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Flush GB/s over dirty share, one panel per backing, one line per run length, with the peak and QEMU's way."""
    most = max(row.threads for row in rows)
    rows = [row for row in rows if row.case == "flush" and row.threads == most]
    backings = sorted({row.backing for row in rows})
    if not rows:
        return None
    figure, axes = _frame(plt, result, "Flush throughput", rows, backings)
    peaks = result.peak_spreads()
    top = max([_speed(row, row.seconds.p50) for row in rows] + [s.p50 for (_, n), s in peaks.items() if n == most])
    for axis, backing in zip(axes, backings, strict=True):
        here = [row for row in rows if row.backing == backing]
        whole = [row for row in here if row.dirty_ratio >= 1]
        _lines(axis, here, lambda row: 100 * row.dirty_ratio, _speed, whole)
        single = sorted((row for row in here if round(row.run_pages) == 1), key=lambda row: row.dirty_ratio) + whole
        qemu = [
            (100 * row.dirty_ratio, _speed(row, row.baseline_seconds.p50)) for row in single if row.baseline_seconds
        ]
        if qemu:
            label = f"{QEMU}, single pages"
            axis.plot(*zip(*qemu, strict=True), color=QEMU_COLOR, linestyle=":", marker="x", label=label)
        _peak(axis, peaks.get((backing, most)))
        axis.set_xscale("log")
        axis.set_xticks([0.1, 1, 10, 50, 100], ["0.1", "1", "10", "50", "100"])
        axis.minorticks_off()
        axis.set_ylim(0, 1.45 * top)
        axis.set_xlabel("dirty share of guest RAM, %")
        axis.set_ylabel("GB/s copied")
        axis.legend(fontsize=7, ncols=2, loc="upper left")
    return figure


def _pause(plt: Any, result: Result, rows: Sequence[Row]) -> Any:
    """The flush's part of a pause over dirty bytes, one line per run length, beside QEMU's union and flush."""
    rows = [row for row in rows if row.case == "pause" and row.n_bytes]
    most = max((row.threads for row in rows), default=0)
    rows = [row for row in rows if row.threads == most]
    backings = sorted({row.backing for row in rows})
    if not rows:
        return None
    figure, axes = _frame(plt, result, "The flush's part of a pause: seal and flush", rows, backings)
    for axis, backing in zip(axes, backings, strict=True):
        here = [row for row in rows if row.backing == backing]
        whole = [row for row in here if row.dirty_ratio >= 1]
        _lines(axis, here, lambda row: row.n_bytes / 1e6, lambda _, seconds: seconds * 1e3, whole)
        shortest = min((round(row.run_pages) for row in here if row.dirty_ratio < 1), default=1)  # --quick: of 64 only
        beside = sorted((row for row in here if round(row.run_pages) == shortest), key=lambda row: row.n_bytes) + whole
        qemu = [(row.n_bytes / 1e6, row.baseline_seconds.p50 * 1e3) for row in beside if row.baseline_seconds]
        if qemu:
            label = f"{QEMU}, {'single pages' if shortest == 1 else f'runs of {shortest}'}"
            axis.plot(*zip(*qemu, strict=True), color=QEMU_COLOR, linestyle=":", marker="x", label=label)
        peak = result.peak_spreads().get((backing, most))
        if peak:
            ends = [min(row.n_bytes for row in here), max(row.n_bytes for row in here)]
            axis.plot(
                [end / 1e6 for end in ends], [end / peak.p50 / 1e6 for end in ends], color=PEAK_COLOR, linestyle="--",
                linewidth=1, label="at peak copy bandwidth",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            _plain_ticks(plt, side, SIZE_TICKS)
        axis.set_xlim(min(row.n_bytes for row in rows) / 2e6, max(row.n_bytes for row in rows) / 5e5)
        times = [row.seconds.p50 * 1e3 for row in rows] + [y for _, y in qemu]
        axis.set_ylim(min(times) / 2, 2 * max(times))
        axis.set_xlabel("dirty, MB")
        axis.set_ylabel("seal and flush, ms")
        axis.legend(fontsize=7, loc="upper left")
    return figure


def _scaling(plt: Any, result: Result, rows: Sequence[Row]) -> Any:
    """Flush GB/s over threads at half of the guest dirty, with the peak and QEMU's one thread."""
    rows = [row for row in rows if row.case == "flush" and abs(row.dirty_ratio - 0.5) < 0.02]
    counts = sorted({row.threads for row in rows})
    if len(counts) < 2:
        return None
    # What the line of every thread count has: not run lengths that one count alone was measured with.
    kept = [run for run in _runs(rows) if {row.threads for row in rows if round(row.run_pages) == run} == set(counts)]
    rows = [row for row in rows if round(row.run_pages) in kept]
    backings = sorted({row.backing for row in rows})
    figure, axes = _frame(plt, result, "Flush throughput over threads, 50 % dirty", rows, backings)
    peaks = result.peak_spreads()
    top = max([_speed(row, row.seconds.p50) for row in rows] + [spread.p50 for spread in peaks.values()])
    for axis, backing in zip(axes, backings, strict=True):
        here = [row for row in rows if row.backing == backing]
        _lines(axis, here, lambda row: row.threads, _speed, ())
        single = [row for row in here if row.baseline_seconds and round(row.run_pages) == 1]
        qemu = [_speed(row, row.baseline_seconds.p50) for row in single if row.baseline_seconds]
        if qemu:
            axis.axhline(median(qemu), color=QEMU_COLOR, linestyle=":", label=f"{QEMU}, single pages")
        peak = [(n, peaks[backing, n].p50) for n in counts if (backing, n) in peaks]
        if peak:
            axis.plot(*zip(*peak, strict=True), color=PEAK_COLOR, linestyle="--", linewidth=1, label="peak copy")
        axis.set_xticks(counts)
        axis.set_xlim(0.8, counts[-1] + 0.2)
        axis.set_ylim(0, 1.45 * top)
        axis.set_xlabel("threads of the flush")
        axis.set_ylabel("GB/s copied")
        axis.legend(fontsize=7, loc="upper left")
    return figure
