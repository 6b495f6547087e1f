# SPDX-License-Identifier: Apache-2.0
"""A guest that runs in processes of its own and is driven from outside, as a stock QEMU is, so that the chapter on one
can be run without a QEMU.

What vmm/qemu does with QEMUs is done here with small processes: each maps guest RAM privately, one waits for a device
state while another runs, and each is killed by the kernel when its driver dies. A device state travels in the very
envelope that a QEMU's does, and is checked by the same code.
"""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np

from colocache import private_bytes
from colocache.errors import VetoError
from colocache.teach import tags
from colocache.teach.guest import ScriptedGuest
from colocache.teach.secondary import Secondary
from colocache.teach.spoken import ChildError, SpokenProcess, answer, obey
from colocache.vmm.machine import LoadReport, Ram
from colocache.vmm.qemu.state import STREAM_END, STREAM_MAGIC, SavedState, Shape, pack, parse

MACHINE = b"the lesson's machine".ljust(32)  # in place of the digest of a QEMU's description
DAMAGED = len(STREAM_MAGIC) + 80  # a byte in the middle of what was saved


def envelope(registers: str, *, damaged: bool = False) -> bytes:
    """A device state as a primary's QEMU would save it; `damaged`: with one bit turned over on the way."""
    state = bytearray(pack(MACHINE, SavedState(STREAM_MAGIC + registers.encode() + STREAM_END, None)))
    if damaged:
        state[DAMAGED] ^= 1
    return bytes(state)


class GuestProcess(SpokenProcess):
    """One that stands where a QEMU would; seen from its driver."""

    def __init__(self, ram: Ram) -> None:
        super().__init__("colocache.teach.outside", (ram.fd,), {"fd": ram.fd, "n_pages": ram.n_pages})
        self._len_bytes = ram.n_pages * tags.PAGE_BYTES
        self._addr: int = self.hear()["result"]

    def tell(self, name: str, *args: Any) -> Any:
        """Give an order and wait for what comes of it."""
        self.say({"call": name, "args": args})
        return self.hear()["result"]

    def private_bytes(self) -> int:
        """What it has written, as the kernel counts it."""
        return private_bytes(self.pid, self._addr, self._len_bytes)


class OutsideGuest(ScriptedGuest):
    """The machine of a secondary: the process that runs, and the one that waits."""

    kind = "outside"
    dirty_source = "none"

    def __init__(self, ram: Ram) -> None:
        super().__init__([ram])
        self._ram = ram
        self.running: GuestProcess | None = None
        self.waiting: GuestProcess | None = None

    def refill(self) -> None:
        """Start the process that waits, if there is none."""
        if self.waiting is None:
            self.waiting = GuestProcess(self._ram)

    def check_device_state(self, state: memoryview | bytes) -> None:
        """Before the seal. DeviceStateError."""
        parse(Shape(MACHINE, self._n_pages, ()), bytes(state))

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        """In the process that waits, or, if it has written its memory, in another; the old one is dead before."""
        stream = parse(Shape(MACHINE, self._n_pages, ()), bytes(state)).stream
        if self.waiting is not None and self.waiting.private_bytes():
            self.waiting.close()
            self.waiting = None
        self.refill()
        if self.running is not None:
            self.running.close()
        self.running, self.waiting = self.waiting, None
        assert self.running is not None  # noqa: S101 refilled above
        self.registers = self.running.tell("load", stream[len(STREAM_MAGIC) : -len(STREAM_END)].decode())
        return LoadReport(0, (), 0)

    def close(self) -> None:
        """Both end."""
        for process in (self.running, self.waiting):
            if process is not None:
                process.close()
        self.running = self.waiting = None


class OutsideSecondary(Secondary):
    """A secondary whose guest is an OutsideGuest; its memory is bounded."""

    _guest: OutsideGuest

    def _make_guest(self, ram: Ram) -> ScriptedGuest:
        return OutsideGuest(ram)

    def write(self, pfns: list[int], epoch: int) -> None:
        self._run("write", pfns, epoch)

    def memory(self) -> list[str]:
        """What the process that runs sees; before there is one, what it will."""
        found: list[str] = super().memory() if self._guest.running is None else self._run("memory")
        return found

    def _run(self, name: str, *args: Any) -> Any:
        assert self._guest.running is not None  # noqa: S101 chapters write when an epoch is loaded
        return self._guest.running.tell(name, *args)

    def device_state(self, epoch: int, damaged: bool = False) -> None:
        state = envelope(f"registers of the PVM at epoch {epoch}", damaged=damaged)
        self._svm.put_device_state(epoch, state)

    def seal(self, epoch: int) -> dict[str, int]:
        try:
            return super().seal(epoch)
        except VetoError as error:
            raise ChildError(str(error.__cause__)) from error  # the sentence of who looked at the state

    def processes(self) -> dict[str, dict[str, int]]:
        """{"running", "waiting"}: each {pid, private}, if there is one."""
        both = {"running": self._guest.running, "waiting": self._guest.waiting}
        return {name: {"pid": one.pid, "private": one.private_bytes()} for name, one in both.items() if one is not None}

    def refill(self) -> None:
        """A process more that waits."""
        self._guest.refill()

    def restart(self) -> None:
        """In a process that attached: a fresh machine becomes the sealed epoch."""
        self._svm.restart()

    def close(self) -> None:
        self._guest.close()
        super().close()


# ---- the process that stands where a QEMU would ----


def main() -> None:
    """Map the memory privately, and do what the driver says until it ends."""
    obey(_serve)


def _serve(start: dict[str, Any], orders: Iterator[dict[str, Any]]) -> None:
    n_pages = start["n_pages"]
    mapping = mmap.mmap(start["fd"], n_pages * tags.PAGE_BYTES, flags=mmap.MAP_PRIVATE)
    pages = np.frombuffer(mapping, np.uint8).reshape(n_pages, tags.PAGE_BYTES)
    answer({"result": int(pages.ctypes.data)})
    for order in orders:
        call, args = order["call"], order["args"]
        if call == "write":
            tags.stamp(pages, args[0], "S", args[1])
        answer({"result": list(tags.read(pages)) if call == "memory" else args[0]})
    signal.pause()  # a QEMU would not end because nobody gives it orders any more; the kernel ends both
