# SPDX-License-Identifier: Apache-2.0
"""The secondary's life: wait for its primary, follow it, wait again after a loss, take over when the arbiter says so.

One connection is a `SecondarySession`; this module decides between them.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from dataclasses import dataclass

from colocache import Cache, Phase
from colocache.errors import (
    FailedOverError,
    NoMemoryError,
    NoStateError,
    PeerLostError,
    SystemCallError,
    TimedOutError,
)
from colocache.replication.channel import Channel, Message
from colocache.replication.errors import DeclaredLostError, ProtocolError, RefusedError, SessionEndedError
from colocache.replication.events import Events
from colocache.replication.failover import Arbiter, Loss, SoloArbiter
from colocache.replication.messages import AbortKind, Hello, HelloBlock, MessageType, check_pair
from colocache.replication.options import SecondaryOptions
from colocache.replication.results import CheckpointResult
from colocache.replication.secondary_session import SecondarySession, StoppedError, TakeOverNowError
from colocache.replication.signals import Flag
from colocache.replication.streams_in import take_streams
from colocache.replication.svm import Svm
from colocache.replication.takeover import Takeover
from colocache.replication.waiting_room import WaitingRoom
from colocache.vmm.machine import Machine

STREAMS_SHARE = 0.8  # of the peer timeout, for the further streams to come: the primary still listens then

RESTARTING = ("REPLAYED", "RESTART")  # what a recovery did that leaves an epoch for a fresh machine to load
LOST = (PeerLostError, TimedOutError, ProtocolError, SessionEndedError)


@dataclass(frozen=True)
class SecondarySummary:
    """How a secondary ended."""

    checkpoints: int
    epoch: int
    took_over: bool
    verified_pages: int  # at all moments together
    wrong_pages: int
    end: str  # one sentence


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
        blocks: tuple[HelloBlock, ...],
        machine_name: str,
        options: SecondaryOptions,
        events: Events,
        stop: threading.Event,
        arbiter: Arbiter | None = None,
    ) -> None:
        self.svm = Svm(cache, machine, events)
        self.cache = cache
        self.options = options
        self.timing = options.timing
        self.events = events
        self.stop = stop
        self.checkpoints = 0
        self._listener = listener
        self._room = WaitingRoom(
            listener,
            peer_timeout=options.timing.peer_timeout,
            device_state_max=cache.status().device_state_max_bytes,
        )
        self._blocks = blocks
        self._machine_name = machine_name
        self._arbiter = arbiter or SoloArbiter()
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
            channel.shut_down()
        return found.now

    # ---- life ----

    def run(self) -> SecondarySummary:
        """Follow the primary to the end. Raises when there never was a pair, or nothing to take over from."""
        with contextlib.closing(self._room):
            return self._live()

    def _live(self) -> SecondarySummary:
        self._come_back()
        sealed = self.cache.status().sealed_epoch
        cause = "the primary did not come back" if sealed else ""
        heard = time.monotonic()
        noticed = heard
        deadline = noticed + (self._reconnect_limit if sealed else self.timing.connect_limit)
        while True:
            came = self._accept(deadline)
            if self._failover_asked.is_set():
                if came is not None:
                    came[0].close()
                return self._take_over("the operator asked for it", heard, noticed)
            if came is None:
                if self.stop.is_set():
                    return self._summary("stopped", took_over=False)
                if not self.cache.status().sealed_epoch:
                    limit = self.timing.reconnect_limit if cause else self.timing.connect_limit
                    after = f" after this: {cause}" if cause else ""
                    raise PeerLostError(f"no primary came within {limit:g} s{after}")
                if not self.svm.can_run:
                    # The arbiter's yes would make the primary stand still, and nobody would run.
                    raise NoStateError(
                        f"no primary came within {self._reconnect_limit:g} s, and there is no state to take over from: "
                        f"the machine that ran from epoch {self.cache.status().sealed_epoch} is gone",
                        hint="start a fresh secondary",
                    )
                taken = self._ask_and_take_over(cause, heard, noticed)
                if taken is not None:
                    return taken
                deadline = time.monotonic() + self.timing.connect_limit
                continue
            channel, first = came
            with contextlib.ExitStack() as stack:
                stack.enter_context(channel)
                try:
                    if not self._greet(channel, first):
                        stack.pop_all()  # the room closes it: a stranger that does not read costs nobody time
                        self._room.see_out(channel)
                        continue
                    end = self._follow(channel)
                    return self._summary(end, took_over=False)
                except (TakeOverNowError, FailedOverError):
                    return self._take_over("the operator asked for it", channel.last_heard, time.monotonic())
                except StoppedError:
                    return self._summary("stopped", took_over=False)
                except (*LOST, NoMemoryError, SystemCallError) as error:
                    # No memory for a device state, or a system call that failed: the epoch is given up like one whose
                    # connection broke, because the machine that runs here is intact. Not so after the seal.
                    if not isinstance(error, LOST) and self.cache.status().phase is Phase.SEALING:
                        raise
                    if self._failover_asked.is_set():
                        return self._take_over("the operator asked for it", channel.last_heard, time.monotonic())
                    cause, heard, noticed = str(error), channel.last_heard, time.monotonic()
                    self._lost(cause, heard, noticed)
                    deadline = noticed + self._reconnect_limit
                finally:
                    self._channel = None

    @property
    def _reconnect_limit(self) -> float:
        """Seconds that a lost primary has. One that alone can make this side whole has as long as at the start."""
        broken = self.cache.status().sealed_epoch and not self.svm.can_run
        return self.timing.connect_limit if broken else self.timing.reconnect_limit

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

    def _follow(self, channel: Channel) -> str:
        self._channel = channel
        channel.start_heartbeat(MessageType.PONG, self.timing.ping_interval)
        session = SecondarySession(
            self.svm,
            channel,
            self.options,
            stop=self.stop,
            checkpoint_wanted=self._checkpoint_wanted,
            done=self._checkpoint_done,
        )
        return session.run()

    def _checkpoint_done(self, result: CheckpointResult) -> None:
        self.checkpoints += 1
        self.events.emit("checkpoint", str(result), number=self.checkpoints, **result.to_event())

    def _lost(self, cause: str, heard: float, noticed: float) -> None:
        """The connection is gone: the open epoch is given up, the machine runs on in secret, ready to take over."""
        epoch = self.svm.abort_open(cause)
        if epoch:
            self.events.emit("aborted", f"epoch {epoch} is given up: {cause}", epoch=epoch, reason=cause)
        self.svm.resume()
        self.events.emit(
            "lost",
            f"the primary is lost: {cause}; waiting {self._reconnect_limit:g} s for it",
            cause=cause,
            detect_ms=round((noticed - heard) * 1e3, 3),
        )

    # ---- pairing ----

    def _accept(self, deadline: float) -> tuple[Channel, Message | ProtocolError] | None:
        """The next connection and its first word; None at the deadline, when stopped, and when failover was wanted."""
        return self._room.next(deadline, lambda: self.stop.is_set() or self._failover_asked.is_set())

    def _own_hello(self, *, lost: bool = False) -> Hello:
        status = self.cache.status()
        return Hello(
            role="secondary",
            pair=self.options.pair,
            history=bytes(status.history_id),
            sealed_epoch=status.sealed_epoch,
            used_epoch=max(status.receiving_epoch, status.sealed_epoch),
            lost=lost,
            machine=self._machine_name,
            blocks=self._blocks,
            streams=self.options.streams,
            session=secrets.token_bytes(16),
        )

    def _greet(self, channel: Channel, first: Message | ProtocolError) -> bool:
        """HELLO both ways. False: whoever came was no primary of ours and was sent away.

        A stranger must not harm a pair that is in step. One that has no state yet ends with the stranger's mistake,
        because that is most likely its own configuration.
        """
        own = self._own_hello()
        try:
            if isinstance(first, ProtocolError):
                raise first
            if first.type is MessageType.STREAM:
                channel.abort(AbortKind.REFUSED, "the stream belongs to a session that is over")
                return False  # of a primary that was lost before its streams were taken
            if first.type is not MessageType.HELLO:
                raise ProtocolError(f"the peer sent {first} where HELLO must come")
            peer = Hello.decode(first.body)
            self._check_peer(own, peer)
        except (ProtocolError, RefusedError) as error:
            kind = AbortKind.SESSION if isinstance(error, ProtocolError) else AbortKind.REFUSED
            channel.abort(kind, str(error))
            if isinstance(error, DeclaredLostError) or not own.sealed_epoch:
                channel.linger()
                raise RefusedError(str(error)) from error
            self.events.emit("refused", f"sent a peer away: {error}", reason=str(error))
            return False
        self._room.close()
        channel.send(MessageType.HELLO, body=own.encode())
        self._take_streams(channel, own)
        channel.send(MessageType.CHECKPOINT_READY)
        self.events.emit(
            "hello",
            f"paired with a primary, newest sealed epoch {own.sealed_epoch}",
            sealed_epoch=own.sealed_epoch,
            used_epoch=own.used_epoch,
        )
        return True

    def _take_streams(self, channel: Channel, own: Hello) -> None:
        def refused(reason: str) -> None:
            self.events.emit("refused", f"sent a stream away: {reason}", reason=reason)

        seconds = STREAMS_SHARE * self.timing.peer_timeout
        try:
            take_streams(channel, self._listener, own, seconds=seconds, refused=refused)
        except (TimedOutError, ProtocolError) as error:
            channel.abort(AbortKind.SESSION, str(error))
            channel.linger()
            raise

    def _check_peer(self, own: Hello, peer: Hello) -> None:
        reason = check_pair(own, peer)
        if reason is None:
            if peer.lost and peer.history == own.history:
                raise DeclaredLostError("the primary declared this secondary lost: start a fresh one")
            if peer.history is None or peer.lost or not (own.sealed_epoch or peer.sealed_epoch):
                # An initial copy comes; whose it is does not matter as long as nothing is sealed here.
                if own.sealed_epoch:
                    reason = f"this secondary holds epoch {own.sealed_epoch} of another primary: start a fresh one"
            elif peer.history != own.history:
                reason = "the primary has another history: its memory is not that of this pair"
            elif not peer.sealed_epoch <= own.sealed_epoch <= peer.used_epoch:
                reason = (
                    f"the primary knows epoch {peer.sealed_epoch} to be sealed and has used {peer.used_epoch}; this "
                    f"secondary has sealed {own.sealed_epoch}"
                )
        if reason is not None:
            raise RefusedError(reason)

    # ---- taking over ----

    def _ask_and_take_over(self, cause: str, heard: float, noticed: float) -> SecondarySummary | None:
        """The primary did not come back in time. None: the arbiter says no, for now."""
        status = self.cache.status()
        history, epoch = bytes(status.history_id).hex(), status.sealed_epoch
        loss = Loss("secondary", self.options.pair, history, epoch, cause, time.monotonic() - heard)
        verdict = self._arbiter.decide(loss)
        if not verdict.yes:
            self.events.emit("refused", f"not taking over: {verdict.sentence}", reason=verdict.sentence)
            if self._arbiter_said_no:
                raise NoStateError(f"this secondary may not take over: {verdict.sentence}", hint="ask its operator")
            self._arbiter_said_no = True
            return None
        self.events.emit("arbiter", verdict.sentence)
        return self._take_over(cause, heard, noticed)

    _arbiter_said_no = False

    def _take_over(self, cause: str, heard: float, noticed: float) -> SecondarySummary:
        takeover = Takeover(self.svm, self.timing, self.events, self.stop, turn_away=self._turn_away)
        takeover.promote(cause, detect_ns=round((noticed - heard) * 1e9))
        takeover.run_on()
        return self._summary(f"took over: {cause}", took_over=True)

    def _turn_away(self) -> None:
        """After a takeover: a primary that was not dead is told, so that it stands still."""
        came = self._room.next(time.monotonic(), lambda: False, last_word=0.0)
        if came is None:
            return
        with came[0] as channel:
            if isinstance(came[1], ProtocolError):
                return
            try:
                channel.send(MessageType.HELLO, body=self._own_hello(lost=True).encode())
            except (PeerLostError, TimedOutError):
                return
            channel.linger()
        self.events.emit("refused", "a primary came after the takeover and was told so", reason="took over")

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
