# SPDX-License-Identifier: Apache-2.0
"""`colocache record`: a run of the reference machines at scale, as a heat map of pages and epochs and as a file."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from colocache.commands.options import (
    backing_option,
    foreseen,
    guest_kind_option,
    json_option,
    print_json,
    seconds_option,
    size_option,
    steps_option,
)
from colocache.teach.machines import HeatRecording, RunOptions, record_run
from colocache.writing import write_file

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog="The format of --export is described in `python -m pydoc colocache.teach.machines`.")
@click.argument("png", type=FILE, required=False)
@click.option("--export", type=FILE, help="Also write the recording as JSON, for figures of your own.")
@guest_kind_option
@size_option("--ram", default="64M", show_default=True, help="Size of guest RAM; three times as much memory is used.")
@size_option(
    "--working-set", default="0", show_default="half of guest RAM", help="How much of guest RAM the guest writes."
)
@steps_option
@backing_option
@click.option(
    "--checkpoints",
    type=click.IntRange(1, 10000),
    default=30,
    show_default=True,
    help="How many checkpoints are taken.",
)
@seconds_option("--interval", default=0.05, help="Time between two checkpoints.")
@json_option
@foreseen
def record(
    png: Path | None, export: Path | None, guest: str, ram: int, working_set: int, steps_per_second: float,
    backing: str, checkpoints: int, interval: float, as_json: bool,
) -> None:  # fmt: skip
    """Run a pair of reference machines and draw a heat map of pages and epochs as PNG.

    Both machines run in this process on the real engine, each its own way. At each checkpoint both bitmaps are read
    before the seal, and after the flush every page is compared with the primary's. Exit status 0: no page was wrong.
    """
    if png is None and export is None:
        raise click.UsageError("name a PNG to draw (`colocache record heat.png`), a file for --export, or both")
    if png is not None:
        from colocache.teach.heat import need_matplotlib

        need_matplotlib()
    options = RunOptions(guest, backing, ram, working_set or ram // 2, steps_per_second, checkpoints, interval)
    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as bar:
        task = bar.add_task("checkpoints", total=checkpoints)
        recording = record_run(options, lambda number: bar.update(task, completed=number))
    written: dict[Path, bytes] = {}
    if png is not None:
        from colocache.teach.heat import picture

        written[png] = picture(recording)
    if export is not None:
        written[export] = recording.to_json().encode()
    for path, content in written.items():
        write_file(path, content)
    _report(recording, written, as_json=as_json)
    if recording.wrong_pages:
        raise SystemExit(1)


def _report(recording: HeatRecording, written: dict[Path, bytes], *, as_json: bool) -> None:
    verified = sum(epoch.verified_pages for epoch in recording.epochs)
    flushed = [epoch.flushed_pages for epoch in recording.epochs]
    click.echo(
        f"{len(recording.epochs)} checkpoints of a {recording.guest['kind']} guest on {recording.guest['backing']}: "
        f"{sum(flushed)} pages flushed, {verified} verified, {recording.wrong_pages} wrong"
    )
    for path, content in written.items():
        click.echo(f"{path}: {len(content)} bytes")
    if as_json:
        counts = {
            name: sum(getattr(epoch, name) for epoch in recording.epochs)
            for name in ("pvm_pages", "svm_pages", "both_pages", "flushed_pages", "verified_pages", "wrong_pages")
        }
        facts = {**recording.guest, "checkpoints": len(recording.epochs), **counts}
        print_json({**json.loads(json.dumps(facts)), "files": [str(path) for path in written]})
