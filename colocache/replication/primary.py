# SPDX-License-Identifier: Apache-2.0
"""The primary's life: connect, pair, keep the secondary in step, reconnect after a loss, or go on alone.

One connection is a `PrimarySession`; this module decides between them. What it must never get wrong is *unacked*: the
pages taken from the dirty log since the last RECEIVED. While it is unknown whether the epoch in flight was sealed, user
space may still mark pages: they are pending, and what is pending stays unacked when the sender is told "N is sealed".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from colocache import Sender
from colocache.errors import ColocacheError, PeerLostError, TimedOutError
from colocache.replication.address import Address
from colocache.replication.channel import Channel
from colocache.replication.errors import (
    ProtocolError,
    RefusedError,
    SecondaryLostError,
    SessionEndedError,
    TookOverError,
)
from colocache.replication.events import Events
from colocache.replication.failover import Arbiter, Loss, SoloArbiter
from colocache.replication.inbox import meaning_of
from colocache.replication.messages import AbortKind, Hello, HelloBlock, MessageType, check_pair, decode_reason
from colocache.replication.options import PrimaryOptions
from colocache.replication.results import SentCheckpoint
from colocache.replication.signals import Flag
from colocache.replication.streams_out import open_streams
from colocache.vmm.machine import Machine, VerifyReport

RETRY_SECONDS = 0.1  # between two tries to connect
PROTOCOL_ERRORS_MAX = 3  # in a row, without a checkpoint in between: then it is not the weather


@dataclass
class PairState:
    """What a primary knows about its secondary, across connections."""

    history: bytes | None = None  # of the secondary it is paired with
    lost_history: bytes | None = None  # of the secondary it declared lost
    sealed_epoch: int = 0  # newest epoch known to be sealed
    used_epoch: int = 0  # newest number used
    in_flight: int = 0  # epoch whose device state may have arrived whole, and whose RECEIVED has not; 0 = none
    checkpoints: int = 0  # done, in all


@dataclass(frozen=True)
class PrimarySummary:
    """How a primary ended."""

    checkpoints: int
    epoch: int
    alone: bool
    verified_pages: int
    wrong_pages: int
    end: str  # one sentence


class Primary:
    """Runs `machine` as a primary until it is stopped or has done its checkpoints.

    `stop` ends it at the next safe point; `request_checkpoint` may be called from any thread or signal handler.
    `release_output(epoch)` is called when what the machine has sent out up to `epoch` may be seen by the world; None
    means: all of it, the machine is alone.
    """

    def __init__(
        self,
        *,
        address: Address,
        machine: Machine,
        sender: Sender,
        blocks: tuple[HelloBlock, ...],
        machine_name: str,
        options: PrimaryOptions,
        events: Events,
        stop: threading.Event,
        arbiter: Arbiter | None = None,
        release_output: Callable[[int | None], None] | None = None,
    ) -> None:
        self.machine = machine
        self.sender = sender
        self.options = options
        self.timing = options.timing
        self.events = events
        self.stop = stop
        self.state = PairState()
        self.release_output = release_output or (lambda _epoch: None)
        self.checkpoint_wanted = Flag()
        self._address = address
        self._blocks = blocks
        self._machine_name = machine_name
        self._arbiter = arbiter or SoloArbiter()
        self._running = False
        self._protocol_errors = 0

    def request_checkpoint(self) -> None:
        """Take a checkpoint as soon as may be."""
        self.checkpoint_wanted.set()

    def mark_dirty(self, block: int, first_pfn: int, n_pages: int) -> None:
        """The machine's user space wrote guest RAM. Any thread."""
        self.sender.mark_dirty(block, first_pfn, n_pages)

    # ---- the virtual machine ----

    def pause_machine(self) -> None:
        """Stop the machine at a step boundary."""
        self.machine.pause()
        self._running = False

    def resume_machine(self) -> None:
        """Let the machine run, if it does not."""
        if not self._running:
            self.machine.resume()
            self._running = True

    # ---- life ----

    def run(self) -> PrimarySummary:
        """Boot the machine and keep its secondary in step. Raises when the two never become a pair, or when this
        machine must not run on; a secondary that is lost later makes it go on alone."""
        self.machine.boot()
        self.resume_machine()
        self.events.emit("booted", "the machine runs", steps=self.machine.steps)
        deadline = time.monotonic() + self.timing.connect_limit
        while not self.stop.is_set():
            try:
                with self._connect(deadline) as channel:
                    self._run_session(channel)
                return self._summary(alone=False, end="ended in order")
            except TookOverError:
                self.pause_machine()
                raise
            except SecondaryLostError as error:
                self.resume_machine()
                return self._alone(str(error), 0.0)
            except (PeerLostError, TimedOutError, ProtocolError, SessionEndedError, RefusedError) as error:
                self.resume_machine()
                if self.stop.is_set():
                    break
                if self.state.history is None:
                    # Not a pair yet. A connection that broke may be a secondary that starts; anything else stays wrong.
                    if not isinstance(error, PeerLostError | TimedOutError) or time.monotonic() >= deadline:
                        raise
                    self.stop.wait(RETRY_SECONDS)
                    continue
                deadline = self._after_loss(error, deadline)
                if time.monotonic() >= deadline:
                    return self._alone(str(error), self.timing.reconnect_limit)
        return self._summary(alone=False, end="stopped")

    def _after_loss(self, error: ColocacheError, deadline: float) -> float:
        """Say that the secondary is lost, once per loss; the time until which it is tried again."""
        if isinstance(error, ProtocolError | SessionEndedError):
            self._protocol_errors += 1
            if self._protocol_errors >= PROTOCOL_ERRORS_MAX:
                return 0.0
        if self._in_session:
            self._in_session = False
            self.events.emit(
                "lost",
                f"the secondary is lost: {error}; trying again for {self.timing.reconnect_limit:g} s",
                cause=str(error),
            )
            return time.monotonic() + self.timing.reconnect_limit
        self.stop.wait(RETRY_SECONDS)
        return deadline

    _in_session = False

    def _run_session(self, channel: Channel) -> None:
        from colocache.replication.primary_session import PrimarySession

        try:
            fresh = self.greet(channel)
        except ProtocolError as error:
            channel.abort(AbortKind.SESSION, str(error))
            channel.linger()
            raise
        self._in_session = True
        session = PrimarySession(self, channel)
        try:
            session.run(fresh)
        finally:
            session.close()

    def checkpoint_done(self, result: SentCheckpoint) -> None:
        """A checkpoint is through: the pair is in step."""
        self.state.checkpoints += 1
        self._protocol_errors = 0
        self.events.emit("checkpoint", str(result), number=self.state.checkpoints, **result.to_event())

    def _connect(self, deadline: float) -> Channel:
        """A connection to the secondary, tried again and again until the deadline."""
        while True:
            left = deadline - time.monotonic()
            try:
                connection = self._address.connect(max(0.05, min(left, self.timing.peer_timeout)))
                return Channel(connection, peer_timeout=self.timing.peer_timeout)
            except OSError as error:
                if time.monotonic() + RETRY_SECONDS >= deadline or self.stop.wait(RETRY_SECONDS):
                    raise PeerLostError(
                        f"no secondary answers at {self._address}: {error.strerror or error}",
                        hint="start `colocache secondary` first",
                    ) from error

    # ---- pairing ----

    def greet(self, channel: Channel) -> bool:
        """HELLO both ways and CHECKPOINT_READY. True if all of RAM must be sent; otherwise unacked is pending again."""
        state = self.state
        own = Hello(
            role="primary",
            pair=self.options.pair,
            history=state.history or state.lost_history,
            sealed_epoch=state.sealed_epoch,
            used_epoch=state.used_epoch,
            lost=state.history is None and state.lost_history is not None,
            machine=self._machine_name,
            blocks=self._blocks,
            streams=self.options.streams,
        )
        channel.send(MessageType.HELLO, body=own.encode())
        message = channel.receive()
        if message.type is MessageType.ABORT:
            if message.a == AbortKind.SESSION:  # it can't read what this side says: no pair, whatever else
                raise RefusedError(f"the secondary refuses this primary: {decode_reason(message.body)}")
            raise meaning_of(message, MessageType.HELLO, 0)
        if message.type is not MessageType.HELLO:
            raise ProtocolError(f"the peer sent {message} where HELLO must come")
        peer = Hello.decode(message.body)
        self._check_peer(channel, own, peer)
        open_streams(channel, self._address, peer, self.timing.checkpoint_timeout)
        fresh = self._settle(peer)
        ready = channel.receive()
        if ready.type is MessageType.ABORT and ready.a == AbortKind.SESSION:
            raise PeerLostError(f"the secondary ended the session before it began: {decode_reason(ready.body)}")
        if ready.type is not MessageType.CHECKPOINT_READY:
            raise ProtocolError(f"the secondary sent {ready} where CHECKPOINT_READY must come")
        self.events.emit(
            "connected",
            f"paired with the secondary at {self._address}, "
            + ("all of RAM is sent" if fresh else f"going on from epoch {state.sealed_epoch}"),
            fresh=fresh,
            sealed_epoch=state.sealed_epoch,
            unacked_pages=self.sender.count()[1],
        )
        return fresh

    def _check_peer(self, channel: Channel, own: Hello, peer: Hello) -> None:
        state = self.state
        reason = check_pair(own, peer)
        if reason is None and peer.lost:
            raise TookOverError(
                f"the secondary took over at epoch {peer.sealed_epoch}: this primary stands still, because the world "
                "must see one machine only"
            )
        if reason is None:
            if peer.history is None:
                reason = "the secondary tells no history"
            elif state.history is None and peer.history == state.lost_history:
                reason = "this secondary was declared lost: start a fresh one"
            elif state.history is None and peer.sealed_epoch:
                reason = f"the secondary holds epoch {peer.sealed_epoch} of another primary: start a fresh one"
            elif (
                state.history is not None
                and peer.history != state.history
                and (peer.sealed_epoch or state.sealed_epoch)
            ):
                # Before the first seal there is no history to keep to: a secondary that died begins a new one.
                reason = "the secondary has another history: its memory is not that of this pair"
            elif peer.sealed_epoch not in (state.sealed_epoch, state.in_flight or state.sealed_epoch):
                reason = (
                    f"the secondary's newest sealed epoch is {peer.sealed_epoch}, this primary knows "
                    f"{state.sealed_epoch}"
                )
        if reason is not None:
            channel.abort(AbortKind.REFUSED, reason)
            channel.linger()
            raise RefusedError(reason)

    def _settle(self, peer: Hello) -> bool:
        """Agree on the newest sealed epoch; the sender then knows what to send."""
        state = self.state
        fresh = peer.sealed_epoch == 0
        if fresh:
            # The log first: what is written after this is in it, what was written before is sent with all of RAM.
            self.machine.discard_dirty_log()
            self.sender.mark_all()
            state.history, state.lost_history, state.sealed_epoch = peer.history, None, 0
        elif peer.sealed_epoch == state.in_flight:
            # Sealed, and RECEIVED was lost on the way. Nothing was taken from the log since: unacked is N
            # and what was marked meanwhile, which is pending and stays.
            self.sender.received()
            state.sealed_epoch = peer.sealed_epoch
            self.release_output(state.sealed_epoch)
        else:
            self.sender.resend()
        state.in_flight = 0
        state.used_epoch = max(state.used_epoch, peer.used_epoch, peer.sealed_epoch)
        return fresh

    # ---- the end ----

    def _alone(self, cause: str, seconds: float) -> PrimarySummary:
        """The secondary does not come back: ask the arbiter, and run on without it."""
        state = self.state
        history = (state.history or b"").hex()
        verdict = self._arbiter.decide(Loss("primary", self.options.pair, history, state.used_epoch, cause, seconds))
        if not verdict.yes:
            self.pause_machine()
            self.events.emit("refused", f"not going on alone: {verdict.sentence}", reason=verdict.sentence)
            return self._summary(alone=True, end=f"{cause}; {verdict.sentence}")
        state.lost_history, state.history, state.in_flight = state.history, None, 0
        self.release_output(None)
        self.events.emit("alone", f"going on alone: {cause}; {verdict.sentence}", cause=cause, verdict=verdict.sentence)
        until = time.monotonic() + self.timing.run_on if self.timing.run_on else None
        while not self.stop.wait(RETRY_SECONDS) and (until is None or time.monotonic() < until):
            if self.machine.failure is not None:
                break
        return self._summary(alone=True, end=f"alone: {cause}")

    def _summary(self, *, alone: bool, end: str) -> PrimarySummary:
        self.pause_machine()
        report: VerifyReport = self.machine.verify()
        summary = PrimarySummary(
            checkpoints=self.state.checkpoints,
            epoch=self.state.sealed_epoch,
            alone=alone,
            verified_pages=report.n_pages,
            wrong_pages=len(report.wrong),
            end=end,
        )
        self.events.emit(
            "end",
            f"{end}; {summary.checkpoints} checkpoints, {report.n_pages} pages verified, {len(report.wrong)} wrong",
            **vars(summary),
        )
        return summary
