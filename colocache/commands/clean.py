# SPDX-License-Identifier: Apache-2.0
"""`colocache clean`: removes the shared memory that killed runs left behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from colocache.commands.options import foreseen, json_option, print_json


@click.command()
@click.argument("name", required=False)
@json_option
@foreseen
def clean(name: str | None, as_json: bool) -> None:
    """Remove region NAME, or every region, that no process owns or holds.

    Without NAME, the folders that killed processes left in the temporary directory go too. What a live process owns is
    left and named. Exit status 0: nothing that was asked for is left.
    """
    import colocache
    from colocache.scratch import remove_abandoned

    report = colocache.clean(name)
    folders = remove_abandoned() if name is None else []
    for folder in folders:
        click.echo(f"removed {folder}: the folder of a killed process")
    if not folders or report.removed or report.busy:
        click.echo(str(report))
    if as_json:
        print_json(
            {
                "removed": [_region(region) for region in report.removed],
                "folders": [str(folder) for folder in folders],
                "busy": [{"name": region, "reason": reason} for region, reason in report.busy],
            }
        )
    if name is not None and report.busy:
        raise SystemExit(1)


def _region(region: Any) -> dict[str, Any]:
    made = dataclasses.asdict(region)
    made["files"] = [str(path) for path in region.files]
    return made
