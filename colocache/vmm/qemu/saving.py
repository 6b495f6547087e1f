# SPDX-License-Identifier: Apache-2.0
"""A QEMU's device state, saved when its devices have sent what they had begun to send.

What found no room in our socket, QEMU sends when there is some, standing or not: a card then tells the guest, in its
memory, that the packet has gone, and takes the next. After the save that would be memory which is ahead of the device
state, and no QEMU loads that; and what a console had begun would be said twice.

QEMU's main loop has been round for certain when it has answered twice. If nothing was read from before that, by
whichever thread, and nothing is there to read after it, there was room for all that it had, and it has no more. So a
state is good if nothing came from before it was saved until QEMU had answered twice after it: a guest that has nothing
to say, as most have in most moments, stands for no more than its save. Where something came, perhaps before the save
and perhaps after it, the devices settle first, and the state is saved again.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from colocache.vmm.qemu.driver import Driver
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.quick import Command, Quick
from colocache.vmm.qemu.readers import Readers
from colocache.vmm.qemu.wiring import fd_path

SETTLE_ROUNDS_MAX = 1000  # a ring of a card has 256 packets, and a socket takes ten
AGAIN: list[Command] = [("query-name", {})] * 2  # when both were answered, QEMU's main loop has been round


class Saving:
    """Of the QEMU that `quick` speaks with, whose output `readers` take. `state`: a file that it inherited, for the
    state only."""

    def __init__(self, quick: Quick, readers: Readers, driver: Driver, state: int) -> None:
        self._quick, self._readers, self._driver, self._state = quick, readers, driver, state
        self._save: Command = ("xen-save-devices-state", {"filename": fd_path(state), "live": False})

    def save(self, limit_bytes: int) -> bytes:
        """The state of all devices, without RAM. Only while it stands: QEMU itself would not refuse.

        Saving may write guest RAM. The log is taken again after it.
        """
        (status,) = self._quick.execute_all([("query-status", {})])
        if status["running"]:
            raise QemuError("a device state of a running QEMU would be torn: stop it first")
        self._settle()
        self._quick.execute_all([self._save])
        return self._saved(limit_bytes)

    def stop_and_save(self, limit_bytes: int, meanwhile: Callable[[], None]) -> tuple[bytes, int | None]:
        """Both. `meanwhile` is called when it stands. The state, and since when it stands (CLOCK_MONOTONIC; None: it
        stood before). All that it said has been handed on.

        The driver's thread is held; whoever lets the machine run again lets go of it.
        """
        self._driver.hold()
        n_taken = self._readers.n_taken
        self._quick.execute_all([("stop", {}), self._save, *AGAIN], meanwhile=meanwhile)
        since = self._quick.when("STOP")
        self._readers.drain()
        if self._readers.n_taken != n_taken:
            self._settle()
            self._quick.execute_all([self._save])
        return self._saved(limit_bytes), since

    def _settle(self) -> None:
        """It stands: back when its devices have sent all that they had begun to send."""
        for _ in range(SETTLE_ROUNDS_MAX):
            n_taken = self._readers.n_taken
            self._quick.execute_all(AGAIN)
            self._readers.drain()
            if self._readers.n_taken == n_taken:
                return
        raise QemuError(
            f"the guest stands and its devices send on and on, {SETTLE_ROUNDS_MAX} times what there is room for"
        )

    def _saved(self, limit_bytes: int) -> bytes:
        n_bytes = os.fstat(self._state).st_size
        if not 0 < n_bytes <= limit_bytes:
            raise QemuError(f"QEMU saved a device state of {n_bytes} bytes; at most {limit_bytes} are allowed")
        return os.pread(self._state, n_bytes, 0)
