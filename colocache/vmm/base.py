# SPDX-License-Identifier: Apache-2.0
"""What the KVM guest and the process guest have in common: all but how the program is entered and logged."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from colocache.errors import ArgumentError, ClosedError, OrderError
from colocache.vmm._native import ffi, lib
from colocache.vmm.device_state import DeviceState, Shape, hash_bytes, pack, parse
from colocache.vmm.errors import MachineError
from colocache.vmm.history import TIDY_ENTRIES, History, Words, consult, mix, wrong_pages
from colocache.vmm.layout import BOOT, RAM, boot_image, layout_for, shadow_words
from colocache.vmm.machine import LoadReport, MarkDirty, OnOutput, Ram, VerifyReport
from colocache.vmm.mailbox import Mailbox
from colocache.vmm.runner import GuestThread
from colocache.vmm.workload import PAGE, GuestOptions, workload_for

if TYPE_CHECKING:
    from colocache import BlockSpec, Cache, Sender


FULL_SECONDS = 0.002  # between two looks whether there is room for what the guest says


def program_bytes() -> bytes:
    """The guest program's machine code in this build."""
    length = ffi.new("uint64_t *")
    text = lib.guest_program_text(length)
    return bytes(ffi.buffer(text, length[0]))


def fresh_salt() -> int:
    """64 random bits that no other machine has."""
    return int.from_bytes(os.urandom(8), "little")


def view_of(ram: Ram) -> Words:
    """The block's memory as words, shape (n_pages, 512), writable; valid while it stays mapped."""
    memory = ffi.buffer(ffi.cast("char *", ram.addr), ram.len_bytes)
    words: Words = np.frombuffer(memory, dtype=np.uint64).reshape(ram.n_pages, PAGE // 8)
    return words


class ReferenceMachine(ABC):
    """See machine.Machine for what each method promises."""

    kind = ""

    def __init__(self, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> None:
        if [ram.name for ram in rams] != [BOOT, RAM] or any(ram.page_size != PAGE for ram in rams):
            raise ArgumentError(f"the machine takes {BOOT} and {RAM} with pages of {PAGE} bytes, not {list(rams)}")
        self.boot_ram, self.ram = rams
        self.layout = layout_for(sum(ram.len_bytes for ram in rams))
        if (self.layout.boot_pages, self.layout.ram_pages) != (self.boot_ram.n_pages, self.ram.n_pages):
            raise ArgumentError(
                f"blocks of {self.boot_ram.n_pages} and {self.ram.n_pages} pages: blocks_for gives "
                f"{self.layout.boot_pages} and {self.layout.ram_pages}"
            )
        self._mark_dirty = mark_dirty
        self._options = options
        self._boot_image = boot_image(self.layout, program_bytes())
        blocks = tuple((ram.name, ram.n_pages, ram.page_size) for ram in rams)
        self._shape = Shape(self.kind, hash_bytes(self._boot_image.tobytes()), blocks)
        self._work = workload_for(options, self.layout.ram_pages, self.layout.split_page)
        self._history = History()
        self._shadow = (0, 0)  # loads of a device state so far, and what the newest drew
        self._resumes = 0
        self._synced_stores = 0
        self._tidy_at = TIDY_ENTRIES
        self.on_output: OnOutput | None = None
        self.on_packet: OnOutput | None = None
        self.output_full: Callable[[], bool] = lambda: False
        self.on_reborn: Callable[[], None] = lambda: None
        self._told = 0  # the step up to which on_output was told
        self._ready = False
        self._checked: tuple[bytes, DeviceState] | None = None  # the newest state looked at, and what it says
        self._closed = False
        self._mailbox = Mailbox()
        self._mailbox.set_work(self._work)
        self._thread = GuestThread(
            self._mailbox, self._enter_and_tell, self._kick, options.steps_per_second, f"guest-{self.kind}"
        )

    # ---- what differs ------------------------------------------------------------------------------------------

    @abstractmethod
    def _enter(self) -> None:
        """Run the program until it comes out at a step boundary. In the guest's thread."""

    @abstractmethod
    def _kick(self) -> None:
        """Get the guest's thread out of the guest for a moment. Any thread."""

    @abstractmethod
    def _save_registers(self) -> bytes: ...

    @abstractmethod
    def _check_registers(self, registers: bytes) -> None:
        """Raises DeviceStateError if this machine can't take them."""

    @abstractmethod
    def _load_registers(self, registers: bytes) -> None: ...

    @abstractmethod
    def sync_dirty_log(self, target: Cache | Sender) -> None: ...

    @abstractmethod
    def discard_dirty_log(self) -> None: ...

    @property
    @abstractmethod
    def dirty_source(self) -> str: ...

    @abstractmethod
    def _close(self) -> None:
        """The guest's thread is gone."""

    # ---- life ----------------------------------------------------------------------------------------------------

    @classmethod
    def trouble(cls) -> tuple[str, str] | None:
        return None

    @classmethod
    def blocks_for(cls, ram_bytes: int) -> tuple[BlockSpec, ...]:
        """ "boot", an odd number of pages, and "pc.ram", all the rest; ram_bytes is a multiple of 4096."""
        from colocache import BlockSpec

        layout = layout_for(ram_bytes)
        return (BlockSpec(BOOT, layout.boot_pages * PAGE, PAGE), BlockSpec(RAM, layout.ram_pages * PAGE, PAGE))

    @property
    def steps(self) -> int:
        return int(self._mailbox.box.step)

    @property
    def failure(self) -> str | None:
        return self._thread.failure

    @property
    def powered_off(self) -> bool:
        return False

    @property
    def identity(self) -> str:
        return self.kind

    def promoted(self) -> None:  # noqa: B027 -- its own branch is as good as any
        """See machine.Machine."""

    def dirty_hint(self) -> int:
        stores = int(self._mailbox.box.pages_stored) - self._synced_stores
        n_pages = self._work.n_pages
        return round(n_pages * -math.expm1(-max(0, stores) / n_pages))

    def private_bytes(self) -> int:
        from colocache import private_bytes

        return sum(private_bytes(0, ram.addr, ram.len_bytes) for ram in (self.boot_ram, self.ram) if ram.private)

    def give_up_private(self) -> None:
        from colocache import private_forget

        self._standing("give_up_private")
        self._ready = False
        for ram in (self.boot_ram, self.ram):
            if ram.private:
                private_forget(ram.addr, ram.len_bytes)

    def boot(self) -> None:
        self._standing("boot")
        view_of(self.boot_ram)[:] = self._boot_image
        self._mark_dirty(self.boot_ram.index, 0, self.boot_ram.n_pages)
        self._ready = True

    def resume(self) -> None:
        self._refuse_closed()
        if not self._ready:
            raise OrderError("a machine that was neither booted nor given a device state can't run")
        if self._thread.failure is None and not self._thread.running:
            salt = self._salt()
            self._history.append(self.steps, salt)
            self._mailbox.box.salt = salt
        self._thread.go()

    def pause(self) -> None:
        self._refuse_closed()
        self._thread.stop()

    @property
    def hears(self) -> bool:
        """See machine.SpeakingMachine: its console only speaks."""
        return False

    def give_input(self, data: bytes) -> int:  # noqa: ARG002 -- see machine.SpeakingMachine
        return 0

    def take_input_back(self) -> bytes:
        return b""

    def give_packet(self, packet: bytes) -> None:  # noqa: B027 -- nothing to do
        """See machine.SpeakingMachine: it has no card."""

    def _enter_and_tell(self) -> None:
        """In the guest's thread: what it did goes to its console, before it is known to stand."""
        self._enter()
        box, step = self._mailbox.box, self.steps
        if self.on_output is not None and step != self._told:
            self.on_output(b"steps %d to %d, salt %016x\n" % (self._told, step, int(box.salt)))
            self._told = step
            while self.output_full() and not box.stop:
                time.sleep(FULL_SECONDS)

    def _salt(self) -> int:
        seed = self._options.seed
        if seed is None:
            return fresh_salt()
        self._resumes += 1
        return int(mix(np.array([seed % (1 << 64)], dtype=np.uint64) + np.uint64(self._resumes))[0])

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("this machine was closed")

    def _standing(self, what: str) -> None:
        """Refuse `what` while the guest runs, and on a machine that was closed."""
        self._refuse_closed()
        if self._thread.running:
            raise OrderError(f"{what} while the guest runs: pause it first")

    def _taking(self) -> None:
        """The dirty log is about to be taken: dirty_hint counts from here."""
        self._refuse_closed()
        self._synced_stores = int(self._mailbox.box.pages_stored)
        if self._thread.running and len(self._history) >= self._tidy_at:
            self._tidy()

    def _tidy(self) -> None:
        """Drop those entries of the history that no page shows now, so that it does not grow without end.

        Done while the guest runs, so that no pause gets longer; what it writes meanwhile makes no older step show.
        """
        must = consult(self._history, self._work, self.steps, self.ram.n_pages)
        self._history.forget_before(must.needed)
        self._tidy_at = max(TIDY_ENTRIES, 2 * len(self._history))

    # ---- device state ----------------------------------------------------------------------------------------------

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        self._standing("save_device_state")
        if not self._ready:
            raise OrderError("a machine that was neither booted nor given a device state has none to save")
        loads, nonce = self._shadow
        state = DeviceState(
            step=self.steps,
            work=self._work,
            loads=loads,
            nonce=nonce,
            history=self._history.array,
            registers=self._save_registers(),
            hashes=self._hashes() if with_hashes else None,
        )
        return pack(self._shape, state)

    def _parse(self, state: bytes) -> DeviceState:
        parsed = parse(self._shape, state, ram_pages=self.ram.n_pages)
        self._check_registers(parsed.registers)
        return parsed

    def check_device_state(self, state: memoryview | bytes) -> None:
        self._refuse_closed()
        # A copy: no view of the caller's memory outlives this call, not even in an exception's traceback.
        copy = bytes(state)
        self._checked = None
        self._checked = copy, self._parse(copy)

    def rehearse(self, state: bytes) -> None:
        self._refuse_closed()
        pack(self._shape, self._parse(state))

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        self._standing("load_device_state")
        copy, checked = bytes(state), self._checked
        self._checked = None  # with hashes it is large
        # The same bytes say the same: what was read before the seal need not be read again while the machine stands.
        parsed = checked[1] if checked is not None and checked[0] == copy else self._parse(copy)
        report = self._compare(parsed.hashes)
        self._load_registers(parsed.registers)
        self._work = parsed.work
        self._history = History(parsed.history)
        self._tidy_at = max(TIDY_ENTRIES, 2 * len(self._history))
        self._mailbox.set_work(parsed.work)
        self._mailbox.box.step = self._told = parsed.step
        # Devices write guest RAM when they load (rings, dirty flags): here a page of its own holds what only this
        # machine knows, so that a write the cache was not told of shows as a wrong page at the next epoch.
        self._shadow = ((parsed.loads + 1) % (1 << 64) or 1, fresh_salt() or 1)
        view_of(self.boot_ram)[self.layout.shadow_page] = shadow_words(*self._shadow)
        self._mark_dirty(self.boot_ram.index, self.layout.shadow_page, 1)
        self._ready = True
        return report

    def _hashes(self) -> Words:
        """A hash of each page of every block, shape (n_pages of all,)."""
        hashes = np.empty(self._shape.n_pages, dtype=np.uint64)
        with ffi.from_buffer("uint64_t[]", hashes) as out:
            first = 0
            for ram in (self.boot_ram, self.ram):
                lib.guest_hash_pages(ffi.cast("void *", ram.addr), ram.n_pages, PAGE, out + first)
                first += ram.n_pages
        return hashes

    def _compare(self, hashes: Words | None) -> LoadReport:
        if hashes is None:
            return LoadReport(0, (), 0)
        begin = time.perf_counter_ns()
        wrong = np.flatnonzero(self._hashes() != hashes)
        n_boot = self.boot_ram.n_pages
        named = named_pages(BOOT, wrong[wrong < n_boot]) + named_pages(RAM, wrong[wrong >= n_boot] - n_boot)
        return LoadReport(len(hashes), named, time.perf_counter_ns() - begin)

    def fold(self, cache: Cache, block: int, first_pfn: int, n_pages: int) -> int:
        self._standing("fold")
        return cache.fold(block, first_pfn, n_pages)

    # ---- the check of every page -------------------------------------------------------------------------------------

    def verify(self) -> VerifyReport:
        self._standing("verify")
        if not self._ready:
            raise OrderError("a machine that was neither booted nor given a device state has nothing to verify")
        begin = time.perf_counter()
        must = consult(self._history, self._work, self.steps, self.ram.n_pages)
        wrong = named_pages(RAM, wrong_pages(view_of(self.ram), must.seeds, must.written))
        want = self._boot_image.copy()
        want[self.layout.shadow_page] = shadow_words(*self._shadow)
        bad = np.flatnonzero((view_of(self.boot_ram) != want).any(axis=1))
        wrong = named_pages(BOOT, bad) + wrong
        return VerifyReport(self._shape.n_pages, wrong, time.perf_counter() - begin)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._thread.end():
            # It may still write guest RAM and the mailbox: both must stay where they are.
            raise MachineError("the guest's thread does not end; its memory stays mapped until this process ends")
        self._close()
        self._mailbox.close()


def named_pages(name: str, pages: npt.NDArray[np.int64]) -> tuple[tuple[str, int], ...]:
    return tuple((name, int(page)) for page in pages)
