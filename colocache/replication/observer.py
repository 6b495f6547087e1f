# SPDX-License-Identifier: Apache-2.0
"""Somebody who looks on at a primary: checks of every page, planned deaths. None of it is part of the conversation.

A primary calls these methods, which do nothing here, in its own thread. demo/checks.py has the demo's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from colocache.vmm.machine import Machine


@dataclass(frozen=True)
class Saved:
    """A device state, and how long the observer was busy with what is no part of a checkpoint."""

    state: bytes
    extra_ns: int = 0


class Observer:
    """Looks on and does nothing. `number` counts the checkpoints of this primary from 1."""

    def save(self, machine: Machine, number: int) -> Saved:  # noqa: ARG002 -- for those that override it
        """The device state of `machine`, which stands."""
        return Saved(machine.save_device_state())

    def about_to_send(self, number: int, epoch: int, pending: int, send: Callable[[int], int]) -> None:
        """The machine stands, and its last `pending` pages follow; `send` sends at most so many of them now."""

    def received(self, number: int, epoch: int) -> None:
        """The secondary has sealed the epoch; the primary has heard it and done nothing yet."""

    def stays(self) -> bool:
        """All checkpoints that were wanted are done: True keeps the pair connected until it is stopped."""
        return False
