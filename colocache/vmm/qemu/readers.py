# SPDX-License-Identifier: Apache-2.0
"""What comes from the descriptors of one QEMU, handed on in the thread of driver.py, or of whoever drains them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from colocache.vmm.qemu.driver import Driver
from colocache.vmm.qemu.errors import QemuSlowError

READ_BYTES = 1 << 16  # at a time
FULL_SECONDS = 0.005  # between two looks whether there is room for what the guest says
DRAIN_SECONDS = 10.0

OnOutput = Callable[[bytes], None]


class Readers:
    """The descriptors stay their owner's, who closes them in the driver's thread after `let_go`."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._fds: list[int] = []
        self._lock = threading.Lock()  # what comes from one descriptor is read and handed on by one thread at a time
        self._takers: list[Callable[[], bool]] = []  # one for each that is read: reads what is there
        self.n_taken = 0  # times that something was read, whoever asked for it

    def watch(self, fd: int, ready: Callable[[], object]) -> None:
        """Call `ready` whenever fd is readable."""
        self._fds.append(fd)
        self._driver.soon(self._driver.loop.add_reader, fd, ready)

    def read(self, fd: int, sink: OnOutput, full: Callable[[], bool] = lambda: False) -> None:
        """From now on hand what comes from fd to `sink`; nothing while `full`, which holds the writer up."""
        os.set_blocking(fd, False)
        self._fds.append(fd)
        loop = self._driver.loop

        def take() -> bool:
            """Whether something came. Under the lock."""
            try:
                data = os.read(fd, READ_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                data = b""
            if data:
                self.n_taken += 1
                sink(data)
            else:
                self._driver.soon(loop.remove_reader, fd)
            return bool(data)

        def come() -> None:
            if full():
                loop.remove_reader(fd)
                loop.call_later(FULL_SECONDS, listen)
            else:
                with self._lock:
                    take()

        def listen() -> None:
            if fd in self._fds:  # else it was closed meanwhile, and the number may be another's
                loop.add_reader(fd, come)

        self._takers.append(take)
        self._driver.soon(listen)

    def drain(self) -> None:
        """Back when all that was written before has been handed on, also if that is more than there is room.
        QemuSlowError.

        In this thread: another that does it costs two hops, which a machine that stands waits for. The guest stands: of
        one that runs there might be no end.
        """
        if not self._lock.acquire(timeout=DRAIN_SECONDS):
            raise QemuSlowError(f"what QEMU's guest said was not handed on within {DRAIN_SECONDS:g} s")
        try:
            for take in self._takers:
                while take():
                    pass
        finally:
            self._lock.release()

    def let_go(self) -> list[int]:
        """Nothing more is read: the descriptors that the loop still knows, for whoever closes them in its thread."""
        with self._lock:
            fds, self._fds, self._takers = self._fds, [], []
        return fds
