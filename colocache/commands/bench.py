# SPDX-License-Identifier: Apache-2.0
"""`colocache bench`: what a flush costs on this machine, beside its peak copy bandwidth and QEMU's way."""

from __future__ import annotations

import contextlib
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


class RamSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Guest RAM, as an option that may be given several times."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        n_bytes = value if isinstance(value, int) else parse_size(value)
        if n_bytes < RAM_MIN:
            self.fail(f"a guest of {n_bytes} bytes is too small to measure: give at least {RAM_MIN >> 20}M", param, ctx)
        return n_bytes


@click.command()
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
    show_default="256M, or four times the L3 caches; 128M with --quick",
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
    """Measure what a flush costs on this machine.

    Every result is checked and set beside the machine's own peak copy bandwidth and QEMU's way of flushing, measured
    in the same rounds on the same memory. Huge pages that the run reserves (as root) are given back at its end.
    Exit status 0: every timed copy brought the right bytes, and no others.
    """
    from rich.console import Console

    from colocache.measure import compare as comparing
    from colocache.measure import files, report
    from colocache.measure import host as machine
    from colocache.measure import plots as drawing
    from colocache.measure.session import Plan, Session

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
    host = machine.examine()
    plan = Plan(ram, backings, tuple(sorted(set(threads))), rounds or 0, warm, quick, full)
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
