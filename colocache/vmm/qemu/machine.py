# SPDX-License-Identifier: Apache-2.0
"""A stock QEMU as the machine that replication sees.

primary     one QEMU whose RAM is the image itself; its writes are logged by the kernel (userfaultfd)
secondary   a QEMU over a *private* mapping of the image: what it writes dies with its process, so the image is the
            newest epoch whatever it does. At each checkpoint a fresh process, started ahead, loads the device state and
            takes its place; the old one is killed and seen dead before the new one runs. One that ended, panicked
            or powered off by itself went its own branch, which harms nobody: where a machine is needed, a fresh one
            becomes the newest epoch again.

Which of the two a machine is shows by what it is asked first: boot, or load_device_state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from colocache.errors import ArgumentError, ClosedError, OrderError
from colocache.vmm.errors import MachineError
from colocache.vmm.machine import LoadReport, MarkDirty, OnOutput, Ram, VerifyReport
from colocache.vmm.qemu import availability, ram_blocks
from colocache.vmm.qemu.description import Description, describe
from colocache.vmm.qemu.errors import QemuDiedError, QemuError
from colocache.vmm.qemu.events import DEATH, ENDED
from colocache.vmm.qemu.guest_disks import GuestDisks
from colocache.vmm.qemu.guests import RAM, guest_of, guest_ram
from colocache.vmm.qemu.loading import Loading, compare_others
from colocache.vmm.qemu.page_hashes import compare_pages, page_hashes
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.process_log import log_of
from colocache.vmm.qemu.qmp import Event
from colocache.vmm.qemu.state import CarriedPage, SavedState, pack, parse
from colocache.vmm.qemu.voice import Voice
from colocache.vmm.workload import PAGE, GuestOptions

if TYPE_CHECKING:
    from colocache import BlockSpec, Cache, ProcessDirtyLog, Sender

STATE_MAX = 64 << 20  # bytes of a device state that QEMU may save
T = TypeVar("T")


class QemuMachine:
    """See machine.Machine for what each method promises."""

    kind = "qemu"

    def __init__(self, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> None:
        self.ram = guest_ram(rams)
        self._mark_dirty = mark_dirty
        self.on_output: OnOutput | None = None  # is given what the guest of the machine that runs says
        self.on_packet: OnOutput | None = None  # likewise each packet that its card sends
        self.output_full: Callable[[], bool] = lambda: False
        self.on_reborn: Callable[[], None] = lambda: None
        self._powered_off = False
        self._promoted = False
        self._announced = False  # where its card is, after it was promoted
        self._saved: bytes | QemuError | None = None  # the device state, while a primary stands
        self._carried: tuple[CarriedPage, ...] = ()  # and what goes with it
        self._others: ram_blocks.Changing | None = None
        self._state: SavedState | None = None  # of a secondary: what its machine was loaded from
        self._failure: str | None = None
        self._process: QemuProcess | None = None
        self._log: ProcessDirtyLog | None = None
        self._running = False
        self._closed = False
        self._guest = guest_of(options, self.ram.len_bytes)
        try:
            asked = self._guest.line.ram_bytes
            if asked != self.ram.len_bytes:
                raise ArgumentError(
                    f"the command line makes a guest of {asked} bytes, its image has {self.ram.len_bytes}"
                )
            self.description: Description = describe(self._guest.line)
            self._loading = Loading(lambda: self._start(shared=False, incoming=True), self.description.others)
            self.disks = GuestDisks(self._guest.line, self._alive)
            self._shape = self.description.shape(self.ram.n_pages)
        except BaseException:
            self._guest.close()
            raise

    @classmethod
    def trouble(cls) -> tuple[str, str] | None:
        """See machine.Machine."""
        return availability.trouble()

    @classmethod
    def blocks_for(cls, ram_bytes: int) -> tuple[BlockSpec, ...]:
        """See machine.Machine."""
        from colocache import BlockSpec

        return (BlockSpec(RAM, ram_bytes, PAGE),)

    # ---- life ----------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """The machine is made and stands before its first instruction."""
        self._standing("boot")
        if self._process is not None or self._loading.begun:
            raise OrderError("a machine that was booted or given a device state can't be booted")
        self._process = self._start(shared=True, incoming=False)
        # Firmware and kernel may lie in RAM already.
        self._mark_dirty(self.ram.index, 0, self.ram.n_pages)
        self._changing(self._process)
        self._log = log_of(self._process, self.ram, kvm_maps_it=self.description.kvm)

    def resume(self) -> int | None:
        """See machine.Machine."""
        self._refuse_closed()
        self._alive()
        since = None
        if not self._running:
            self._saved = None
            since = self._unless_it_died(QemuProcess.cont)
            self._running = True
            if self._promoted and self._guest.line.card and not self._announced:
                self._announced = True
                self._unless_it_died(QemuProcess.announce)
            self._loading.tidy_up()
        return since

    def pause(self) -> int | None:
        """Stop it. A secondary first waits for the process that shall take over its work.

        Of a primary the device state is saved in the same breath, for save_device_state: one wait less in its pause.
        """
        self._refuse_closed()
        since = None
        if self._running:
            if self._loading.begun:
                self._loading.begin().wait_ready()
                if not self._went_astray():
                    self._unless_it_died(QemuProcess.stop)
            else:
                self._saved, since = self._stop_and_save()
            self._running = False
        return since

    def _stop_and_save(self) -> tuple[bytes | QemuError, int | None]:
        """The device state, or why there is none, and since when it stands; raises what keeps it from standing."""
        process = self._alive()

        def look() -> None:  # nothing changes them while the machine stands, and QEMU is busy with the state
            self._carried = self._changing(process).now()

        try:
            return process.stop_and_save(STATE_MAX, look)
        except QemuDiedError:
            raise
        except QemuError as error:
            process.stop()
            process.drain()
            return error, None

    def _changing(self, process: QemuProcess) -> ram_blocks.Changing:
        if self._others is None or self._others.process is not process:
            self._others = ram_blocks.Changing(process, self.description.others)
        return self._others

    @property
    def steps(self) -> int:
        """Of the small guest; of another, microseconds of CPU time that its process took."""
        process = self._process
        return 0 if process is None else self._guest.steps(process)

    @property
    def failure(self) -> str | None:
        """Of a secondary there is none before it is promoted: a fresh machine can always take its place."""
        return None if self._went_astray() else self._failure

    @property
    def powered_off(self) -> bool:
        """See machine.Machine."""
        return self._powered_off and not self._went_astray()

    @property
    def identity(self) -> str:
        """See machine.Machine."""
        return f"qemu: {self.description}"

    def promoted(self) -> None:
        """See machine.Machine. A machine that went astray is no machine for the world: a fresh one takes its place."""
        self._revive()
        self._promoted = True

    @property
    def hears(self) -> bool:
        """See machine.SpeakingMachine."""
        return self._guest.line.console

    def give_input(self, data: bytes) -> int:
        """See machine.SpeakingMachine. One that has ended, or will be another, takes nothing."""
        process = self._process
        if process is None or self._closed or not process.alive:
            return 0
        try:
            return process.console.write(data)
        except QemuError:
            return 0

    def take_input_back(self) -> bytes:
        """See machine.SpeakingMachine."""
        process = self._process
        return process.console.take_back() if process is not None else b""

    def give_packet(self, packet: bytes) -> None:
        """See machine.SpeakingMachine."""
        process = self._process
        if process is not None:
            process.card.give(packet)

    def _unless_it_died(self, order: Callable[[QemuProcess], T]) -> T | None:
        """Give the process an order; a secondary's that died just now went astray."""
        process = self._alive()
        if self._powered_off:  # it stands for good, and QEMU refuses to let it run
            return None
        try:
            return order(process)
        except QemuDiedError:
            self._failure = self._failure or ENDED[DEATH]
            if not self._went_astray():
                raise
            return None

    def _went_astray(self) -> bool:
        """Whether this is a secondary's machine that has ended, panicked or powered off on its own branch."""
        return self._loading.begun and not self._promoted and (self._failure is not None or self._powered_off)

    def _revive(self) -> None:
        """Become the newest epoch again, which the image is, if the machine went astray. It stands."""
        if self._went_astray() and self._state is not None:
            self._become(self._state)
            self._running = False

    def _start(self, *, shared: bool, incoming: bool) -> QemuProcess:
        """A new process. What it says counts from when it is this machine's."""
        voice = Voice(self)
        voice.of = QemuProcess(
            self._guest.line,
            self.ram.fd,
            shared=shared,
            incoming=incoming,
            nodes=self.disks.nodes(incoming=incoming),
            on_output=voice.output,
            on_packet=voice.packet,
            output_full=voice.full,
            on_event=voice.event,
        )
        return voice.of

    @property
    def process(self) -> QemuProcess | None:
        """See voice.Listener."""
        return self._process

    def heard(self, event: Event) -> None:
        """See voice.Listener."""
        name = event["event"]
        if name == "SHUTDOWN":
            self._powered_off = True
        elif name in ENDED and self._failure is None and not self._closed:
            self._failure = ENDED[name]

    def _alive(self) -> QemuProcess:
        """The process that is this machine."""
        self._revive()
        if self._process is None:
            raise OrderError("a machine that was neither booted nor given a device state can't run")
        if self._failure is not None:
            raise MachineError(f"the guest does not run any more: {self._failure}")
        return self._process

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ClosedError("this machine was closed")

    def _standing(self, what: str) -> None:
        self._refuse_closed()
        if self._running:
            raise OrderError(f"{what} while the guest runs: pause it first")

    # ---- dirty log -----------------------------------------------------------------------------------------------

    @property
    def dirty_source(self) -> str:
        """The kernel's log; of a secondary there is none, as its writes are private."""
        return "uffd"

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        """See machine.Machine. A secondary's writes die with its process: nothing to hand on."""
        self._refuse_closed()
        if self._log is not None:
            target.sync_dirty_log(self._log)

    def discard_dirty_log(self) -> None:
        """See machine.Machine."""
        self._refuse_closed()
        if self._log is not None:
            self._log.discard()

    def dirty_hint(self) -> int:
        """Of a secondary: its private pages. A primary's log can't be read without taking it."""
        return self.private_bytes() // PAGE

    def private_bytes(self) -> int:
        """See machine.Machine. A process that ended just now has none."""
        process = self._process
        if process is None or self._log is not None or not process.alive:
            return 0
        try:
            return process.private_bytes()
        except QemuError:
            return 0

    def give_up_private(self) -> None:
        """See machine.Machine. They go with their process."""
        self._standing("give_up_private")
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    # ---- device state --------------------------------------------------------------------------------------------

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        """See machine.Machine. Saving may write guest RAM: the log is taken again after it."""
        self._standing("save_device_state")
        process = self._alive()
        if self._saved is None:
            stream = process.save(STATE_MAX)
            self._carried = self._changing(process).now()
        elif isinstance(self._saved, QemuError):
            raise self._saved
        else:
            stream = self._saved
        hashes = np.concatenate([page_hashes(self.ram), ram_blocks.hashes(process)]) if with_hashes else None
        return pack(self.description.digest, SavedState(stream, hashes, self._carried))

    def check_device_state(self, state: memoryview | bytes) -> None:
        """Checksum, form, lengths, and whether it is of the same machine. What else may be wrong only a load shows."""
        self._refuse_closed()
        parse(self._shape, bytes(state))
        self._loading.begin()  # one starts now, if this is the first epoch

    def rehearse(self, state: bytes) -> None:
        """See machine.Machine. The save is QEMU's."""
        parse(self._shape, state)

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        """In a fresh process: see loading.py."""
        self._standing("load_device_state")
        if self._log is not None:
            raise OrderError("a primary takes no device state")
        parsed = parse(self._shape, bytes(state))
        report = compare_pages(self.ram, parsed.hashes)
        self._state = None
        fresh = self._become(parsed)
        self._state = replace(parsed, hashes=None)
        return report if parsed.hashes is None else compare_others(fresh, parsed.hashes[self.ram.n_pages :], report)

    def _become(self, state: SavedState) -> QemuProcess:
        """A fresh process, which has loaded the state."""
        old, self._process = self._process, None
        self._failure = None  # whatever the old one's was
        self._powered_off = False
        fresh = self._loading.replace(old, state)
        self.on_reborn()
        self._process = fresh
        return fresh

    def fold(self, cache: Cache, block: int, first_pfn: int, n_pages: int) -> int:  # noqa: ARG002 -- it has one block
        """See machine.Machine."""
        self._standing("fold")
        return self._alive().fold(self.ram.fd, first_pfn * PAGE, n_pages * PAGE)

    # ---- the check of every page -----------------------------------------------------------------------------------

    def verify(self) -> VerifyReport:
        """Of the small guest: what its own history says. Nothing is known of another's memory: 0 pages."""
        self._standing("verify")
        return self._guest.verify(self._alive(), self.ram)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See machine.Machine."""
        if self._closed:
            return
        self._closed = True
        closing: list[Callable[[], None]] = [self._guest.close, self._loading.close]
        closing += [self._log.close] if self._log is not None else []
        closing += [self._process.kill] if self._process is not None else []
        while closing:
            closing.pop()()
