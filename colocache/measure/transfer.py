# SPDX-License-Identifier: Apache-2.0
"""The primary's end of a checkpoint that is measured: a thread that sends from the rig's plain memory over a socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from colocache import Sender, message_header
from colocache.measure.patterns import Pattern

if TYPE_CHECKING:
    from colocache.measure.rig import Rig

PAGE = 4096
BLOCK = "pc.ram"
STATE_BYTES = 4096
MSG_STATE = 8
TIMEOUT = 60.0
PIECE = 1 << 20


class Transfer:
    """A pair of sockets and a sender over the rig's plain memory. Context manager."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sender = Sender()
        self._sender.add_block(BLOCK, rig.plain_addr, rig.ram_bytes)
        self._piece = bytearray(PIECE)
        self.arrived_ns = 0
        for end in (self._near, self._far):
            end.settimeout(TIMEOUT)

    def stamp(self, pattern: Pattern) -> None:
        """New bytes into each dirty page of the primary, so that a page that did not come is noticed."""
        self._rig.change(self._rig.plain, np.flatnonzero(pattern.bits))

    def _beside(self, send: Callable[[], None], receive: Callable[[], None]) -> int:
        """Nanoseconds of `receive` while `send` runs in a thread, which begins when the clock does."""
        go, failed = threading.Event(), []

        def run() -> None:
            go.wait()
            try:
                send()
            except BaseException as error:  # noqa: BLE001 raised again by the thread that waits
                failed.append(error)
                self._far.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=run, name="sender of the measurement")
        thread.start()
        try:
            start = perf_counter_ns()
            go.set()
            receive()
            return perf_counter_ns() - start
        finally:
            go.set()
            if threading.current_thread() is not thread:
                thread.join()
            if failed:
                raise failed[0]

    def checkpoint(self, pattern: Pattern) -> int:
        """One epoch from its first byte to loaded: nanoseconds; `arrived_ns`: those until its last page was there."""
        rig, epoch = self._rig, self._rig.epoch + 1
        self._sender.sync_words(0, pattern.words)

        def send() -> None:
            self._sender.send(self._far, epoch=epoch, timeout=TIMEOUT)
            self._far.sendall(message_header(MSG_STATE, epoch, STATE_BYTES, pattern.n_dirty))
            self._far.sendall(bytes(STATE_BYTES))

        def receive() -> None:
            start = perf_counter_ns()
            _, taken = rig.cache.receive_stream(self._near, timeout=TIMEOUT, epoch=epoch)
            self.arrived_ns = perf_counter_ns() - start
            state = rig.cache.device_state_buffer(epoch, STATE_BYTES)
            got = 0
            while got < STATE_BYTES:
                got += self._near.recv_into(state[got:])
            state.release()
            del state
            rig.cache.sync_words(BLOCK, pattern.words)
            rig.cache.seal(epoch, n_pages=taken)
            rig.cache.flush()
            rig.cache.loaded()

        took = self._beside(send, receive)
        rig.epoch = epoch
        self._sender.received()
        return took

    def raw(self, n_bytes: int) -> int:
        """So many bytes through the same socket into one buffer: nanoseconds."""
        piece, into = memoryview(self._piece), memoryview(bytearray(PIECE))

        def send() -> None:
            for at in range(0, n_bytes, PIECE):
                self._far.sendall(piece[: min(PIECE, n_bytes - at)])

        def receive() -> None:
            left = n_bytes
            while left:
                left -= self._near.recv_into(into[: min(PIECE, left)])

        return self._beside(send, receive)

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._near.close()
        self._far.close()
        self._sender.close()
