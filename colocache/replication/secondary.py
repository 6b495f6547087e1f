# SPDX-License-Identifier: Apache-2.0
"""The secondary's life: wait for its primary, follow it, wait again after a loss, take over when the arbiter says so.

door.py finds the primary, one connection is a `SecondarySession`; this module decides between them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from colocache import Cache, Phase
from colocache.disks.apart import Disks
from colocache.errors import (
    ColocacheError,
    FailedOverError,
    NoMemoryError,
    NoStateError,
    PeerLostError,
    SystemCallError,
    TimedOutError,
)
from colocache.outputs.apart import ApartOutput
from colocache.outputs.typed import TypedInput
from colocache.replication.arbiter import Arbiter, Leave, Loss, SoloArbiter
from colocache.replication.channel import Channel
from colocache.replication.door import Door
from colocache.replication.errors import ProtocolError, RefusedError, SessionEndedError
from colocache.replication.events import Events
from colocache.replication.memory_limit import MemoryLimit
from colocache.replication.messages import AbortKind, MessageType
from colocache.replication.options import SecondaryOptions
from colocache.replication.results import CheckpointResult
from colocache.replication.secondary_session import SecondarySession, StoppedError, TakeOverNowError
from colocache.replication.signals import Flag
from colocache.replication.svm import Svm
from colocache.replication.takeover import Takeover
from colocache.replication.trace import Trace
from colocache.replication.transport import PlainTransport, Wrap
from colocache.vmm.machine import Machine

RESTARTING = ("REPLAYED", "RESTART")  # what a recovery did that leaves an epoch for a fresh machine to load
LOST = (PeerLostError, TimedOutError, ProtocolError, SessionEndedError)
OPERATOR = "the operator asked for it"
TOLD = "the secondary takes over: its operator said that the primary is dead"


@dataclass(frozen=True)
class SecondarySummary:
    """How a secondary ended."""

    checkpoints: int
    epoch: int
    took_over: bool
    verified_pages: int  # at all moments together
    wrong_pages: int
    end: str  # one sentence


@dataclass(frozen=True)
class _Absence:
    """Since when this side waits for its primary, and why; times are CLOCK_MONOTONIC in seconds."""

    cause: str  # "" = it never came
    heard: float  # it was last heard
    noticed: float
    until: float  # this side waits so long before it decides what to do without it


class Secondary:
    """Follows a primary on `listener` until that ends, or until this machine has taken over and run on.

    `stop` ends it at the next safe point. `request_failover` and `request_checkpoint` may be called from any thread.
    """

    def __init__(
        self,
        *,
        cache: Cache,
        machine: Machine,
        listener: socket.socket,
        machine_name: str,
        options: SecondaryOptions,
        events: Events,
        stop: threading.Event,
        arbiter: Arbiter | None = None,
        output: ApartOutput | None = None,
        typed: TypedInput | None = None,
        disks: Disks | None = None,
        fold_disks: Callable[[], bool] = lambda: True,
        wrap: Wrap = PlainTransport,
        control_fd: int = -1,
        spill_fd: int = -1,
        trace: Trace | None = None,
    ) -> None:
        self.svm = Svm(cache, machine, events, output, typed, disks)
        self._fold_disks = fold_disks
        self.cache = cache
        self.options = options
        self.timing = options.timing
        self.events = events
        self.stop = stop
        self.checkpoints = 0
        self._trace = trace
        self._limit: MemoryLimit | None = None
        if options.memory_limit:
            self._limit = MemoryLimit(
                self.svm, options.memory_limit, control_fd=control_fd, events=events, spill_fd=spill_fd
            )
        self._door = Door(
            cache,
            listener,
            machine_name=machine_name,
            options=options,
            events=events,
            wrap=wrap,
            ready=self._limit.ready if self._limit else lambda: 0,
            disks=self.svm.disks,
        )
        self._leave = Leave(arbiter or SoloArbiter())
        self._arbiter_said_no = False
        self._checkpoint_wanted = Flag()
        self._failover_asked = threading.Event()
        self._loading = cache.recovery is not None and cache.recovery.action.name in RESTARTING
        self._loading_lock = threading.Lock()
        self._channel: Channel | None = None

    # ---- from other threads ----

    def request_checkpoint(self) -> None:
        """Ask the primary for a checkpoint. Also from a signal handler."""
        self._checkpoint_wanted.set()

    def request_failover(self) -> bool:
        """The operator declares the primary dead: take over. False: an epoch is sealed and is finished first.

        NoStateError, LoadFailedError: there is nothing to take over from, and nothing was changed.
        """
        with self._loading_lock:
            if self._loading:  # a takeover granted now would be final, and nothing to attach to if the load fails
                self._failover_asked.set()
                return False
        found = self.cache.failover()
        self._failover_asked.set()
        channel = self._channel
        if found.now and channel is not None:
            channel.last_word(AbortKind.TOOK_OVER, TOLD)
        return found.now

    # ---- life ----

    def run(self) -> SecondarySummary:
        """Follow the primary to the end. Raises when there never was a pair, or nothing to take over from."""
        with self._door, self._limit or contextlib.nullcontext():
            try:
                return self._live()
            except BaseException:
                with contextlib.suppress(ColocacheError):  # the error that ends this side says more
                    self.svm.pause()
                raise

    def _live(self) -> SecondarySummary:
        self._come_back()
        absence = self._first_absence()
        while True:
            channel = self._next_primary(absence)
            if self._failover_asked.is_set():
                if channel is not None:
                    channel.last_word(AbortKind.TOOK_OVER, TOLD)
                    self._door.see_out(channel)
                return self._take_over(OPERATOR, absence)
            decided = self._nobody_came(absence) if channel is None else self._follow(channel, absence)
            if isinstance(decided, SecondarySummary):
                return decided
            absence = decided

    def _first_absence(self) -> _Absence:
        """In a fresh process the primary has not come yet; in one that attached it may know us already."""
        now = time.monotonic()
        if self.cache.status().sealed_epoch:
            return _Absence("the primary did not come back", now, now, now + self._patience)
        return _Absence("", now, now, now + self._patience)

    @property
    def _patience(self) -> float:
        """Seconds to wait for a primary before deciding anything: while there is no state to take over from, as long as
        at the start, because nothing else can make this side whole."""
        usable = self.cache.status().sealed_epoch and self.svm.can_run
        return self.timing.reconnect_limit if usable else self.timing.connect_limit

    def _next_primary(self, absence: _Absence) -> Channel | None:
        while True:
            try:
                return self._door.next_primary(
                    absence.until, lambda: self.stop.is_set() or self._failover_asked.is_set()
                )
            except LOST as error:
                now = time.monotonic()
                absence = self._lost(str(error), now, now)

    def _nobody_came(self, absence: _Absence) -> SecondarySummary | _Absence:
        """The wait is over, or this side was stopped: give up, take over, or wait on."""
        if self.stop.is_set():
            return self._summary("stopped", took_over=False)
        limit = f"no primary came within {self._patience:g} s"
        sealed = self.cache.status().sealed_epoch
        if not sealed:
            raise PeerLostError(limit + (f" after this: {absence.cause}" if absence.cause else ""))
        if not self.svm.can_run:
            # The arbiter's yes would make the primary stand still, and nobody would run.
            raise NoStateError(
                f"{limit}, and there is no state to take over from: the machine that ran from epoch {sealed} is gone",
                hint="start a fresh secondary",
            )
        return self._ask_and_take_over(absence)

    def _follow(self, channel: Channel, absence: _Absence) -> SecondarySummary | _Absence:
        """One session, from CHECKPOINT_READY to its end, and what its end means for this side."""
        self._channel = channel
        try:
            end = self._session(channel).run()
            return self._summary(end, took_over=False)
        except (TakeOverNowError, FailedOverError):
            pass
        except StoppedError:
            return self._summary("stopped", took_over=False)
        except RefusedError as error:
            self._door.refuse(str(error))
            return absence
        except (*LOST, NoMemoryError, SystemCallError) as error:
            # No memory for a device state, or a system call that failed: the epoch is given up like one whose
            # connection broke, because the machine that runs here is intact. Not so after the seal.
            if not isinstance(error, LOST) and self.cache.status().phase is Phase.SEALING:
                raise
            if not self._failover_asked.is_set():
                return self._lost(str(error), channel.last_heard, time.monotonic())
        finally:
            self._channel = None
            if self.svm.failed_over:
                # Whoever granted it says so too, but this thread may find out before it has.
                channel.last_word(AbortKind.TOOK_OVER, TOLD)
                self._door.see_out(channel)
            else:
                channel.close()
        now = time.monotonic()
        return self._take_over(OPERATOR, _Absence(OPERATOR, channel.last_heard, now, now))

    def _session(self, channel: Channel) -> SecondarySession:
        channel.start_heartbeat(MessageType.PONG, self.timing.ping_interval)
        return SecondarySession(
            self.svm,
            channel,
            self.options,
            stop=self.stop,
            checkpoint_wanted=self._checkpoint_wanted,
            done=self._checkpoint_done,
            trace=self._trace,
            limit=self._limit,
        )

    def _come_back(self) -> None:
        """In a process that attached: do what the recovery found."""
        recovery = self.cache.recovery
        if recovery is None:
            return
        self.events.emit(
            "attached",
            recovery.sentence,
            action=recovery.action.name,
            epoch=recovery.epoch,
            receiving_epoch=recovery.receiving_epoch,
            pages=recovery.n_pages,
        )
        if recovery.action.name in RESTARTING:
            report = self.svm.restart()
            self.svm.resume()
            self.events.emit(
                "resumed",
                f"runs again from epoch {recovery.epoch}; {report.epoch_hashes_checked} pages verified, "
                f"{len(report.wrong_pages)} wrong",
                epoch=recovery.epoch,
                verified_pages=report.epoch_hashes_checked,
                wrong_pages=len(report.wrong_pages),
            )
            with self._loading_lock:
                self._loading = False

    def _checkpoint_done(self, result: CheckpointResult) -> None:
        self.checkpoints += 1
        self.events.emit("checkpoint", str(result), number=self.checkpoints, **result.to_event())

    def _lost(self, cause: str, heard: float, noticed: float) -> _Absence:
        """The connection is gone: the open epoch is given up, the machine runs on in secret, ready to take over."""
        epoch = self.svm.abort_open(cause)
        if epoch:
            self.events.emit("aborted", f"epoch {epoch} is given up: {cause}", epoch=epoch, reason=cause)
        self.svm.resume()
        self.events.emit(
            "lost",
            f"the primary is lost: {cause}; waiting {self._patience:g} s for it",
            cause=cause,
            detect_ms=round((noticed - heard) * 1e3, 3),
        )
        return _Absence(cause, heard, noticed, noticed + self._patience)

    # ---- taking over ----

    def _ask_and_take_over(self, absence: _Absence) -> SecondarySummary | _Absence:
        """The primary did not come back in time. If the arbiter says no, it is waited for once more."""
        status = self.cache.status()
        history, epoch = bytes(status.history_id).hex(), status.sealed_epoch
        seconds = time.monotonic() - absence.heard
        verdict = self._leave.take(Loss("secondary", self.options.pair, history, epoch, absence.cause, seconds))
        if not verdict.yes:
            self.events.emit("refused", f"not taking over: {verdict.sentence}", reason=verdict.sentence)
            if self._arbiter_said_no:
                raise NoStateError(f"this secondary may not take over: {verdict.sentence}", hint="ask its operator")
            self._arbiter_said_no = True
            return replace(absence, until=time.monotonic() + self.timing.connect_limit)
        self.events.emit("arbiter", verdict.sentence)
        return self._take_over(absence.cause, absence)

    def _take_over(self, cause: str, absence: _Absence) -> SecondarySummary:
        if self._limit:
            self._limit.lift()  # it must never stop the only machine
        takeover = Takeover(
            self.svm,
            self.timing,
            self.events,
            self.stop,
            leave=self._leave,
            turn_away=self._door.turn_away,
            fold_disks=self._fold_disks,
        )
        try:
            takeover.promote(cause, detect_ns=round((absence.noticed - absence.heard) * 1e9))
            takeover.run_on()
        finally:
            self._leave.give_back()
        return self._summary(f"took over: {cause}", took_over=True)

    def _summary(self, end: str, *, took_over: bool) -> SecondarySummary:
        self.svm.pause()
        summary = SecondarySummary(
            checkpoints=self.checkpoints,
            epoch=self.cache.status().sealed_epoch,
            took_over=took_over,
            verified_pages=self.svm.verified_pages,
            wrong_pages=self.svm.wrong_pages,
            end=end,
        )
        self.events.emit(
            "end",
            f"{end}; {summary.checkpoints} checkpoints, {summary.verified_pages} pages verified, "
            f"{summary.wrong_pages} wrong",
            **vars(summary),
        )
        return summary
