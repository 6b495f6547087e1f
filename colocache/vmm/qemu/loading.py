# SPDX-License-Identifier: Apache-2.0
"""Where a secondary's next machine comes from: a process that was started ahead and takes a device state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from colocache.vmm.history import Words
from colocache.vmm.machine import LoadReport
from colocache.vmm.qemu import ram_blocks
from colocache.vmm.qemu.errors import QemuDiedError, QemuError
from colocache.vmm.qemu.pool import Pool
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.ram_blocks import Content
from colocache.vmm.qemu.state import SavedState
from colocache.vmm.workload import PAGE

LOAD_TRIES = 3  # processes that a device state may cost


class Loading:
    """`start` starts a process that waits for a state; `fresh` is what its RAM blocks beside guest memory must hold:
    QEMU leaves its firmware to its own migration. A primary never needs it, and so nothing is started before begin().
    """

    def __init__(self, start: Callable[[], QemuProcess], fresh: Sequence[Content]) -> None:
        self._start, self._fresh = start, fresh
        self._pool: Pool | None = None
        self._old: QemuProcess | None = None  # dead or dying, not given back yet

    def begin(self) -> Pool:
        """Start one ahead, if that was not done yet."""
        if self._pool is None:
            self._pool = Pool(self._make)
        return self._pool

    @property
    def begun(self) -> bool:
        """Whether one was ever wanted: the machine is a secondary's."""
        return self._pool is not None

    def replace(self, old: QemuProcess | None, state: SavedState) -> QemuProcess:
        """A process that has become the machine that `state` is of; it stands. `old` dies meanwhile: it is dead when
        the other is handed out."""
        self.tidy_up()
        self._old = old
        if old is not None:
            old.begin_death()
        fresh = self._load(state)
        if old is not None:
            old.see_dead()  # before the fresh one may run
        return fresh

    def tidy_up(self) -> None:
        """What can wait until the machine runs: the old process's descriptors, and the start of the next one."""
        old, self._old = self._old, None
        if old is not None:
            old.kill()
        if self._pool is not None:
            self._pool.refill()

    def _load(self, state: SavedState) -> QemuProcess:
        """One that does not take it is replaced by another, LOAD_TRIES in all."""
        pool = self.begin()
        for left in reversed(range(LOAD_TRIES)):
            process = pool.take()
            try:
                ram_blocks.put(process, state.carried)
                process.load(state.stream)
                return process
            except BaseException as error:
                process.kill()
                if not left or not isinstance(error, QemuError):
                    raise
        raise AssertionError("unreachable")

    def _make(self) -> QemuProcess:
        process = self._start()
        try:
            ram_blocks.fill(process, self._fresh)
        except BaseException:
            process.kill()
            raise
        return process

    def close(self) -> None:
        """End those that wait."""
        old, self._old = self._old, None
        if old is not None:
            old.kill()
        if self._pool is not None:
            self._pool.close()


def compare_others(process: QemuProcess, hashes: Words, report: LoadReport) -> LoadReport:
    """`report`, and what a process that has loaded holds beside guest memory against the primary's hashes of that."""
    begin = time.perf_counter_ns()
    try:
        found = ram_blocks.hashes(process)
    except QemuError as error:
        if process.alive and not isinstance(error, QemuDiedError):  # its memory goes before it counts as dead
            raise
        return report  # it ended just now, which harms nobody: another will take its place
    pages = [(one.name, page) for one in ram_blocks.other_blocks(process) for page in range(one.len_bytes // PAGE)]
    wrong = tuple(pages[n] for n in np.flatnonzero(found != hashes))
    return LoadReport(
        report.epoch_hashes_checked + len(pages),
        (*report.wrong_pages, *wrong),
        report.verify_ns + time.perf_counter_ns() - begin,
    )
