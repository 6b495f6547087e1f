# SPDX-License-Identifier: Apache-2.0
"""The secondary becomes the machine the world sees; every page is checked before it goes on and after it ran on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from colocache.errors import ColocacheError, NoStateError
from colocache.replication.arbiter import LeaseLostError, Leave
from colocache.replication.events import Events
from colocache.replication.fold import Fold
from colocache.replication.options import Timing
from colocache.replication.results import ms
from colocache.replication.svm import Svm

SLICE_SECONDS = 0.1
FOLD_SECONDS = 60.0  # at the end, for overlays of disks that are not folded yet


def _soonest(rest: float | None) -> float:
    return SLICE_SECONDS if rest is None else min(SLICE_SECONDS, rest)


class Takeover:
    """Promotes `svm`, and runs it as long as `leave` allows. `turn_away` is called now and then while it runs on, for a
    primary that comes too late, and `fold_disks` until it says that it is done."""

    def __init__(
        self,
        svm: Svm,
        timing: Timing,
        events: Events,
        stop: threading.Event,
        *,
        leave: Leave,
        turn_away: Callable[[], None],
        fold_disks: Callable[[], bool] = lambda: True,
    ) -> None:
        self._fold_disks: Callable[[], bool] | None = fold_disks
        self._svm = svm
        self._timing = timing
        self._events = events
        self._stop = stop
        self._leave = leave
        self._turn_away = turn_away

    def promote(self, cause: str, *, detect_ns: int) -> None:
        """Make the machine run as the one the world sees, from its live state.

        NoStateError, LoadFailedError; LeaseLostError: it stands still.
        """
        begin = time.monotonic_ns()
        self._svm.abort_open("failover")
        status = self._svm.cache.status()
        if status.phase.name != "FAILED_OVER":
            self._svm.cache.failover()
        if not self._svm.can_run:
            raise NoStateError(f"epoch {status.sealed_epoch} is sealed, but no machine was restarted from it")
        self._check_leave()
        self._svm.machine.promoted()
        self._svm.disks.take_over()
        self._svm.output.take_over(status.sealed_epoch)
        self._svm.resume()
        self._svm.typed.take_over(status.sealed_epoch)
        promote_ns = time.monotonic_ns() - begin
        self._events.emit("promoted", epoch=status.sealed_epoch, promote_ms=ms(promote_ns))
        n_pages, wrong = self._svm.verify()
        self._check_leave()
        self._svm.resume()
        self._events.emit(
            "takeover",
            f"took over at epoch {status.sealed_epoch} within {promote_ns / 1e6:.2f} ms: {cause}; "
            f"{n_pages} pages verified, {wrong} wrong",
            cause=cause,
            detect_ms=ms(detect_ns),
            promote_ms=ms(promote_ns),
            epoch=status.sealed_epoch,
            verified_pages=n_pages,
            wrong_pages=wrong,
        )

    def run_on(self) -> None:
        """Run for `run_on` seconds, or until stopped, on one image as soon as it can be; check every page again."""
        begin, steps = time.monotonic(), self._svm.machine.steps
        seconds = self._timing.run_on
        fold = Fold(self._svm, self._events)
        while not self._stop.wait(_soonest(fold.rest)) and self._svm.machine.failure is None:
            self._check_leave()
            self._turn_away()
            fold.step()
            self._step_of_disks()
            if seconds and time.monotonic() - begin >= seconds:
                break
        self._finish_disks()
        n_pages, wrong = self._svm.verify()
        ran = self._svm.machine.steps - steps
        self._events.emit(
            "ran_on",
            f"ran on for {ran} steps; {n_pages} pages verified, {wrong} wrong",
            steps=ran,
            seconds=round(time.monotonic() - begin, 3),
            verified_pages=n_pages,
            wrong_pages=wrong,
        )

    def _step_of_disks(self) -> None:
        """The overlays of its disks go into their images, while it runs."""
        if self._fold_disks is None:
            return
        try:
            if self._fold_disks():
                self._fold_disks = None
                if self._svm.disks.sizes:
                    self._events.emit("disks_folded", "what it wrote to its disks went into their images")
        except ColocacheError as error:
            self._fold_disks = None
            self._events.emit("fold_error", f"overlays stay beside the images of disks: {error}", error=str(error))

    def _finish_disks(self) -> None:
        """Until it is folded, what the guest was told to be on its disk is in an overlay that ends with its machine."""
        until = time.monotonic() + FOLD_SECONDS
        while self._fold_disks is not None and self._svm.machine.failure is None:
            self._step_of_disks()
            if self._fold_disks is not None and time.monotonic() > until:
                self._events.emit(
                    "fold_error", f"what it wrote to its disks is not in their images after {FOLD_SECONDS:g} s: lost"
                )
                return
            time.sleep(SLICE_SECONDS / 10)

    def _check_leave(self) -> None:
        """A machine that may not go on any more stands still before anything else happens."""
        try:
            self._leave.check()
        except LeaseLostError as error:
            self._svm.pause()
            self._events.emit("lease_lost", str(error), reason=str(error))
            raise
