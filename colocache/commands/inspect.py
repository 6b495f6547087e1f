# SPDX-License-Identifier: Apache-2.0
"""`colocache inspect`: what a control region says, without lock and without a write."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from colocache.commands.options import foreseen, json_option, print_json


@click.command()
@click.argument("name", required=False)
@json_option
@foreseen
def inspect(name: str | None, as_json: bool) -> None:
    """Show the control region NAME; without NAME, all regions of this machine.

    Takes no lock and writes nothing: a secondary that runs is not disturbed.
    """
    import colocache
    from colocache.errors import ColocacheError

    if name is not None:
        found = colocache.inspect(name)
        click.echo(f"region {name}: {found}{_spill_file(name)}")
        click.echo(
            f"Next, if its owner (process {found.status.owner_pid}) is dead: "
            f"colocache secondary --attach --name {name} --listen ADDRESS"
        )
        if as_json:
            print_json(_fields(name, found))
        return
    regions: list[dict[str, Any]] = []
    for region in colocache.list_regions():
        try:
            found = colocache.inspect(region.name)
        except ColocacheError as error:
            click.echo(f"region {region.name}: {error}")
            regions.append({"name": region.name, "error": str(error), "bytes": region.n_bytes})
            continue
        click.echo(f"region {region.name}: {found}{_spill_file(region.name)}")
        regions.append({**_fields(region.name, found), "bytes": region.n_bytes})
    if not regions:
        click.echo("there is no region on this machine")
    if as_json:
        print_json({"regions": regions})


def _fields(name: str, found: Any) -> dict[str, Any]:
    from colocache.regions import spill_file

    status = dataclasses.asdict(found.status)
    status["history_id"] = found.status.history_id.hex()
    status["phase"] = found.status.phase.name.lower()
    path = spill_file(name)
    blocks = [dataclasses.asdict(block) for block in found.blocks]
    return {"name": name, **status, "spill_file": str(path) if path else None, "blocks": blocks}


def _spill_file(name: str) -> str:
    from colocache.regions import spill_file

    path = spill_file(name)
    if path is None:
        return ""
    try:
        return f"\n  spill file {path}: {path.stat().st_blocks * 512} bytes on its disk"
    except OSError:
        return f"\n  spill file {path}, which is gone"
