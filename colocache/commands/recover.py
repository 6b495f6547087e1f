# SPDX-License-Identifier: Apache-2.0
"""`colocache recover`: attach to what a killed secondary left, finish what was sealed, say what was found."""

from __future__ import annotations

import contextlib

import click

from colocache.commands.options import foreseen, json_option, print_json


@click.command()
@click.argument("name")
@json_option
@foreseen
def recover(name: str, as_json: bool) -> None:
    """Attach to region NAME, whose owner died, and finish what was sealed there.

    Says in one line what state it found and what it did. The region stays, for
    `colocache secondary --attach`; it may be recovered again at any time. Exit status 0: the region was attached, what
    was sealed there is finished, and every invariant of it holds.
    """
    from colocache import Cache, Memory

    with contextlib.closing(Memory.open(name)) as memory, Cache.attach(memory) as cache:
        recovery, status = cache.recovery, cache.status()
        cache.validate()
    if recovery is None:
        raise click.ClickException(f"region {name} was attached but says nothing of its recovery")
    click.echo(recovery.sentence)
    click.echo(f"Next: colocache secondary --attach --name {name} --listen ADDRESS")
    if as_json:
        print_json(
            {
                "name": name,
                "action": recovery.action.name.lower(),
                "epoch": recovery.epoch,
                "receiving_epoch": recovery.receiving_epoch,
                "pages": recovery.n_pages,
                "sentence": recovery.sentence,
                "restartable": recovery.action.name in ("REPLAYED", "RESTART"),
                "history_id": status.history_id.hex(),
            }
        )
