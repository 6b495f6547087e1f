# SPDX-License-Identifier: Apache-2.0
"""How far ahead of a limit a machine must be stopped by somebody who looks at it now and then."""

from __future__ import annotations

from collections import deque

RATE_LEAST = 512 << 20  # bytes a second that a guest may write at any moment, whatever it did before
RATE_DECAY = 0.9  # an epoch
GAP_AT_FIRST = 0.01
GAPS = 64  # the longest time between two looks is that of so many
AHEAD = 1.25


class Growth:
    """Fed with looks at something that grows while a machine runs, in bytes."""

    def __init__(self) -> None:
        self._rate = float(RATE_LEAST)
        self._gaps = deque([GAP_AT_FIRST], GAPS)
        self._before: tuple[float, int] | None = None
        self._stop_seconds = 0.0

    def look(self, now: float, n_bytes: int) -> None:
        """What is there at `now`, in seconds; the machine has run since the look before, or `anew` was called."""
        if self._before is not None:
            gap = max(1e-4, now - self._before[0])
            self._gaps.append(gap)
            self._rate = max(self._rate, (n_bytes - self._before[1]) / gap)
        self._before = (now, n_bytes)

    def anew(self) -> None:
        """The machine stood, or what grows began again: the next look has none before it."""
        self._before = None

    def stopped(self, seconds: float) -> None:
        """A machine took so long to stand."""
        self._stop_seconds = max(self._stop_seconds, seconds)

    def epoch(self) -> None:
        """What was seen long ago counts less."""
        self._rate = max(RATE_LEAST, self._rate * RATE_DECAY)

    def seconds_for(self, n_bytes: float) -> float:
        """How long so much takes, at the fastest."""
        return n_bytes / self._rate

    @property
    def ahead(self) -> int:
        """Bytes that may come before the next look, and until the machine stands after it."""
        return int(self._rate * (max(self._gaps) + self._stop_seconds) * AHEAD)
