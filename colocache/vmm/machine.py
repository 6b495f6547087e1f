# SPDX-License-Identifier: Apache-2.0
"""The machine as replication sees it: guest RAM, pause and resume, dirty log, device state, and a check of every page.

    guests.make_machine(kind, rams, options, mark_dirty), on RAM of the blocks that the kind's blocks_for names
    primary:    boot, resume, [sync_dirty_log ..., pause, sync_dirty_log, save_device_state, resume] ...
    secondary:  discard_dirty_log, [pause, sync_dirty_log, (seal, flush), load_device_state, resume] ...

A machine belongs to one thread; `steps`, `failure` and dirty_hint() may be read from any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from colocache.vmm.workload import GuestOptions

if TYPE_CHECKING:
    from colocache import BlockSpec, Cache, Sender

REHEARSE_BYTES_MAX = 64 << 10  # a longer state is not worth it: it is the bytes that take the time
MarkDirty = Callable[[int, int, int], None]  # block index, first page, number of pages
OnOutput = Callable[[bytes], None]


@dataclass(frozen=True)
class Ram:
    """A RAM block where it is mapped in this process, readable and writable, until the machine is closed."""

    name: str
    index: int  # of the block, in the Cache or Sender
    page_size: int
    n_pages: int
    addr: int
    fd: int = -1  # of the file that begins with it, open until the machine is closed; -1: not told
    private: bool = False  # bounded memory: what the guest writes here is forgotten by the flush, so nobody logs it

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

    kind: str  # its name in guests.py

    @classmethod
    def trouble(cls) -> tuple[str, str] | None:
        """What keeps this kind of guest from running here and what helps, in a sentence each; None if nothing does."""

    @classmethod
    def blocks_for(cls, ram_bytes: int) -> tuple[BlockSpec, ...]:
        """The RAM blocks of a guest with ram_bytes bytes in all. ArgumentError: it has no such size."""

    def __init__(self, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> None: ...

    @property
    def steps(self) -> int:
        """Steps done since boot, by this machine and those whose state it loaded. Any thread."""

    @property
    def failure(self) -> str | None:
        """Why the guest runs no more, or None; pause and resume raise MachineError with it. Any thread."""

    @property
    def powered_off(self) -> bool:
        """Whether the guest switched its machine off: it stands for good, and can still be saved. Any thread."""

    @property
    def identity(self) -> str:
        """What both machines of a pair must have in common, as printable text of at most 256 bytes."""

    @property
    def dirty_source(self) -> str:
        """Who keeps the dirty log: "kvm", "uffd" (the kernel), "own" (the program), "none" (private memory)."""

    def boot(self) -> None:
        """Primary only: fill the boot block of zeroed RAM. The guest stands at step 0."""

    def resume(self) -> int | None:
        """Let the guest run, under a fresh random salt that goes into its history. MachineError.

        CLOCK_MONOTONIC in ns since when it runs, if that is only known later; None: it runs since now.
        """

    def pause(self) -> int | None:
        """Stop the guest at a step boundary; nothing to do if it stands. All that it said was handed to on_output when
        this is back. Bounded; MachineError.

        CLOCK_MONOTONIC in ns since when it stands, if more than that was done meanwhile; None: it stands since now.
        """

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        """Hand what the guest wrote since the last time to target, and clear the log. May run while a primary runs."""

    def discard_dirty_log(self) -> None:
        """Forget what the log holds: before the guest first runs."""

    def dirty_hint(self) -> int:
        """About how many pages the guest wrote since the last sync. Cheap; any thread."""

    def private_bytes(self) -> int:
        """Bounded memory: what its private pages take now, as the kernel counts them. Any thread; SystemCallError."""

    def give_up_private(self) -> None:
        """Bounded memory, while it stands: its private pages go, and it is no machine until it loads a state."""

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        """Everything but RAM; with_hashes: also a hash per page of every block. Only while it stands."""

    def check_device_state(self, state: memoryview | bytes) -> None:
        """Raises DeviceStateError if this machine can't load `state`. Changes nothing; keeps no reference."""

    def rehearse(self, state: bytes) -> None:
        """Any time, with an earlier state: go through what save and check do, so that their code is in the CPU's caches
        while the machine stands. Cold, after 50 ms of sleep, it takes ten to twenty times as long. Changes nothing.
        """

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        """Become the machine `state` is of, whose RAM is here already. If the state carries hashes, every page is
        compared first. Then the device shadow page in RAM is written, and mark_dirty called for it. Only while the
        guest stands; DeviceStateError, with nothing changed.
        """

    def promoted(self) -> None:
        """This machine, a secondary's, is the one that the world sees from now on. Before it is resumed for that."""

    def fold(self, cache: Cache, block: int, first_pfn: int, n_pages: int) -> int:
        """After a takeover on bounded memory: what it wrote of these pages becomes the image's, over which it goes on;
        how many bytes that was. Only while it stands."""

    def verify(self) -> VerifyReport:
        """Compare every page of every block with what the history says it must hold. Only while the guest stands."""

    def close(self) -> None:
        """Stop the guest for good and give back everything but RAM. May be called twice."""


class SpeakingMachine(Machine, Protocol):
    """One whose guest has a console: those of guests.py.

    What the guest says is handed to on_output, in any thread, once it is set, and each packet of its card to on_packet;
    while output_full() says so, the guest is held up. on_reborn is called when what it said is of no machine any more.
    """

    on_output: OnOutput | None
    on_packet: OnOutput | None
    output_full: Callable[[], bool]
    on_reborn: Callable[[], None]

    @property
    def hears(self) -> bool:
        """Whether its guest's console takes input."""

    def give_input(self, data: bytes) -> int:
        """The guest's console takes this: how many bytes of it, which may be none. Never waits. Any thread."""

    def take_input_back(self) -> bytes:
        """What it was given and its devices have not taken in: they never will. Any thread."""

    def give_packet(self, packet: bytes) -> None:
        """The network card of the guest receives this; without one, nothing happens. Any thread."""
