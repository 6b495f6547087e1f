# SPDX-License-Identifier: Apache-2.0
"""The primary's life: connect, pair, keep the secondary in step, reconnect after a loss, or go on alone.

One connection is a `PrimarySession`, the machine with what is known of the pair a `Pvm`; this module decides between
connections.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from colocache import Sender
from colocache.errors import ColocacheError, PeerLostError, TimedOutError, reason_of
from colocache.outputs.held import Output
from colocache.outputs.typed import TypedInput
from colocache.replication.address import Address
from colocache.replication.arbiter import Arbiter, LeaseLostError, Leave, Loss, SoloArbiter, Verdict
from colocache.replication.blocks import hello_blocks
from colocache.replication.channel import Channel
from colocache.replication.conversation import Meeting, State, meet, out_of_order
from colocache.replication.ending import end_with
from colocache.replication.errors import (
    ProtocolError,
    RefusedError,
    SecondaryLostError,
    SessionEndedError,
    TookOverError,
)
from colocache.replication.events import Events
from colocache.replication.hello import Hello
from colocache.replication.inbox import answer
from colocache.replication.messages import AbortKind, MessageType, join_u64
from colocache.replication.mirrors import Mirrors, NoMirrors
from colocache.replication.observer import Observer
from colocache.replication.options import PrimaryOptions
from colocache.replication.primary_session import PrimarySession
from colocache.replication.pvm import Pvm
from colocache.replication.results import SentCheckpoint
from colocache.replication.signals import Flag
from colocache.replication.streams_out import open_streams
from colocache.replication.trace import Trace
from colocache.replication.transport import PlainTransport, Wrap
from colocache.vmm.machine import Machine

RETRY_SECONDS = 0.1  # between two tries to connect
ALONE_CONNECT_SECONDS = 0.3  # a try of a machine that goes on alone, which must look at its lease
PROTOCOL_ERRORS_MAX = 3  # in a row, without a checkpoint in between: then it is not the weather
LOST = (PeerLostError, TimedOutError, ProtocolError, SessionEndedError, RefusedError, SecondaryLostError)


@dataclass(frozen=True)
class PrimarySummary:
    """How a primary ended."""

    checkpoints: int
    epoch: int
    alone: bool
    verified_pages: int
    wrong_pages: int
    end: str  # one sentence


@dataclass(frozen=True)
class _Alone:
    """This machine goes on without a secondary."""

    cause: str
    until: float | None  # CLOCK_MONOTONIC in seconds; None = until it is stopped


class Primary:
    """Runs `machine` as a primary until it is stopped or has done its checkpoints.

    `stop` ends it at the next safe point; `request_checkpoint` may be called from any thread or signal handler.
    `output` is told when what the machine has sent may be seen by the world, `typed` has its console input.
    """

    def __init__(
        self,
        *,
        address: Address,
        machine: Machine,
        sender: Sender,
        machine_name: str,
        options: PrimaryOptions,
        events: Events,
        stop: threading.Event,
        arbiter: Arbiter | None = None,
        observer: Observer | None = None,
        output: Output | None = None,
        typed: TypedInput | None = None,
        mirrors: Mirrors | NoMirrors | None = None,
        wrap: Wrap = PlainTransport,
        trace: Trace | None = None,
    ) -> None:
        self._mirrors = mirrors or NoMirrors()
        self.pvm = Pvm(machine, sender, output=output, typed=typed, disks=self._mirrors.disks)
        self.options = options
        self.timing = options.timing
        self.events = events
        self.stop = stop
        self._address = address
        self._machine_name = machine_name
        self._leave = Leave(arbiter or SoloArbiter())
        self._observer = observer or Observer()
        self._wrap = wrap
        self._trace = trace
        self._checkpoint_wanted = Flag()
        self._deadline = 0.0  # until when the secondary is tried
        self._in_session = False
        self._protocol_errors = 0
        self._alone: _Alone | None = None

    def request_checkpoint(self) -> None:
        """Take a checkpoint as soon as may be."""
        self._checkpoint_wanted.set()

    def mark_dirty(self, block: int, first_pfn: int, n_pages: int) -> None:
        """The machine's user space wrote guest RAM. Any thread."""
        self.pvm.mark_dirty(block, first_pfn, n_pages)

    # ---- life ----

    def run(self) -> PrimarySummary:
        """Boot the machine and keep its secondary in step. Raises when the two never become a pair, or when this
        machine must not run on; a secondary that is lost later makes it go on alone."""
        self._mirrors.primary_from(self.options.pair, 0)
        self.pvm.boot()
        self.events.emit("booted", "the machine runs", steps=self.pvm.machine.steps)
        self._deadline = time.monotonic() + self.timing.connect_limit
        try:
            return self._live()
        except (TookOverError, LeaseLostError) as error:
            self.pvm.pause()
            self.events.emit("stands", f"this machine stands still: {error}", reason=str(error))
            raise
        finally:
            self._mirrors.end()
            self._leave.give_back()

    def _live(self) -> PrimarySummary:
        while not self.stop.is_set():
            try:
                channel = self._connect() if self._alone is None else self._connect_alone()
                if channel is None:
                    break
                with channel:
                    self._session(channel)
                return self._summary("ended in order")
            except LOST as error:
                self.pvm.resume()
                if self.stop.is_set():
                    break
                end = self._after_loss(error)
                if end is not None:
                    return self._summary(end, alone=True)
        return self._summary("stopped" if self._alone is None else f"alone: {self._alone.cause}")

    def _after_loss(self, error: ColocacheError) -> str | None:
        """There is no connection: try again (None), or go on alone (None too), or end with this sentence."""
        if self._alone is not None:
            if self.pvm.pair.history is not None:  # a fresh secondary that was lost before it was in step
                self.pvm.declare_alone()
                self._mirrors.end()
                self.events.emit("lost", f"the fresh secondary is lost: {error}", cause=str(error))
            return None
        if self.pvm.pair.history is None:
            # Not a pair yet. A connection that broke may be a secondary that starts; anything else stays wrong.
            if not isinstance(error, PeerLostError | TimedOutError) or time.monotonic() >= self._deadline:
                raise error
            self.stop.wait(RETRY_SECONDS)
            return None
        if isinstance(error, SecondaryLostError):
            return self._go_alone(str(error), 0.0)
        if isinstance(error, ProtocolError | SessionEndedError):
            self._protocol_errors += 1
        if self._in_session:
            self._in_session = False
            self._deadline = time.monotonic() + self.timing.reconnect_limit
            self.events.emit(
                "lost",
                f"the secondary is lost: {error}; trying again for {self.timing.reconnect_limit:g} s",
                cause=str(error),
            )
        else:
            self.stop.wait(RETRY_SECONDS)
        if time.monotonic() < self._deadline and self._protocol_errors < PROTOCOL_ERRORS_MAX:
            return None
        return self._go_alone(str(error), self.timing.reconnect_limit)

    def _session(self, channel: Channel) -> None:
        try:
            fresh = self.greet(channel)
        except ProtocolError as error:
            end_with(channel, AbortKind.SESSION, str(error))
            raise
        self._in_session = True
        session = PrimarySession(
            self.pvm,
            channel,
            self.options,
            self.events,
            stop=self.stop,
            checkpoint_wanted=self._checkpoint_wanted,
            observer=self._observer,
            mirrors=self._mirrors,
            done=self._checkpoint_done,
            tick=self._leave.check,
            trace=self._trace,
        )
        try:
            session.run(fresh)
        finally:
            session.close()

    def _checkpoint_done(self, result: SentCheckpoint) -> None:
        """A checkpoint is through: the pair is in step."""
        self._mirrors.primary_from(self.options.pair, result.epoch)
        self._protocol_errors = 0
        if self._alone is not None:
            self._alone = None
            self._leave.give_back()
            self.events.emit("rejoined", "a fresh secondary is in step: this machine is alone no longer")
        self.events.emit("checkpoint", str(result), number=self.pvm.pair.checkpoints, **result.to_event())

    # ---- connecting ----

    def _connect(self) -> Channel:
        """A connection to the secondary, tried again and again until the deadline."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                return self._dial(max(0.05, min(left, self.timing.peer_timeout)))
            except OSError as error:
                if time.monotonic() + RETRY_SECONDS >= self._deadline or self.stop.wait(RETRY_SECONDS):
                    raise PeerLostError(
                        f"no secondary answers at {self._address}: {reason_of(error)}",
                        hint="start `colocache secondary` first",
                    ) from error

    def _connect_alone(self) -> Channel | None:
        """Run on without a secondary, and look for a fresh one if that is allowed; None: its time is over."""
        until = self._alone.until if self._alone else None
        while not self.stop.wait(RETRY_SECONDS) and (until is None or time.monotonic() < until):
            self._leave.check()
            if self.pvm.machine.failure is not None:
                return None
            if self.options.rejoin:
                try:
                    return self._dial(ALONE_CONNECT_SECONDS)
                except OSError:
                    continue
        return None

    def _dial(self, seconds: float) -> Channel:
        return Channel(self._wrap(self._address.connect(seconds)), peer_timeout=self.timing.peer_timeout)

    # ---- pairing ----

    def greet(self, channel: Channel) -> bool:
        """HELLO both ways and CHECKPOINT_READY. True if all of RAM must be sent; otherwise unacked is pending again."""
        own = self._own_hello()
        channel.send(MessageType.HELLO, body=own.encode())
        message = channel.receive()
        if not answer(State.GREETING, message):
            raise out_of_order(State.GREETING, message)
        peer = Hello.decode(message.body)
        meeting = self._judge(channel, own, peer)
        open_streams(channel, self._address, self._wrap, peer, self.timing.checkpoint_timeout)
        self.pvm.meet(meeting, peer)
        self._mirrors.primary_from(self.options.pair, self.pvm.pair.sealed_epoch)
        while not answer(State.ACCEPTED, ready := channel.receive()):
            pass
        self.pvm.allowance = join_u64(ready.a, ready.b)
        self.pvm.disk_log = peer.disk_log
        fresh = meeting is Meeting.FRESH
        sealed = self.pvm.pair.sealed_epoch
        self.events.emit(
            "connected",
            f"paired with the secondary at {self._address}, "
            + ("all of RAM is sent" if fresh else f"going on from epoch {sealed}"),
            fresh=fresh,
            sealed_epoch=sealed,
            unacked_pages=self.pvm.unacked_pages,
        )
        return fresh

    def _own_hello(self) -> Hello:
        pair = self.pvm.pair
        return Hello(
            role="primary",
            pair=self.options.pair,
            history=pair.history or pair.lost_history,
            sealed_epoch=pair.sealed_epoch,
            used_epoch=pair.used_epoch,
            lost=pair.history is None and pair.lost_history is not None,
            machine=self._machine_name,
            blocks=hello_blocks(self.pvm.sender.blocks),
            streams=self.options.streams,
            in_flight=pair.in_flight,
            rejoin=self.options.rejoin,
            disks=self.pvm.disks.sizes,
        )

    def _judge(self, channel: Channel, own: Hello, peer: Hello) -> Meeting:
        """What the two HELLOs make. TookOverError; RefusedError, and the secondary was told."""
        meeting, sentence = meet(own, peer)
        if meeting is Meeting.TOOK_OVER:
            raise TookOverError(sentence)
        if meeting is Meeting.FRESH and self._alone is None and own.sealed_epoch:
            # A secondary that held an epoch is given up for this one: it must never take over.
            cause = "a fresh secondary came in place of the one that held the newest epoch"
            verdict = self._ask_arbiter(cause, 0.0)
            if not verdict.yes:
                meeting = Meeting.REFUSED
                sentence = f"the secondary that this primary had may not be given up: {verdict.sentence}"
            else:
                self._declare_alone(cause, verdict.sentence)
        if meeting in (Meeting.REFUSED, Meeting.DECLARED_LOST):
            end_with(channel, AbortKind.REFUSED, sentence)
            raise RefusedError(sentence)
        return meeting

    # ---- alone ----

    def _ask_arbiter(self, cause: str, seconds: float) -> Verdict:
        pair = self.pvm.pair
        history = (pair.history or b"").hex()
        return self._leave.take(Loss("primary", self.options.pair, history, pair.used_epoch, cause, seconds))

    def _go_alone(self, cause: str, seconds: float) -> str | None:
        """The secondary does not come back: ask the arbiter. None: go on without it; else why this machine stands."""
        verdict = self._ask_arbiter(cause, seconds)
        if verdict.yes:
            self._declare_alone(cause, verdict.sentence)
            return None
        self.pvm.pause()
        self.events.emit("refused", f"not going on alone: {verdict.sentence}", reason=verdict.sentence)
        return f"{cause}; {verdict.sentence}"

    def _declare_alone(self, cause: str, verdict: str) -> None:
        self._leave.check()
        self.pvm.declare_alone()
        self._mirrors.end()
        self._alone = _Alone(cause, time.monotonic() + self.timing.run_on if self.timing.run_on else None)
        self.events.emit("alone", f"going on alone: {cause}; {verdict}", cause=cause, verdict=verdict)

    # ---- the end ----

    def _summary(self, end: str, *, alone: bool = False) -> PrimarySummary:
        report = self.pvm.verify()
        summary = PrimarySummary(
            checkpoints=self.pvm.pair.checkpoints,
            epoch=self.pvm.pair.sealed_epoch,
            alone=alone or self._alone is not None,
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
