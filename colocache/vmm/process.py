# SPDX-License-Identifier: Apache-2.0
"""The process guest: the program as a native thread of this process, for machines without /dev/kvm. It dies with it.

Its writes are logged by the kernel (userfaultfd and PAGEMAP_SCAN, through colocache.UffdDirtyLog) where memory is
mapped in 4 KiB pages. On hugetlb the kernel sees only 2 MiB, and some kernels have no such log: there the program keeps
its own.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colocache.errors import SystemCallError, UnsupportedError
from colocache.vmm._native import ffi, lib
from colocache.vmm.base import ReferenceMachine
from colocache.vmm.errors import DeviceStateError
from colocache.vmm.machine import LoadReport, MarkDirty, Ram
from colocache.vmm.smaps import kernel_page_size
from colocache.vmm.workload import PAGE, GuestOptions

if TYPE_CHECKING:
    from colocache import Cache, Sender, UffdDirtyLog


class OwnLog:
    """A bit per page of pc.ram, set by the program after each page it stores."""

    def __init__(self, n_pages: int) -> None:
        self.n_words = (n_pages + 63) // 64
        self._map = mmap.mmap(-1, self.n_words * 8)
        self._bytes = ffi.from_buffer(self._map, require_writable=True)
        self.words: Any = ffi.cast("uint64_t *", self._bytes)
        self.addr = int(ffi.cast("uintptr_t", self._bytes))

    def take(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The bits, which are then cleared."""
        taken = np.empty(self.n_words, dtype=np.uint64)
        with ffi.from_buffer("uint64_t[]", taken) as out:
            lib.guest_take_words(self.words, out, self.n_words)
        return taken

    def put(self, taken: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        with ffi.from_buffer("uint64_t[]", taken) as bits:
            lib.guest_put_words(self.words, bits, self.n_words)

    def close(self) -> None:
        ffi.release(self._bytes)
        self._map.close()


class ProcessMachine(ReferenceMachine):
    """See machine.Machine."""

    kind = "process"

    def __init__(self, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> None:
        super().__init__(rams, options, mark_dirty)
        self._entered = False  # since the log was last taken
        self._own: OwnLog | None = None
        self._kernel: UffdDirtyLog | None = None
        try:
            high = self.ram.addr + self.layout.split_page * PAGE
            self._mailbox.place(self.layout.split_page, self.ram.addr, high)
            if self.ram.private:
                return
            if all(kernel_page_size(ram.addr) == PAGE for ram in rams):
                self._kernel = self._kernel_log(rams)
            if self._kernel is None:
                self._own = OwnLog(self.ram.n_pages)
                self._mailbox.box.bitmap = self._own.addr
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _kernel_log(rams: Sequence[Ram]) -> UffdDirtyLog | None:
        from colocache import UffdDirtyLog, UffdRange

        try:
            return UffdDirtyLog([UffdRange(ram.index, 0, ram.n_pages, ram.addr) for ram in rams])
        except (UnsupportedError, SystemCallError):
            return None  # an old kernel, or one that allows no userfaultfd: the program's own log is as good

    @property
    def dirty_source(self) -> str:
        if self._own is not None:
            return "own"
        return "none" if self._kernel is None else "uffd"

    def _enter(self) -> None:
        self._entered = True
        lib.guest_program(self._mailbox.box)

    def _kick(self) -> None:
        """Nothing to do: native code looks at the stop flag once a step."""

    def _save_registers(self) -> bytes:
        return b""  # between two steps a process guest is its mailbox

    def _check_registers(self, registers: bytes) -> None:
        if registers:
            raise DeviceStateError(f"the device state has {len(registers)} bytes of registers, this guest has none")

    def _load_registers(self, registers: bytes) -> None:
        """None to load."""

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        if not self._entered and not self._thread.running:
            # All that the log can hold are writes that are known otherwise: of the VMM, which are marked, and of the
            # flush, before the guest first ran.
            self.discard_dirty_log()
            return
        self._taking()
        if self._kernel is not None:
            target.sync_dirty_log(self._kernel)
        if self._own is not None:
            taken = self._own.take()
            try:
                target.sync_words(self.ram.index, taken, 0, self.ram.n_pages)
            except BaseException:
                self._own.put(taken)
                raise
        self._entered = self._thread.running

    def discard_dirty_log(self) -> None:
        self._taking()
        if self._kernel is not None:
            self._kernel.discard()
        if self._own is not None:
            self._own.take()
        self._entered = self._thread.running

    def load_device_state(self, state: memoryview | bytes) -> LoadReport:
        report = super().load_device_state(state)
        # The kernel logged the flush too, which wrote this very mapping. What came since the log was synced is the
        # flush, after which guest RAM is the cache, and the shadow page, which was marked; the guest stands. Kept,
        # these bits would do no harm but make every flush repeat the one before.
        self.discard_dirty_log()
        return report

    def _close(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
        if self._own is not None:
            self._own.close()
