# SPDX-License-Identifier: Apache-2.0
"""QEMUs started ahead, each waiting for a device state: the next epoch's machine is there before it is needed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from colocache.vmm.errors import MachineError
from colocache.vmm.qemu.errors import QemuError, QemuSlowError
from colocache.vmm.qemu.process import START_SECONDS, QemuProcess

START_TRIES = 3  # a process may be killed while it starts, as later


class Pool:
    """Keeps `size` processes ready. `make` starts one that waits, and is called in the pool's own thread.

    In place of one that was taken another is started by refill(): not at once, since a start takes the CPU that the
    load needs.

    A process that has written guest RAM of its own before its load is useless: its copy would hide the image's page
    for ever. Such a one, and one that died, is never handed out.
    """

    def __init__(self, make: Callable[[], QemuProcess], size: int = 1) -> None:
        self._make = make
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: one more; False: the end
        self._made: queue.SimpleQueue[QemuProcess | MachineError] = queue.SimpleQueue()
        self._kept: list[QemuProcess] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="colocache-qemu-pool", daemon=True)
        self._thread.start()
        self._size = size
        self._n_coming = 0  # asked for and not seen yet
        self.refill()

    def refill(self) -> None:
        """Start as many as are missing, in the background."""
        while len(self._kept) + self._n_coming < self._size:
            self._n_coming += 1
            self._wanted.put(True)

    def _work(self) -> None:
        while self._wanted.get() and not self._closing:
            try:
                self._made.put(self._make())
            except MachineError as error:
                self._made.put(error)

    def wait_ready(self, timeout: float = START_SECONDS) -> None:
        """Back when one is ready; QemuError if it can't be started, QemuSlowError."""
        deadline = time.monotonic() + timeout
        self._kept, kept = [], self._kept
        for process in kept:
            self._keep(process)
        n_failed = 0
        while not self._kept:
            self.refill()
            made = self._next(max(0.0, deadline - time.monotonic()))
            if isinstance(made, QemuProcess):
                self._keep(made)
                continue
            n_failed += 1
            if n_failed == START_TRIES:
                raise QemuError(f"the QEMU that should wait for the next checkpoint did not start: {made}") from made

    def _keep(self, process: QemuProcess) -> None:
        try:
            fit = process.alive and process.private_bytes() == 0
        except QemuError:
            fit = False  # it ended just now
        if fit:
            self._kept.append(process)
        else:
            process.kill()

    def take(self, timeout: float = START_SECONDS) -> QemuProcess:
        """One that is ready, now the caller's."""
        self.wait_ready(timeout)
        return self._kept.pop()

    def _next(self, timeout: float) -> QemuProcess | MachineError:
        try:
            made = self._made.get(timeout=timeout)
        except queue.Empty:
            raise QemuSlowError("no QEMU that has written none of its memory was ready in time") from None
        self._n_coming -= 1
        return made

    def close(self) -> None:
        """Kill those that wait."""
        self._closing = True
        self._wanted.put(False)
        self._thread.join()
        while not self._made.empty():
            made = self._made.get()
            if isinstance(made, QemuProcess):
                made.kill()
        while self._kept:
            self._kept.pop().kill()
