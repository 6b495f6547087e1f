# SPDX-License-Identifier: Apache-2.0
"""A piece of a machine's output: what it sent at one time on one channel, and the epoch that it is of."""

from __future__ import annotations

from dataclasses import dataclass

CONSOLE, CARD = 0, 1  # channels: bytes in order; packets, each a piece of its own
COST_BYTES = 128  # of a piece besides its data: many small ones fill a queue too

HELD_BYTES_MAX = 64 << 20  # that a queue holds before it is full


@dataclass(frozen=True)
class Piece:
    """`offset`: bytes that went before it on its channel since the machine was booted."""

    epoch: int
    channel: int
    offset: int
    data: bytes

    @property
    def cost(self) -> int:
        """Bytes that it counts for in a queue."""
        return len(self.data) + COST_BYTES
