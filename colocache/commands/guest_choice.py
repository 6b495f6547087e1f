# SPDX-License-Identifier: Apache-2.0
"""The guest that a command was asked for: its kind, its options, its size, and what its memory is made of."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from colocache import BlockSpec
    from colocache.vmm.workload import GuestOptions

MAC = re.compile(r"[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}")
QEMU_BACKINGS = ("thp", "shm")  # a private copy of a huge page would be 2 MiB


@dataclass(frozen=True)
class GuestChoice:
    """`why` says in one sentence why it is this kind; `memory_mode` is of a secondary."""

    kind: str
    why: str
    options: GuestOptions
    blocks: tuple[BlockSpec, ...]
    backing: str
    memory_mode: str

    @property
    def as_json(self) -> dict[str, Any]:
        """The options, for a process that is told them in JSON."""
        return asdict(self.options)


def _card(given: dict[str, Any]) -> str:
    """The MAC address of the guest's card: one for both sides, by the pair's name if none is given."""
    if not given.get("net"):
        return ""
    if given["mac"]:
        if not MAC.fullmatch(given["mac"]):
            raise click.UsageError(f"--mac {given['mac']}: give six bytes as in 52:54:00:12:34:56, the first one even")
        return str(given["mac"])
    last = hashlib.sha256(given["pair"].encode()).digest()[:3]
    return "52:54:00:" + last.hex(":")


def chosen_guest(given: dict[str, Any]) -> GuestChoice:
    """By the options of options.guest_options. click.UsageError, ArgumentError, MachineError."""
    from colocache.vmm.guests import blocks_for, guest_kind_available
    from colocache.vmm.workload import GuestOptions

    kind, why = guest_kind_available(given["guest"])
    command, backing, ram_bytes = tuple(given["command"]), given["backing"], given["ram"]
    memory_mode = given.get("memory_mode")
    if kind == "qemu":
        if memory_mode == "mirror":
            raise click.UsageError(
                "--guest qemu and --memory mirror: a QEMU that dies while it loads a device state would have written "
                "the image, and its load's writes would be in no log; --memory bounded keeps them apart"
            )
        memory_mode = "bounded"
        if backing not in ("auto", *QEMU_BACKINGS):
            raise click.UsageError(
                f"--guest qemu and --backing {backing}: each page that a secondary writes would be a copy of 2 MiB; "
                f"give {' or '.join(QEMU_BACKINGS)}"
            )
        backing = "shm" if backing == "auto" else backing
        if command:
            from colocache.vmm.qemu.command_line import read_command_line

            ram_bytes = read_command_line(command).ram_bytes
        if given.get("disks") and not command:
            raise click.UsageError("--disk needs a guest that uses it: give QEMU's ARGS after `--`")
        if given.get("net") and not command:
            raise click.UsageError("--net needs a guest with a driver for its card: give QEMU's ARGS after `--`")
    elif given.get("disks"):
        raise click.UsageError(f"--disk is for --guest qemu, not for {kind}")
    elif given.get("net"):
        raise click.UsageError(f"--net is for --guest qemu, not for {kind}")
    elif command:
        raise click.UsageError(f"a command line after `--` is for --guest qemu, not for {kind}")
    options = GuestOptions(
        working_set_bytes=given["working_set"],
        steps_per_second=given["steps_per_second"],
        command=command,
        accel=given["accel"],
        console=given["console"],
        net=given.get("net", ""),
        card=_card(given),
        disks=given.get("disks", ()),
        disk_log=given.get("disk_log", ""),
    )
    return GuestChoice(kind, why, options, blocks_for(ram_bytes, kind), backing, memory_mode or "mirror")
