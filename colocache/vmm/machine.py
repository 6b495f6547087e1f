# SPDX-License-Identifier: Apache-2.0
"""The machine as replication sees it: guest RAM, pause and resume, dirty log, device state, and a check of every page.

    blocks_for(ram_bytes) -> make_machine(kind, rams, options, mark_dirty)
    primary:    boot, resume, [sync_dirty_log ..., pause, sync_dirty_log, save_device_state, resume] ...
    secondary:  discard_dirty_log, [pause, sync_dirty_log, (seal, flush), load_device_state, resume] ...

A machine belongs to one thread; `steps`, `failure` and dirty_hint() may be read from any.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from colocache.errors import ArgumentError
from colocache.vmm.errors import DeviceStateError, MachineError
from colocache.vmm.layout import BOOT, RAM, layout_for
from colocache.vmm.workload import PAGE, GuestOptions

if TYPE_CHECKING:
    from colocache import BlockSpec, Cache, Sender

__all__ = [
    "DeviceStateError",
    "GuestOptions",
    "LoadReport",
    "Machine",
    "MachineError",
    "Ram",
    "VerifyReport",
    "blocks_for",
    "guest_kind_available",
    "make_machine",
]

KINDS = ("auto", "kvm", "process")

MarkDirty = Callable[[int, int, int], None]  # block index, first page, number of pages


@dataclass(frozen=True)
class Ram:
    """A RAM block where it is mapped in this process, readable and writable, until the machine is closed."""

    name: str
    index: int  # of the block, in the Cache or Sender
    page_size: int
    n_pages: int
    addr: int

    @property
    def len_bytes(self) -> int:
        return self.n_pages * self.page_size


@dataclass(frozen=True)
class VerifyReport:
    """Every page of every block against the guest's history. wrong: (name of the block, page) of each wrong page."""

    n_pages: int
    wrong: tuple[tuple[str, int], ...]
    seconds: float

    def __str__(self) -> str:
        first = f", the first is page {self.wrong[0][1]} of {self.wrong[0][0]}" if self.wrong else ""
        return f"{len(self.wrong)} of {self.n_pages} pages wrong{first} ({self.seconds:.2f} s)"


@dataclass(frozen=True)
class LoadReport:
    """What the load of a device state found: pages compared with the hashes in it (0: it carried none) and those wrong.

    verify_ns: time of the comparison, which a reported pause leaves out.
    """

    epoch_hashes_checked: int
    wrong_pages: tuple[tuple[str, int], ...]
    verify_ns: int


class Machine(Protocol):
    """A guest. Made stopped; its RAM is not touched before boot, load_device_state or resume."""

    kind: str  # "kvm" or "process"

    @classmethod
    def blocks_for(cls, ram_bytes: int) -> tuple[BlockSpec, ...]:
        """See blocks_for below."""

    def __init__(self, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> None: ...

    @property
    def steps(self) -> int:
        """Steps done since boot, by this machine and those whose state it loaded. Any thread."""

    @property
    def failure(self) -> str | None:
        """Why the guest runs no more, or None; pause and resume raise MachineError with it. Any thread."""

    @property
    def dirty_source(self) -> str:
        """Who keeps the dirty log: "kvm", "uffd" (the kernel) or "own" (the program itself)."""

    def boot(self) -> None:
        """Primary only: fill the boot block of zeroed RAM. The guest stands at step 0."""

    def resume(self) -> None:
        """Let the guest run, under a fresh random salt that goes into its history. MachineError."""

    def pause(self) -> None:
        """Stop the guest at a step boundary; nothing to do if it stands. Bounded; MachineError."""

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        """Hand what the guest wrote since the last time to target, and clear the log. May run while a primary runs."""

    def discard_dirty_log(self) -> None:
        """Forget what the log holds: before the guest first runs."""

    def dirty_hint(self) -> int:
        """About how many pages the guest wrote since the last sync. Cheap; any thread."""

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        """Everything but RAM; with_hashes: also a hash per page of every block. Only while it stands."""

    def check_device_state(self, state: memoryview | bytes) -> None:
        """Raises DeviceStateError if this machine can't load `state`. Changes nothing; keeps no reference."""

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        """Become the machine `state` is of, whose RAM is here already. If the state carries hashes, every page is
        compared first. Then the device shadow page in RAM is written, and mark_dirty called for it. Only while the
        guest stands; DeviceStateError, with nothing changed.
        """

    def verify(self) -> VerifyReport:
        """Compare every page of every block with what the history says it must hold. Only while the guest stands."""

    def close(self) -> None:
        """Stop the guest for good and give back everything but RAM. May be called twice."""


def blocks_for(ram_bytes: int) -> tuple[BlockSpec, ...]:
    """The RAM blocks of a machine with ram_bytes bytes (a multiple of 4096) in all: "boot", an odd number of pages, and
    "pc.ram", all the rest."""
    from colocache import BlockSpec

    layout = layout_for(ram_bytes)
    return (BlockSpec(BOOT, layout.boot_pages * PAGE, PAGE), BlockSpec(RAM, layout.ram_pages * PAGE, PAGE))


def guest_kind_available(kind: str = "auto") -> tuple[str, str]:
    """(kind, why): the guest that `kind` gives on this machine, "kvm" or "process", and one sentence why.

    "auto" takes kvm where it works. MachineError if kind is "kvm" and it does not, with the command that helps.
    """
    if kind not in KINDS:
        raise ArgumentError(f"a guest of kind {kind!r}: give one of {', '.join(KINDS)}")
    if kind == "process":
        return "process", "a process guest was asked for"
    trouble = kvm_trouble()
    if trouble is None:
        return "kvm", "/dev/kvm works"
    sentence, hint = trouble
    if kind == "kvm":
        raise MachineError(sentence, hint=hint)
    return "process", f"{sentence} ({hint})"


def kvm_trouble() -> tuple[str, str] | None:
    """What keeps a KVM guest from running here and what helps, in a sentence each; None if nothing does."""
    if platform.machine() != "x86_64":
        return f"the KVM guest is x86-64 code and this machine is {platform.machine()}", "use --guest process"
    from colocache.vmm.kvm_api import Kvm, KvmUnusableError

    try:
        Kvm().close()
    except KvmUnusableError as error:
        return error.sentence, error.hint or "use --guest process"
    return None


def make_machine(kind: str, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> Machine:
    """A stopped machine on RAM that is mapped already. `kind`: "auto", "kvm" or "process".

    mark_dirty(block, first_pfn, n_pages) is called after the machine itself wrote guest RAM: Cache.mark_dirty or
    Sender.mark_dirty.
    """
    found, _ = guest_kind_available(kind)
    if found == "kvm":
        from colocache.vmm.kvm import KvmMachine

        return KvmMachine(rams, options, mark_dirty)
    from colocache.vmm.process import ProcessMachine

    return ProcessMachine(rams, options, mark_dirty)


def fresh_salt() -> int:
    """64 random bits that no other machine has."""
    return int.from_bytes(os.urandom(8), "little")
