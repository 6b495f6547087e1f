# SPDX-License-Identifier: Apache-2.0
"""The lesson's guest: a machine without a CPU, whose writes are told to it and whose registers are a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from colocache import BlockSpec, bitmap
from colocache.errors import ArgumentError
from colocache.teach import tags
from colocache.vmm.machine import LoadReport, MarkDirty, Ram, VerifyReport
from colocache.vmm.workload import GuestOptions

if TYPE_CHECKING:
    from colocache import Cache, Sender

BLOCK = "ram"


class ScriptedGuest:
    """A Machine of one block. `write` is what its guest does, `log` what a hypervisor's dirty log would say."""

    kind = "scripted"
    failure: str | None = None
    dirty_source = "own"

    def __init__(
        self, rams: Sequence[Ram], options: GuestOptions | None = None, mark_dirty: MarkDirty | None = None
    ) -> None:
        if len(rams) != 1:
            raise ArgumentError(f"the lesson's guest has one block of RAM, not {len(rams)}")
        del options, mark_dirty  # it has no work of its own, and no devices that write
        self._n_pages = rams[0].n_pages
        self.log: set[int] = set()
        self.registers = "registers of a guest that has not begun"
        self.steps = 0

    @classmethod
    def trouble(cls) -> tuple[str, str] | None:
        """It runs everywhere."""
        return None

    @classmethod
    def blocks_for(cls, ram_bytes: int) -> tuple[BlockSpec, ...]:
        """One block."""
        return (BlockSpec(BLOCK, ram_bytes, tags.PAGE_BYTES),)

    def private_bytes(self) -> int:
        """The lesson counts them itself."""
        return 0

    def give_up_private(self) -> None:
        """The lesson sets no limit that would want it."""

    def write(self, image: tags.Pages, pfns: list[int], who: str, epoch: int) -> None:
        """Stamp these pages, on the way to `epoch`."""
        tags.stamp(image, pfns, who, epoch)
        self.log.update(pfns)
        self.steps += 1

    def boot(self) -> None:
        """Nothing but what it is told."""

    def resume(self) -> None:
        """It writes when it is told to."""

    def pause(self) -> None:
        """It stands anyhow."""

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        """Get and clear."""
        words, self.log = bitmap.from_pfns(self.log, self._n_pages), set()
        target.sync_words(0, words)

    def discard_dirty_log(self) -> None:
        """Get, clear and throw away."""
        self.log = set()

    @property
    def powered_off(self) -> bool:
        """Never."""
        return False

    @property
    def identity(self) -> str:
        """Its kind says it all."""
        return self.kind

    def promoted(self) -> None:
        """It is what it was."""

    def fold(self, cache: Cache, block: int, first_pfn: int, n_pages: int) -> int:
        """See machine.Machine."""
        return cache.fold(block, first_pfn, n_pages)

    def dirty_hint(self) -> int:
        """Exactly."""
        return len(self.log)

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        """A line of text."""
        del with_hashes  # the lesson compares every page itself
        return self.registers.encode()

    def check_device_state(self, state: memoryview | bytes) -> None:
        """Any text will do."""
        bytes(state).decode()

    def rehearse(self, state: bytes) -> None:
        """There is no hurry."""

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        """Become that line of text."""
        self.registers = bytes(state).decode()
        return LoadReport(0, (), 0)

    def verify(self) -> VerifyReport:
        """The lesson's judge does that."""
        return VerifyReport(0, (), 0.0)

    def close(self) -> None:
        """Nothing is held."""
