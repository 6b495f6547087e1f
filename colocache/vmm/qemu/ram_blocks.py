# SPDX-License-Identifier: Apache-2.0
"""The RAM blocks of a QEMU beside guest memory: firmware, option ROMs, the tables that it gives the firmware.

They lie in no image. What a fresh process has in them is the same on both sides (description.py), and a process that
waits for a state is given it (its firmware would be all zero). Pages that are another while a guest runs are carried
with each epoch. A machine with a block of any other kind is refused by the name of that block: a guest could write it,
and its secondary would not have it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from weakref import WeakKeyDictionary

import numpy as np

from colocache.vmm.qemu import inside, memory_access
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.page_hashes import buffer_hashes
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.state import CarriedPage
from colocache.vmm.qemu.wiring import RAM_ID
from colocache.vmm.workload import PAGE

# As shell patterns. QEMU makes ACPI tables, in blocks /rom@, anew when the firmware asks for them after a reset.
CARRIED = ("/rom@*", "pc.rom")
CONSTANT = ("pc.bios", "system.flash*", "*.rom")  # no guest can write them: compared when a pair meets, and by --verify
LEN_BYTES_MAX = 64 << 20  # of all together
LINE = re.compile(
    r"^\s*(\S+)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x[0-9a-f]+(?:\s+0x([0-9a-f]+))?", re.MULTILINE
)


@dataclass(frozen=True)
class RamBlock:
    """Where it lies in its process; `len_bytes` are used."""

    name: str
    len_bytes: int
    address: int


@dataclass(frozen=True)
class Content:
    """What a block holds in a fresh process."""

    name: str
    data: bytes

    @property
    def n_pages(self) -> int:
        return len(self.data) // PAGE


_known: WeakKeyDictionary[QemuProcess, tuple[RamBlock, ...]] = WeakKeyDictionary()  # they stay where they are


def all_blocks(process: QemuProcess) -> tuple[tuple[str, int], ...]:
    """Name and bytes used of each, guest memory too."""
    return tuple((name, int(used, 16)) for name, used, _ in LINE.findall(process.monitor("info ramblock")))


def other_blocks(process: QemuProcess) -> tuple[RamBlock, ...]:
    """Those beside guest memory. QemuError: one can't be part of a pair, or QEMU does not say where they are."""
    if process not in _known:
        _known[process] = _look(process)
    return _known[process]


def _look(process: QemuProcess) -> tuple[RamBlock, ...]:
    told = LINE.findall(process.monitor("info ramblock"))
    if all(address for _, _, address in told):
        found = [RamBlock(name, int(used, 16), int(address, 16)) for name, used, address in told]
    else:  # before version 8
        found = [RamBlock(*one) for one in process.ask_inside(inside.ram_blocks)]
    others = tuple(sorted((one for one in found if one.name != RAM_ID), key=lambda one: one.name))
    for one in others:
        if not _is(one, CARRIED + CONSTANT):
            raise QemuError(
                f"this machine has memory of its own beside guest memory, RAM block {one.name} of {one.len_bytes} "
                "bytes, which its secondary would not have",
                hint="leave out the device that it belongs to",
            )
        if one.len_bytes % PAGE:
            raise QemuError(f"RAM block {one.name} has {one.len_bytes} bytes, which are no whole pages of {PAGE}")
    if sum(one.len_bytes for one in others) > LEN_BYTES_MAX:
        raise QemuError(f"the RAM blocks beside guest memory have more than {LEN_BYTES_MAX} bytes together")
    return others


def _is(block: RamBlock, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(block.name, pattern) for pattern in patterns)


def contents(process: QemuProcess) -> tuple[Content, ...]:
    """What each holds now."""
    return tuple(Content(one.name, _read(process, one)) for one in other_blocks(process))


def _read(process: QemuProcess, block: RamBlock) -> bytes:
    return bytes(memory_access.read(process.pid, block.address, block.len_bytes))


class Changing:
    """The pages of them that may become other than in a fresh process while the guest of `process` runs."""

    def __init__(self, process: QemuProcess, fresh: Sequence[Content]) -> None:
        self.process = process
        self._blocks = []  # its number and address, what it holds in a fresh process, and room for what it holds now
        for number, (block, content) in enumerate(zip(_same(process, fresh), fresh, strict=True)):
            if _is(block, CARRIED):
                before = np.frombuffer(content.data, dtype="<u8")
                self._blocks.append((number, block.address, before, np.empty_like(before)))
        self._room = [(address, now.data.cast("B")) for _, address, _, now in self._blocks]

    def now(self) -> tuple[CarriedPage, ...]:
        """Those that are other. The machine stands, and waits for this."""
        memory_access.read_into(self.process.pid, self._room)
        found = []
        for number, _, before, now in self._blocks:
            for page in np.flatnonzero((before != now).reshape(-1, PAGE // 8).any(axis=1)):
                found.append(CarriedPage(number, int(page), now[page * PAGE // 8 :][: PAGE // 8].tobytes()))
        return tuple(found)


def fill(process: QemuProcess, fresh: Sequence[Content]) -> None:
    """What a fresh process holds goes into one that waits for a state."""
    for block, content in zip(_same(process, fresh), fresh, strict=True):
        memory_access.write(process.pid, block.address, content.data)


def put(process: QemuProcess, pages: Sequence[CarriedPage]) -> None:
    """An epoch's pages go into a process that was filled. Their numbers were checked."""
    blocks = other_blocks(process)
    for page in pages:
        memory_access.write(process.pid, blocks[page.block].address + page.page * PAGE, page.data)


def hashes(process: QemuProcess) -> np.ndarray:
    """One for each page of each of them."""
    return np.concatenate([buffer_hashes(_read(process, one)) for one in other_blocks(process)] or [np.empty(0, "u8")])


def _same(process: QemuProcess, fresh: Sequence[Content]) -> tuple[RamBlock, ...]:
    """The blocks of `process`, which must be those of a fresh one."""
    blocks = other_blocks(process)
    if [(one.name, one.len_bytes) for one in blocks] != [(one.name, len(one.data)) for one in fresh]:
        raise QemuError(
            f"QEMU (process {process.pid}) has RAM blocks {', '.join(f'{b.name} ({b.len_bytes})' for b in blocks)}, "
            f"and another of this machine {', '.join(f'{c.name} ({len(c.data)})' for c in fresh)}"
        )
    return blocks
