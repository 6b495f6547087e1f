# SPDX-License-Identifier: Apache-2.0
"""The operator's limit on what a bounded secondary takes beside its image: staged pages, private pages, bookkeeping.

What is left of the limit after the bookkeeping is *room*. From one checkpoint to the next it is in two parts:

* the primary's share, which it is told with READY and RECEIVED: the engine refuses a page beyond it. Near it the
  primary takes a checkpoint by itself, and its machine stands if the secondary is not ready for one (primary_room.py);
* the rest is the machine's. A thread looks at its private pages every few milliseconds. Near the end of its part a
  checkpoint is asked for, and before the end the vCPUs stand until both are in step again.

In a checkpoint the machine stands, so that its private pages are counted exactly, and all that they leave is the
primary's (REPLY). If that is too little for what the primary says it has, they are given up: the machine's own branch
is gone then, and if the epoch fails it starts again from the epoch before. If that does not do either and the operator
named a spill folder, the primary may have as many pages more as its disk has room for: the engine writes what the room
does not hold into the spill file (csrc/spill.h), whose own memory is bookkeeping. Else, or if the disk is too small as
well, the epoch is aborted, and the primary goes on alone.

How far ahead of the end the vCPUs must stand is measured: the fastest growth seen, times the longest time between two
looks. A machine that writes faster still, in the longest gap yet, passes its part by that: `passed_bytes` says so. A
part smaller than what may come unseen is no part to run in: the machine then stands at its epoch, ready to take over,
which has no limit. The share follows how fast either side fills its part.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable

from colocache import BlockSpec, spill
from colocache.errors import ArgumentError, ColocacheError
from colocache.replication.events import Events
from colocache.replication.growth import Growth
from colocache.replication.svm import Svm

PAGE = 4096
LEAST_PAGES = 64  # of room: less is no secondary that could be kept in step
LOADED_PAGES = 16  # that become private when a machine loads its device state, about
SHARE_MIN, SHARE_MAX = 0.25, 0.75  # of the room, for the primary
NEAR = 0.75  # of the machine's part: a checkpoint is asked for
LOOK_SECONDS = 0.002
LOOK_SHARE = 0.1  # of a core, at most, for looking


def bookkeeping_of(blocks: Iterable[BlockSpec], *, spills: bool = False) -> int:
    """Bytes of bitmaps for these blocks: three in the region, one in the process; and the region's fixed parts. With a
    spill file one bitmap more, and what of it is in memory."""
    bitmaps = 5 if spills else 4
    return sum(-(-block.n_pages // 8) * bitmaps for block in blocks) + (64 << 10) + spills * spill.WINDOW_BYTES


def whole_pages(n_bytes: int) -> int:
    """At least one."""
    return max(PAGE, n_bytes // PAGE * PAGE)


def check_limit(n_bytes: int, blocks: Iterable[BlockSpec], memory_mode: str, *, spills: bool = False) -> None:
    """ArgumentError: no secondary of these blocks can keep this limit. 0 is none."""
    if not n_bytes:
        if spills:
            raise ArgumentError("a spill folder without a limit: give --memory-limit, beyond which pages are spilled")
        return
    if memory_mode != "bounded":
        raise ArgumentError(f"a memory limit of {n_bytes} bytes: only --memory bounded can keep one")
    fixed = bookkeeping_of(blocks, spills=spills)
    if n_bytes < fixed + LEAST_PAGES * PAGE:
        raise ArgumentError(
            f"a memory limit of {n_bytes} bytes: the bitmaps of this guest {'and spilling ' * spills}take {fixed}, and "
            f"{LEAST_PAGES} pages are the least to keep it in step: give at least {fixed + LEAST_PAGES * PAGE}"
        )


class MemoryLimit:
    """Holds `svm` below `n_bytes`. Context manager: it looks from enter to exit; after `lift` there is no limit.

    `control_fd`: of the control region, whose memory counts; `spill_fd`: of the cache's spill file, -1 if it has none.
    One session's thread calls `ready`, `make_room` and `share`.
    """

    def __init__(self, svm: Svm, n_bytes: int, *, control_fd: int, events: Events, spill_fd: int = -1) -> None:
        self._svm = svm
        self._cache = svm.cache
        self._n_bytes = n_bytes
        self._control_fd, self._spill_fd = control_fd, spill_fd
        self._spill_was_said = False
        self._events = events
        self.ask: Callable[[], None] = lambda: None  # the primary for a checkpoint; any thread
        self._share = whole_pages(self._room() // 2)
        self._growth = Growth()
        self._latency = 0.05  # from asking to standing
        self._speeds = (0.0, 0.0)  # of the primary's pages and of the machine's, bytes a second
        self._stand_was_said = False
        self._looking_failed = False
        self._passed = 0  # bytes by which the machine's part was passed: it wrote faster than ever before
        self._aside = 0  # private pages of the epoch before, which the flush forgot and nobody has freed yet
        self._begin_epoch()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="colocache-limit", daemon=True)
        svm.may_run = self._may_run

    def __enter__(self) -> MemoryLimit:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lift()

    def lift(self) -> None:
        """This machine is the one that the world sees: nothing holds it up any more."""
        self._svm.may_run = None
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    # ---- the session's: what the primary is told ----

    def ready(self) -> int:
        """The most pages that the primary may have dirtied before it asks for a checkpoint; 0 = no limit."""
        if not self._cache.status().sealed_epoch:
            return 0  # the initial copy goes straight into the image
        self._cache.limit_staged(self._share)
        return self._share // PAGE

    def make_room(self, wanted_pages: int) -> int:
        """The machine stands for a checkpoint of about `wanted_pages`: how many it may have; 0 = no limit."""
        if not self._cache.status().sealed_epoch:
            return 0
        now = time.monotonic()
        if self._asked:
            self._latency = (self._latency + now - self._asked) / 2
        if self._stood and self._standing_since:
            self._stood_seconds += now - self._standing_since
        self._private = self._peak_private = self._see_end()
        self._ran_seconds = max(0.0, now - self._began - self._stood_seconds)
        room = self._room()
        wanted = (wanted_pages + wanted_pages // 8) * PAGE
        if self._private and self._private + wanted > room:
            self._svm.give_up()
            self._events.emit(
                "private_given_up",
                f"the memory limit of {self._n_bytes} bytes leaves no room for the machine's {self._private} bytes of "
                f"private pages beside a checkpoint of {wanted_pages} pages: they are given up",
                private_bytes=self._private,
                wanted_pages=wanted_pages,
            )
            self._private = 0
        left = max(PAGE, room - self._private)
        self._cache.limit_staged(left)
        return left // PAGE + self._may_spill(wanted_pages, left)

    def _may_spill(self, wanted_pages: int, left: int) -> int:
        """How many pages more the primary may have, as they go to the disk and not into memory. None while there is
        something private to give up: a checkpoint that has grown meanwhile is told anew, and then that goes first."""
        if self._spill_fd < 0 or self._private:
            return 0
        try:
            free = spill.free_bytes(self._spill_fd)
        except OSError:  # a disk that nobody can ask takes nothing
            return 0
        if wanted_pages * PAGE > left:
            sentence = (
                f"the memory limit of {self._n_bytes} bytes leaves room for {left // PAGE} pages of a checkpoint of "
                f"{wanted_pages}: the others go into the spill file, whose disk has {free} bytes free"
            )
            said = "" if self._spill_was_said else sentence
            self._events.emit("spills", said, wanted_pages=wanted_pages, room_pages=left // PAGE, free_bytes=free)
            self._spill_was_said = True
        return free // PAGE

    def share(self) -> int:
        """The epoch is sealed and not flushed: the primary's share of the next, in pages. Reports what it took."""
        status, fixed, room = self._cache.status(), self._fixed(), self._room()
        staged = status.staged_bytes
        seconds = max(1e-3, time.monotonic() - self._began)
        self._events.emit(
            "memory",
            bytes=fixed + staged + self._private,
            staged_bytes=staged,
            spilled_bytes=status.spilled_bytes,
            private_bytes=self._peak_private,
            bookkeeping_bytes=fixed,
            share_bytes=self._share,
            passed_bytes=self._passed,
            asked=bool(self._asked),
            stood_ms=round(self._stood_seconds * 1e3, 3),
        )
        self._share = self._next_share(room, (staged + status.spilled_bytes) / seconds)
        self._growth.epoch()
        self._aside = self._private
        self._begin_epoch()
        return self._share // PAGE

    def _next_share(self, room: int, speed: float) -> int:
        """Both parts are to be full at the same time, and the machine's is to be one that it can run in."""
        mine = self._peak_private / self._ran_seconds if self._ran_seconds else self._speeds[1]
        self._speeds = ((self._speeds[0] + speed) / 2, (self._speeds[1] + mine) / 2)
        both = sum(self._speeds)
        least, most = int(room * SHARE_MIN), int(room * SHARE_MAX)
        if room - least <= self._growth.ahead:  # there is no part that the machine could run in
            return whole_pages(room - LOADED_PAGES * PAGE)
        wanted = min(int(room * self._speeds[0] / both) if both else room // 2, room - int(1.5 * self._growth.ahead))
        return whole_pages(max(least, min(most, wanted)))

    # ---- how much ----

    def _fixed(self) -> int:
        """Bookkeeping: the control region as the kernel counts it, and the bitmaps of staged pages in this process."""
        heap = sum(-(-block.n_pages // 8) for block in self._cache.blocks.values())
        spilling = heap + spill.WINDOW_BYTES if self._spill_fd >= 0 else 0
        return os.fstat(self._control_fd).st_blocks * 512 + heap + spilling

    def _room(self) -> int:
        return max(2 * PAGE, self._n_bytes - self._fixed())

    # ---- the machine ----

    def _see_end(self) -> int:
        """What is private, the machine standing; more than its part is said with the epoch."""
        private = self._svm.machine.private_bytes()
        self._passed = max(self._passed, private - (self._room() - self._share))
        return private

    def _begin_epoch(self) -> None:
        self._began = time.monotonic()
        self._asked = 0.0  # when
        self._stood = False
        self._standing_since = 0.0
        self._stood_seconds = 0.0
        self._ran_seconds = 0.0
        self._private = self._peak_private = 0
        self._passed = 0

    def _may_run(self) -> bool:
        """Before the machine runs: is there room? Staged and private pages that nobody needs any more go first."""
        self._cache.limit_staged(self._share)
        self._growth.anew()
        part = self._room() - self._share
        if self._growth.ahead >= part:
            self._stand(f"a part of {part} bytes is less than it may write before it is seen")
            return False
        if self._cache.status().staged_bytes + self._aside + self._growth.ahead > self._room():
            self._svm.tidy()
        self._aside = 0  # else it is freed right after the start
        self._stood, self._standing_since = False, 0.0
        return True

    def _stand(self, why: str) -> None:
        self._stood, self._standing_since = True, time.monotonic()
        sentence = f"the machine stands until the next checkpoint, for its memory limit of {self._n_bytes} bytes: {why}"
        self._events.emit("at_limit", "" if self._stand_was_said else sentence, why=why)
        self._stand_was_said = True

    def _watch(self) -> None:
        wait = LOOK_SECONDS
        while not self._end.wait(wait):
            begin = time.monotonic()
            try:
                self._look(begin)
            except (ColocacheError, OSError) as error:  # the machine ended, which its session notices
                if not self._looking_failed:
                    self._events.emit("limit_error", f"private pages can't be counted: {error}", error=str(error))
                self._looking_failed = True
            wait = max(LOOK_SECONDS, (time.monotonic() - begin) / LOOK_SHARE)

    def _look(self, now: float) -> None:
        svm = self._svm
        runs = svm.runs
        if not svm.running or not self._cache.status().sealed_epoch:
            self._growth.anew()
            return
        private = svm.machine.private_bytes()
        self._growth.look(now, private)
        part = self._room() - self._share
        ahead = self._growth.ahead
        stands = private + ahead >= part
        if stands:
            begin = time.monotonic()
            if svm.hold(runs):
                self._growth.stopped(time.monotonic() - begin)
                private = self._see_end()
                self._stand(f"{private} bytes are private, its part is {part}")
        growth = private / max(1e-3, now - self._began)
        if stands or private + ahead + growth * self._latency >= NEAR * part:
            if not self._asked:
                self._asked = now
            with contextlib.suppress(ColocacheError):  # the session that could be asked is over
                self.ask()
