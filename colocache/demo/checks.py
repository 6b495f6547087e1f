# SPDX-License-Identifier: Apache-2.0
"""The demo's checks as an observer of its primary: hashes for the secondary to compare, and deaths that are planned."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from colocache.choices import VERIFY
from colocache.errors import ArgumentError
from colocache.replication.events import Events
from colocache.replication.observer import Observer, Saved
from colocache.vmm.machine import Machine

DIE_AT = ("receiving", "sealed")


@dataclass(frozen=True)
class Checks(Observer):
    """Which checkpoints, counted from 1, carry a hash per page, and at which point of which one the primary dies."""

    events: Events
    verify: str = "all"
    hash_at: int = 0  # verify "last": the checkpoint that carries hashes; 0 = none
    die_at: str = ""  # SIGKILL itself at this point ...
    die_at_checkpoint: int = 0  # ... of this checkpoint
    hold: bool = False  # after the last checkpoint: stay connected and run on instead of ending

    def __post_init__(self) -> None:
        if self.verify not in VERIFY:
            raise ArgumentError(f"verify is {self.verify!r}: give {', '.join(VERIFY)}")
        if self.die_at and self.die_at not in DIE_AT:
            raise ArgumentError(f"die_at is {self.die_at!r}: give {', '.join(DIE_AT)}")

    def save(self, machine: Machine, number: int) -> Saved:
        """With hashes where they are wanted; the time for it is not the checkpoint's."""
        if self.verify == "none" or (self.verify == "last" and number != self.hash_at):
            return Saved(machine.save_device_state())
        begin = time.monotonic_ns()
        state = machine.save_device_state(with_hashes=True)
        return Saved(state, time.monotonic_ns() - begin)

    def about_to_send(self, number: int, epoch: int, pending: int, send: Callable[[int], int]) -> None:
        """Half of the last pages leave before it dies."""
        if self._dies("receiving", number):
            if pending > 1:
                send(pending // 2)
            self._die(epoch)

    def received(self, number: int, epoch: int) -> None:
        """It dies before it does anything about it."""
        if self._dies("sealed", number):
            self._die(epoch)

    def stays(self) -> bool:
        """The demo kills a primary that runs."""
        return self.hold

    def _dies(self, point: str, number: int) -> bool:
        return self.die_at == point and self.die_at_checkpoint == number

    def _die(self, epoch: int) -> None:
        """Like a host that loses power."""
        self.events.emit("dying", f"killing itself: {self.die_at}", point=self.die_at, epoch=epoch)
        os.kill(os.getpid(), signal.SIGKILL)
