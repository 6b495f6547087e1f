# SPDX-License-Identifier: Apache-2.0
"""The mailbox: a few pages of device memory through which the VMM and the guest's program speak. No RAM block."""

from __future__ import annotations

import mmap
from typing import Any

from colocache.vmm._native import ffi
from colocache.vmm.layout import MAILBOX_BYTES
from colocache.vmm.workload import Workload

NO_LIMIT = (1 << 64) - 1


class Mailbox:
    """struct guest_mailbox, then room for a stack. Written while the guest stands still, but for `stop`."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, MAILBOX_BYTES)
        self._bytes = ffi.from_buffer(self._map, require_writable=True)
        self.box: Any = ffi.cast("struct guest_mailbox *", self._bytes)
        self.addr = int(ffi.cast("uintptr_t", self._bytes))
        self.box.limit = NO_LIMIT

    def place(self, split_page: int, low_addr: int, high_addr: int) -> None:
        """Where, in the addresses the program uses, the two parts of pc.ram begin."""
        self.box.split_page, self.box.low_addr, self.box.high_addr = split_page, low_addr, high_addr

    def set_work(self, work: Workload) -> None:
        self.box.first_page, self.box.n_pages = work.first_page, work.n_pages
        self.box.run_pages, self.box.rewrite_below, self.box.run_below = (
            work.run_pages,
            work.rewrite_below,
            work.run_below,
        )

    def close(self) -> None:
        """Give the memory back; the guest no longer runs."""
        self.box = ffi.new("struct guest_mailbox *", self.box[0])  # the counters stay readable
        ffi.release(self._bytes)
        self._map.close()
