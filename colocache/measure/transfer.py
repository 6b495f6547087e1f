# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is measured, from its first byte to loaded, and what it is compared with: transfer.c in Python.

Both ends are C, ours too, so that Python's part is in none of the times.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from colocache import Sender
from colocache._native import error_from
from colocache.measure import baseline
from colocache.measure._baseline import ffi, lib
from colocache.measure.patterns import Pattern

if TYPE_CHECKING:
    from colocache.measure.rig import Rig

PAGE = 4096
BLOCK = "pc.ram"
STATE_BYTES = 4096
TIMEOUT = 60  # seconds without a byte


class Transfer:
    """A pair of sockets and a sender over the rig's plain memory. Context manager."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sender = Sender()
        self._sender.add_block(BLOCK, rig.plain_addr, rig.ram_bytes)
        self.arrived_ns = 0
        for end in (self._near, self._far):  # not settimeout, which would make them non-blocking
            for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                end.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", TIMEOUT, 0))

    def stamp(self, pattern: Pattern) -> None:
        """New bytes into each dirty page of the primary, so that a page that did not come is noticed."""
        self._rig.change(self._rig.plain, np.flatnonzero(pattern.bits))

    def _run(self, way: Callable[..., int], *arguments: int, **fields: Any) -> int:
        """One pass through the sockets: nanoseconds."""
        rig = self._rig
        job = ffi.new("struct transfer *")
        job.near, job.far, job.timeout_ms = self._near.fileno(), self._far.fileno(), TIMEOUT * 1000
        job.n_pages = rig.n_pages
        for name, addr in (("primary", rig.plain_addr), ("cache", rig.cache_addr), ("guest", rig.guest_addr)):
            setattr(job, name, ffi.cast("char *", addr))
        for name, value in fields.items():
            setattr(job, name, value)
        took = way(job, *arguments)
        if took < 0:
            raise error_from(took)
        self.arrived_ns = job.arrived_ns
        return took

    def checkpoint(self, pattern: Pattern) -> int:
        """One epoch from its first byte to loaded: nanoseconds; `arrived_ns`: those until its last page was there."""
        rig, epoch = self._rig, self._rig.epoch + 1
        self._sender.sync_words(0, pattern.words)
        with rig.cache._handle as cc, self._sender._handle as sender:
            took = self._run(
                lib.transfer_ours,
                cc=ffi.cast("void *", cc),
                sender=ffi.cast("void *", sender),
                epoch=epoch,
                state_bytes=STATE_BYTES,
                words=baseline.words_pointer(pattern.words),
            )
        rig.epoch = epoch
        self._sender.received()
        return took

    def _beside(self, way: Callable[..., int], pattern: Pattern, *arguments: int) -> int:
        """What comes to QEMU's union and flush: half of the dirty pages as received, half as the log's."""
        half = self._rig.rng.integers(0, 1 << 64, pattern.words.size, np.uint64)
        received, log = pattern.words & half, pattern.words & ~half
        return self._run(
            way,
            *arguments,
            words=baseline.words_pointer(pattern.words),
            received=baseline.words_pointer(received),
            log=baseline.words_pointer(log),
        )

    def hot(self, pattern: Pattern) -> int:
        """As many bytes from one buffer to another, both in the CPU's caches, then QEMU's flush: nanoseconds."""
        return self._beside(lib.transfer_hot, pattern, pattern.n_dirty * PAGE)

    def in_place(self, pattern: Pattern) -> int:
        """The dirty pages from where they lie into the cache's, and nothing else, then QEMU's flush: nanoseconds."""
        return self._beside(lib.transfer_in_place, pattern)

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._near.close()
        self._far.close()
        self._sender.close()
