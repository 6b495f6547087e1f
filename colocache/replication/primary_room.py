# SPDX-License-Identifier: Apache-2.0
"""The primary's side of a memory limit: its machine writes no more than the secondary has room for.

The secondary tells with READY and RECEIVED how many pages may come before the next checkpoint. Near that number the
primary takes one, and if the secondary is not ready for it yet, the machine stands until it is.
"""

from __future__ import annotations

import time

from colocache.replication.events import Events
from colocache.replication.growth import Growth
from colocache.replication.pvm import Pvm

PAGE = 4096
NEAR = 0.75  # of the allowance: time for a checkpoint
RUNS_LEAST = 0.25  # of the allowance, which a machine may always write: one that stands for ever is no use
LOOK_SECONDS = (0.001, 0.005)  # between two looks: a guest fills a small room in no time
SYNC_SECONDS = 0.02  # between two takings of a log that can't be looked into


class PrimaryRoom:
    """What of its allowance `pvm` has used. The session's thread calls all of it."""

    def __init__(self, pvm: Pvm, events: Events) -> None:
        self._pvm = pvm
        self._events = events
        self._growth = Growth()
        self._synced = 0.0
        self._said = False
        self._stands_since = 0  # CLOCK_MONOTONIC in ns; 0: it runs, or stands for another reason

    def look_again(self) -> float:
        """Seconds until the next look is due; 0: the secondary's memory has no limit."""
        if not self._pvm.allowance:
            return 0.0
        return max(LOOK_SECONDS[0], min(LOOK_SECONDS[1], self._growth.seconds_for(self._pvm.allowance * PAGE / 8)))

    def told(self, n_pages: int) -> None:
        """The secondary says how many pages may come before the next checkpoint; 0 = any number."""
        self._pvm.allowance = n_pages
        self._growth.epoch()
        self._growth.anew()

    def near(self) -> bool:
        """Is it time for a checkpoint?"""
        allowance = self._pvm.allowance
        return bool(allowance) and (not self._pvm.running or self._pages() >= NEAR * allowance)

    def look(self) -> None:
        """Let the machine stand if it may pass the allowance before the next look."""
        allowance, pvm = self._pvm.allowance, self._pvm
        if not allowance or not pvm.running:
            return
        now = time.monotonic()
        pages = self._pages(now)
        self._growth.look(now, pages * PAGE)
        ahead = self._growth.ahead // PAGE
        if pages >= max(RUNS_LEAST * allowance, allowance - ahead):
            self.stand()
            self._growth.stopped(time.monotonic() - now)
            self._growth.anew()
            sentence = (
                f"the machine stands until the next checkpoint: it has written {pages} pages since the last, and the "
                f"memory limit of the secondary leaves room for {allowance}"
            )
            self._events.emit("at_limit", "" if self._said else sentence, pages=pages, allowance=allowance)
            self._said = True

    def stand(self) -> None:
        """The machine stands from now until the checkpoint, and what it wrote is known to the page."""
        self._stands_since = self._stands_since or time.monotonic_ns()
        self._pvm.pause()
        if not self._pvm.pair.in_flight:
            self._pvm.sync()

    def stood_ns(self, now_ns: int) -> int:
        """How long it has stood at `now_ns` for want of room; asked once, when the checkpoint's own pause begins."""
        since, self._stands_since = self._stands_since, 0
        return now_ns - since if since else 0

    def lift(self) -> None:
        """No checkpoint comes any more: the machine runs on."""
        self._pvm.allowance = 0
        self._pvm.resume()

    def _pages(self, now: float = 0.0) -> int:
        """At most so many pages are of the open epoch."""
        pvm = self._pvm
        hint = pvm.machine.dirty_hint()
        if not hint and pvm.running and not pvm.pair.in_flight and now - self._synced >= SYNC_SECONDS:
            self._synced = now
            pvm.sync()  # a log that tells nothing before it is taken
        return pvm.unacked_pages + hint
