# SPDX-License-Identifier: Apache-2.0
"""`colocache inspect`: what a control region says, without lock and without a write."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from colocache.commands.options import foreseen, json_option, print_json


@click.command()
@click.argument("name", required=False)
@click.option("--disk", "disks", multiple=True, metavar="FILE", help="Tell whose disk FILE was, instead of a region.")
@json_option
@foreseen
def inspect(name: str | None, disks: tuple[str, ...], as_json: bool) -> None:
    """Show the control region NAME with its disks; without NAME, all regions of this machine.

    Takes no lock and writes nothing: a secondary that runs is not disturbed.
    """
    import colocache
    from colocache.errors import ColocacheError

    if disks:
        marks = [_disk(path) for path in disks]
        if as_json:
            print_json({"disks": marks})
        return
    if name is not None:
        found = colocache.inspect(name)
        click.echo(f"region {name}: {found}{_spill_file(name)}")
        fields = _fields(name, found)
        click.echo(
            f"Next, if its owner (process {found.status.owner_pid}) is dead: "
            f"colocache secondary --attach --name {name} --listen ADDRESS"
        )
        if as_json:
            print_json(fields)
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


def _disk(path: str) -> dict[str, Any]:
    """What a disk's file says of itself."""
    from colocache.disks.mark import can_read, read_mark

    mark = read_mark(path)
    if mark is None:
        why = "nothing tells whose it was" if can_read(path) else "it can't be read"
        click.echo(f"{path}: {why}")
    else:
        click.echo(f"{path} {mark}")
    return {"path": path, "mark": mark.as_json() if mark else None}


def _of_disks(name: str, found: Any) -> dict[str, Any]:
    """The images and logs of a region, as its keeper wrote them down."""
    from colocache.disk_files import disk_files

    files = disk_files(name)
    if files is None:
        return {}
    status = found.status
    logs = []
    for slot, path in enumerate(files.logs):
        sealed = bool(status.sealed_epoch) and slot == status.attachment_slot
        what = f"sealed, {status.attachment_bytes} bytes of epoch {status.sealed_epoch}" if sealed else "open"
        click.echo(f"log {path}: {what}")
        logs.append({"path": path, "sealed": sealed, "bytes": status.attachment_bytes if sealed else None})
    return {"images": [_disk(path) for path in files.images], "logs": logs}


def _fields(name: str, found: Any) -> dict[str, Any]:
    from colocache.regions import spill_file

    status = dataclasses.asdict(found.status)
    status["history_id"] = found.status.history_id.hex()
    status["phase"] = found.status.phase.name.lower()
    path = spill_file(name)
    return {
        "name": name,
        **status,
        "spill_file": str(path) if path else None,
        "blocks": [dataclasses.asdict(block) for block in found.blocks],
        "disks": _of_disks(name, found),
    }


def _spill_file(name: str) -> str:
    from colocache.regions import spill_file

    path = spill_file(name)
    if path is None:
        return ""
    try:
        return f"\n  spill file {path}: {path.stat().st_blocks * 512} bytes on its disk"
    except OSError:
        return f"\n  spill file {path}, which is gone"
