# SPDX-License-Identifier: Apache-2.0
"""`colocache clean`: removes the shared memory that killed runs left behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from colocache.commands.options import foreseen, json_option, print_json


@click.command()
@click.argument("name", required=False)
@click.option(
    "--disk-log",
    "folders",
    multiple=True,
    metavar="FOLDER",
    help="Also remove from FOLDER the logs of disk writes whose regions are not on this machine any more, as after a "
    "restart of it, and images of killed demos.",
)
@json_option
@foreseen
def clean(name: str | None, folders: tuple[str, ...], as_json: bool) -> None:
    """Remove region NAME, or every region, that no process owns or holds, with its logs of disk writes.

    Without NAME, the folders that killed processes left in the temporary directory go too. What a live process owns is
    left and named. Exit status 0: nothing that was asked for is left.
    """
    import colocache
    from colocache.disk_files import remove_lost_logs
    from colocache.scratch import remove_abandoned

    report = colocache.clean(name)
    scratch = [] if name is not None else remove_abandoned()
    for folder in folders:
        scratch += remove_abandoned(Path(folder))
    for path in scratch:
        click.echo(f"removed {path}: the folder of a killed process")
    here = [region.name for region in colocache.list_regions()]
    logs = [path for folder in folders for path in remove_lost_logs(folder, here)]
    for path in logs:
        click.echo(f"removed {path}: the log of a region that is gone")
    if not (scratch or logs) or report.removed or report.busy:
        click.echo(str(report))
    if as_json:
        print_json(
            {
                "removed": [_region(region) for region in report.removed],
                "folders": [str(folder) for folder in scratch],
                "logs": [str(path) for path in logs],
                "busy": [{"name": region, "reason": reason} for region, reason in report.busy],
            }
        )
    if name is not None and report.busy:
        raise SystemExit(1)


def _region(region: Any) -> dict[str, Any]:
    made = dataclasses.asdict(region)
    made["files"] = [str(path) for path in region.files]
    return made
