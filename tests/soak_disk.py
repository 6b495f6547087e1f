# SPDX-License-Identifier: Apache-2.0
"""A disk for the soak's reference guests, beside their memory: their sides as programs that have one.

Whenever the guest's program comes out at a step boundary, its thread writes a block of the disk, and then another with
the number of steps and a checksum of all others, before it may be known to stand. So a secondary that has loaded a
device state sees by its image alone whether disk and memory are of one epoch; if not, that is a wrong page.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from colocache import children
from colocache.disks.mirrored import MirroredDisks
from colocache.disks.write import Kind, Write
from colocache.replication import child, keeper, mirrors
from colocache.vmm import base, guests
from colocache.vmm.machine import LoadReport
from colocache.vmm.workload import GuestOptions

WHERE = "COLOCACHE_SOAK_DISK"  # in the environment of a secondary: the path of its image
BLOCK = 4096
N_BLOCKS = 64
SIZE = N_BLOCKS * BLOCK
RECORD = struct.Struct("<QI")  # steps of the machine, checksum of the blocks after the first
WRONG = ("the disk", 0)


class Disk:
    """Of a primary's machine."""

    sizes = (SIZE,)

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self._put(0, RECORD.pack(0, zlib.crc32(memoryview(self.data)[BLOCK:])))
        self.mirrored: MirroredDisks | None = None

    def _put(self, block: int, head: bytes) -> Write:
        data = head + os.urandom(BLOCK - len(head))
        self.data[block * BLOCK : (block + 1) * BLOCK] = data
        return Write(0, Kind.WRITE, block * BLOCK, BLOCK, data)

    def stepped(self, steps: int) -> None:
        """In the guest's thread."""
        assert self.mirrored is not None
        self.mirrored.write(self._put(1 + steps % (N_BLOCKS - 1), b""))
        self.mirrored.write(self._put(0, RECORD.pack(steps, zlib.crc32(memoryview(self.data)[BLOCK:]))))


class Mirrors(mirrors.NoMirrors):
    """What QEMU's mirror jobs do, for such a disk."""

    def __init__(self, disk: Disk, mirrored: MirroredDisks, *_: Any, **__: Any) -> None:
        self.disks = self._mirrored = disk.mirrored = mirrored
        self._disk = disk

    def connected(self, send: Callable[[Write], None], *, fresh: bool, limit_bytes: int) -> None:
        self._mirrored.connect(send, limit_bytes=limit_bytes)
        for offset, length in [(0, SIZE)] if fresh else self._mirrored.unacked_runs(0):
            self._mirrored.send_again(0, offset, length, lambda at, n: self._disk.data[at : at + n])

    def disconnected(self) -> None:
        self._mirrored.disconnect()


def is_of(image: bytes, steps: int) -> bool:
    """Is this the disk of a machine that has done so many steps?"""
    return RECORD.unpack_from(image) == (steps, zlib.crc32(memoryview(image)[BLOCK:]))


def main() -> None:
    """`colocache primary` or `secondary`, with a disk."""
    disk = Disk()
    real = base.ReferenceMachine._enter_and_tell

    def entered(machine: base.ReferenceMachine) -> None:
        before = machine.steps
        real(machine)
        if machine.steps != before and disk.mirrored is not None:
            disk.stepped(machine.steps)

    base.ReferenceMachine._enter_and_tell = entered  # type: ignore[method-assign]
    guests.disks_of_machine = lambda _machine: disk  # type: ignore[assignment,return-value]
    mirrors.Mirrors = Mirrors  # type: ignore[assignment,misc]
    keeper.python_command = lambda *_: children.python_command("soak_disk", "as_child")  # type: ignore[attr-defined]
    from colocache import cli

    cli.main()


def as_child() -> None:
    """The process that runs a secondary's machine, with a disk."""
    path = os.environ[WHERE]
    real = base.ReferenceMachine.load_device_state

    def load(machine: base.ReferenceMachine, state: memoryview | bytes) -> LoadReport:
        report = real(machine, state)
        if is_of(Path(path).read_bytes(), machine.steps):
            return report
        return replace(report, wrong_pages=(*report.wrong_pages, WRONG))

    base.ReferenceMachine.load_device_state = load  # type: ignore[method-assign]
    child.GuestOptions = lambda **given: GuestOptions(**{**given, "disks": (path,)})  # type: ignore[assignment,misc]
    child.main()
