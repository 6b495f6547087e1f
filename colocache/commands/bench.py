# SPDX-License-Identifier: Apache-2.0
"""`colocache bench`: what a flush costs on this machine, beside its peak copy bandwidth and QEMU's way."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from colocache.choices import BACKINGS
from colocache.commands.options import foreseen, json_option, parse_size, print_json

if TYPE_CHECKING:
    from colocache.measure.session import Progress

PIPE_WIDTH = 120
RAM_MIN = 16 << 20
DIRTY_MIN, DIRTY_MAX = 1 << 20, 1 << 46  # bytes
RATE_MIN, RATE_MAX = 1e6, 1e13  # bits a second

FIELDS = """\
GB/s are 1e9 bytes copied in a second, each byte counted once, though it is read and written.

\b
The object of --json; times are in seconds:
  host             the machine; sizes in bytes
  peak_gb_per_s    {backing: {threads: GB/s}} of the best sequential pass
  noise            (p90 - p10) / p50 of the peak; null: under 3 rounds
  rounds           of the cell that has fewest
  cold_by          caches made cold by "touching" other memory, or by
                   pushing "lines" of the images out (--quick)
  notes, seconds   what could not be done and why; length of the run
  rows             one for each cell:
    case           flush; pause (the flush's part of one: seal + flush);
                   union, receive, checkpoint
    backing, strategy, ram_bytes, threads, rounds, pattern, warm
    dirty_ratio, run_pages, n_pages, n_runs, n_bytes   the dirty set
    seconds        {p10, p50, p90} of the rounds; p10 and p90 are null
                   of fewer than 3
    gb_per_s, of_peak      of_peak: share of the same round's peak
    baseline, baseline_seconds, baseline_ratio   "qemu" (one thread),
                   "socket" (bytes through it that stay in the CPU's
                   caches, then QEMU's flush) or "numpy"; its time / ours
    ratios         {p10, p50, p90} of the rounds' own, of every baseline
                   that the case has; "in_place": dirty pages through a
                   socket from and to where they lie, then QEMU's flush
    numpy_ratio, more      numpy's time / ours; what only this case has
    error          why the cell is not to be believed, or null
With --dirty:
  pause_seconds    the whole pause for dirty_bytes, estimated
  flush_part_seconds     seal + flush {p10, p50, p90}
  sizes            the same for each size, with parts {log_sync, transfer,
                   seal, flush, load}: {seconds, measured, source}
With --compare:
  rows             a_seconds, b_seconds, b_faster (GB/s of B / A), alike
                   (same RAM and threads), verdict
"""


class RamSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Guest RAM, as an option that may be given several times."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        n_bytes = value if isinstance(value, int) else parse_size(value)
        if n_bytes < RAM_MIN:
            self.fail(f"a guest of {n_bytes} bytes is too small to measure: give at least {RAM_MIN >> 20}M", param, ctx)
        return n_bytes


class DirtySize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Dirty memory: one page at least."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        n_bytes = value if isinstance(value, int) else parse_size(value)
        if not DIRTY_MIN <= n_bytes <= DIRTY_MAX:
            self.fail(f"{value} dirty: give {DIRTY_MIN >> 20}M to {DIRTY_MAX >> 40}T", param, ctx)
        return n_bytes


class Rate(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A network's rate: `10G`, `2.5G`, `100M` bits a second."""

    name = "RATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Bits a second."""
        if isinstance(value, float):
            return value
        text = str(value).strip().upper().removesuffix("BIT/S").removesuffix("BIT")
        factor = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:], 1.0)
        try:
            rate = float(text[:-1] if factor > 1 else text) * factor
        except ValueError:
            rate = math.nan
        if not RATE_MIN <= rate <= RATE_MAX:
            self.fail(f"{value!r} is no rate of a network: write 10G or 2.5G, from 1M to 10T bits a second", param, ctx)
        return rate


@click.command(epilog=FIELDS)
@click.option(
    "--dirty",
    type=DirtySize(),
    help="Answer how long a VM stands still when so much of its memory is dirty, instead of measuring every cell.",
)
@click.option(
    "--network",
    type=Rate(),
    help="With --dirty: the network's rate in bits a second, a unit being a power of 1000.",
    show_default="what a socket on this machine carries",
)
@click.option("--quick", is_flag=True, help="Measure few cells, in under 30 seconds.")
@click.option(
    "--full",
    is_flag=True,
    help="Measure every case at every dirty share, run length and number of threads; takes long.",
)
@click.option("--warm", is_flag=True, help="Measure each cell a second time with whatever is left in the CPU's caches.")
@click.option(
    "--ram",
    type=RamSize(),
    multiple=True,
    help="Size of guest RAM; may be given several times.",
    show_default="256M, or four times the L3 caches; 64M with --quick",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=None,
    help="How many rounds each cell is measured.",
    show_default="5; 3 with --quick",
)
@click.option(
    "--backing",
    "backings",
    type=click.Choice(BACKINGS[1:]),
    multiple=True,
    help="What guest memory is made of; may be given several times.",
    show_default="every one this machine has",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    multiple=True,
    help="Number of threads that copy in a flush; may be given several times.",
    show_default="1, 2, 4 … all cores; 1 and all with --quick",
)
@json_option
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rows to FILE as comma-separated values.",
    metavar="FILE",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw the plots into DIR, as PNG and SVG.",
    metavar="DIR",
)
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    nargs=2,
    metavar="A.json B.json",
    help="Measure nothing; set two reports that --json wrote side by side.",
)
@foreseen
def bench(
    dirty: int | None,
    network: float | None,
    quick: bool,
    full: bool,
    warm: bool,
    ram: tuple[int, ...],
    rounds: int | None,
    backings: tuple[str, ...],
    threads: tuple[int, ...],
    as_json: bool,
    csv_file: Path | None,
    plots: Path | None,
    compare: tuple[Path, Path] | None,
) -> None:
    """Measure what a flush costs on this machine, or how long a VM stands still: --dirty 4G --network 10G.

    Every result is checked and set beside the machine's own peak copy bandwidth and QEMU's way of flushing, measured
    in the same rounds on the same memory. Huge pages that the run reserves (as root) are given back at its end.
    Exit status 0: every timed copy brought the right bytes, and no others.
    """
    from rich.console import Console

    from colocache.measure import answer as answers
    from colocache.measure import compare as comparing
    from colocache.measure import files, report
    from colocache.measure import host as machine
    from colocache.measure import plots as drawing
    from colocache.measure.session import Plan, Session
    from colocache.measure.standstill import Standstill

    # A table takes the width of the terminal, or of COLUMNS; in a pipe there is room for all its columns.
    console = Console(width=None if Console().is_terminal or "COLUMNS" in os.environ else PIPE_WIDTH)
    if compare:
        found = comparing.compare(files.read_json(compare[0]), files.read_json(compare[1]), console)
        if as_json:
            print_json(found)
        return
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other")
    if plots:
        drawing.pyplot()  # before minutes of measuring
    if csv_file and not csv_file.parent.is_dir():
        raise click.UsageError(f"there is no directory {csv_file.parent}")
    if network is not None and dirty is None:
        raise click.UsageError("--network goes with --dirty")
    if dirty is not None and (full or warm or plots or csv_file):
        raise click.UsageError("--dirty excludes --full, --warm, --plots and --csv")
    host = machine.examine()
    plan = Plan(ram, backings, tuple(sorted(set(threads))), rounds or 0, warm, quick, full)
    if dirty is not None:
        with ends_in_order(), progress_bar() as progress:
            answer = Standstill(plan, host, dirty, network, progress).run()
        answers.show(answer, console)
        if as_json:
            print_json(answer.to_json())
        return
    with ends_in_order(), progress_bar() as progress:
        result = Session(plan, host, progress).run()
    report.show(result, console)
    if csv_file:
        files.write_csv(result, csv_file)
        click.echo(f"rows written to {csv_file}", err=True)
    if plots:
        for path in drawing.draw(result, plots):
            click.echo(f"drawn: {path}", err=True)
    if as_json:
        print_json(files.to_json(result))
    if any(row.wrong for row in result.rows):
        sys.exit(1)


@contextlib.contextmanager
def ends_in_order() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: what was borrowed is given back."""

    def stop(_signum: int, _frame: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr if that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _done, _total, _label: None
        return
    columns = (BarColumn(30), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # Drawn only between cells: a thread of its own would disturb what is timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("warming up", total=None)

        def show(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done - 1, total=total, description=label)
            bar.refresh()

        yield show
