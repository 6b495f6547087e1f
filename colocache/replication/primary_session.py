# SPDX-License-Identifier: Apache-2.0
"""One connection of a primary: the initial copy, pages in the background, and the checkpoint as a conversation."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from colocache.disks.write import Write
from colocache.errors import ColocacheError, PeerLostError, TimedOutError
from colocache.outputs.travel import HEAD, pack
from colocache.replication.apart import Apart
from colocache.replication.channel import Channel
from colocache.replication.conversation import State
from colocache.replication.ending import end_with
from colocache.replication.errors import ProtocolError, SecondaryLostError
from colocache.replication.events import Events
from colocache.replication.inbox import CheckpointAbortedError, Inbox
from colocache.replication.messages import AbortKind, Message, MessageType, encode_input, join_u64, packed, split_u64
from colocache.replication.mirrors import Mirrors, NoMirrors
from colocache.replication.observer import Observer
from colocache.replication.options import PrimaryOptions
from colocache.replication.primary_room import PrimaryRoom
from colocache.replication.pvm import Pvm
from colocache.replication.results import SentCheckpoint
from colocache.replication.rounds import Rounds
from colocache.replication.signals import Flag
from colocache.replication.stages import Span, Stages
from colocache.replication.streams_out import OutStreams
from colocache.replication.trace import Trace
from colocache.vmm.machine import REHEARSE_BYTES_MAX

PART_PAGES = 1024  # at once in the background, if there are disks: their writes wait for no more
INITIAL_ROUND_PAGES = 8192  # between two of these the secondary copies what has come to its guest RAM
INITIAL_PASSES = 3  # over what the guest dirtied during the pass before
BACKGROUND_ROUNDS = 4  # per interval
BACKGROUND_SECONDS_MIN = 0.05
SLICE_SECONDS = 0.1  # a wait in Python that must notice a signal
OUTPUT_LOOK_SECONDS = 0.001  # at least, between two looks whether output waits
DISK_LOOK_SECONDS = 0.05  # while disks are copied for the first time
SAVE_FAILURES_MAX = 3  # in a row


class PrimarySession:
    """Talks to one secondary until the end, or until an error says why there is no more talking."""

    def __init__(
        self,
        pvm: Pvm,
        channel: Channel,
        options: PrimaryOptions,
        events: Events,
        *,
        stop: threading.Event,
        checkpoint_wanted: Flag,
        observer: Observer,
        mirrors: Mirrors | NoMirrors,
        done: Callable[[SentCheckpoint], None],
        tick: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
    ) -> None:
        """`done` hears of each checkpoint; `tick` is called every now and then and may end the session by raising."""
        self._pvm = pvm
        self._options = options
        self._timing = options.timing
        self._events = events
        self._stop = stop
        self._checkpoint_wanted = checkpoint_wanted
        self._observer = observer
        self._mirrors = mirrors
        self._done = done
        self._channel = channel
        self._streams = OutStreams(channel)
        self._room = PrimaryRoom(pvm, events)
        self._tick = tick
        self._inbox = Inbox(channel, self._look_round)
        self._apart = Apart(channel.fileno(), "primary", wanted=len(self._streams) == 1, own_cores=options.own_cores)
        channel.may_spin = self._apart.own_core
        self._trace = trace or Trace()
        self._save_failures = 0
        self._output_went = False  # since the last checkpoint
        self._newest_state = b""  # to rehearse with
        self._rounds = Rounds(self._sync, self._send_round, pvm.machine.dirty_hint)

    def run(self, fresh: bool) -> None:
        """Until the wanted checkpoints are done or the primary is stopped; then the secondary is told so."""
        self._inbox.start()
        self._told(self._pvm.allowance)
        self._channel.start_heartbeat(MessageType.PING, self._timing.ping_interval)
        self._pvm.open_epoch()
        self._pvm.typed.again(self._pass_on)
        try:
            self._bring_disks(fresh)
            if fresh:
                self._initial_copy()
            wanted = self._options.checkpoints
            now = True  # a pair that has just met is not in step yet
            while not self._stop.is_set() and (not wanted or self._pvm.pair.checkpoints < wanted):
                if not now:
                    self._between_checkpoints()
                    if self._stop.is_set():
                        break
                now = False
                last = self._pvm.machine.powered_off
                if self._checkpoint() and last:
                    end_with(self._channel, AbortKind.END, "its guest powered off")
                    return
            if self._observer.stays():
                self._stay()
        except (PeerLostError, TimedOutError) as error:
            if self._channel.over:
                raise TimedOutError(self._channel.over) from error
            raise self._inbox.why_ended(error) from error
        except ProtocolError as error:
            end_with(self._channel, AbortKind.SESSION, str(error))
            raise
        end_with(self._channel, AbortKind.END, "the primary was ended by its operator")

    def _look_round(self) -> None:
        """Now and then while this side waits."""
        self._tick()
        self._room.look()

    def close(self) -> None:
        """End the reading thread and the connection."""
        self._inbox.stop()  # breaks the connection: a write that waits on it is told
        self._mirrors.disconnected()
        self._pvm.typed.again(None)
        self._streams.close()
        self._channel.close()

    # ---- pages ----

    def _send(self, max_pages: int = 0) -> int:
        # A secondary that flushes takes nothing for a while: that is back-pressure. Silence is the inbox's to notice.
        begin = time.monotonic_ns()
        n_pages = self._pvm.send(self._streams, timeout=self._timing.checkpoint_timeout, max_pages=max_pages)
        self._trace.add(f"send {n_pages} pages", begin, time.monotonic_ns(), self._pvm.epoch)
        return n_pages

    def _send_round(self) -> int:
        """In the background: nothing that the secondary would refuse. In the checkpoint it has more room."""
        if self._pvm.beyond(self._pvm.allowance):
            return 0
        return sum(iter(lambda: self._send(PART_PAGES), 0)) if self._pvm.disks.sizes else self._send()

    def _send_output(self) -> None:
        """What the machine sent travels before its epoch is sealed, for a secondary that takes over from that."""
        if parts := self._packed_output():
            self._channel.send_together(parts)

    def _packed_output(self) -> list[bytes]:
        output, epoch = self._pvm.output, self._pvm.epoch
        parts = []
        for body in pack(output.take(), output.origin()):
            parts += packed(MessageType.OUTPUT, epoch=epoch, body=body)
        self._output_went = self._output_went or bool(parts)
        return parts

    def _pass_on(self, offset: int, data: bytes) -> None:
        """What the world typed, before this side's machine is given it. In whatever thread has it."""
        self._channel.send(MessageType.INPUT, body=encode_input(offset, data))

    def _send_write(self, write: Write) -> None:
        """In the thread of a disk."""
        self._channel.send_write(write, self._timing.checkpoint_timeout)

    def _bring_disks(self, fresh: bool) -> None:
        """If `fresh`, all of every disk, before memory: the guest writes both meanwhile, and disks take longer.
        SecondaryLostError: they can't be brought to this secondary, which is told."""
        try:
            self._mirrors.connected(self._send_write, fresh=fresh, limit_bytes=self._pvm.disk_log)
            while fresh and not self._mirrors.ready() and not self._stop.is_set():
                self._inbox.check_idle()
                self._check_machine()
                self._inbox.arrived.wait(DISK_LOOK_SECONDS)
        except SecondaryLostError as error:
            end_with(self._channel, AbortKind.END, f"the primary goes on alone: {error}")  # as in _check_disks
            raise

    def _sync(self) -> None:
        begin = time.monotonic_ns()
        self._pvm.sync()
        self._trace.add("log of a round", begin, time.monotonic_ns(), self._pvm.epoch)

    def _initial_copy(self) -> None:
        """All of RAM while the machine runs, then what it dirtied meanwhile, until little is left."""
        begin, total = time.monotonic(), 0
        for _ in range(INITIAL_PASSES):
            while self._pvm.pending_pages and not self._stop.is_set():
                total += self._send(INITIAL_ROUND_PAGES)
                # receive_stream hands out the PING, and the secondary uses the moment to copy ahead.
                self._channel.send(MessageType.PING)
                self._inbox.check_idle()
            self._pvm.sync()
        seconds = time.monotonic() - begin
        self._events.emit(
            "initial",
            f"the initial copy sent {total} pages in {seconds:.2f} s",
            pages=total,
            seconds=round(seconds, 4),
            bytes=self._pvm.sent.n_bytes,
        )

    def _between_checkpoints(self) -> None:
        """Until the next checkpoint is due: by time, on request of either side, or because much is dirty."""
        begin = time.monotonic()
        due = begin + self._options.interval
        step = self._options.round_delay or max(BACKGROUND_SECONDS_MIN, self._options.interval / BACKGROUND_ROUNDS)
        next_round = begin + step
        delay = self._options.output_delay
        while not self._stop.is_set():
            now = time.monotonic()
            self._inbox.check_idle()
            self._check_machine()
            oldest = self._pvm.output.oldest() if delay else None
            if oldest is not None:
                due = min(due, oldest + delay)
            look = self._inbox.slice_seconds
            if delay:
                look = min(look, max(delay / 4, OUTPUT_LOOK_SECONDS))
            wanted = self._inbox.checkpoint_wanted.is_set() or self._checkpoint_wanted.is_set()
            if now >= due or wanted or self._above_dirty_limit() or self._pvm.machine.powered_off:
                return
            if self._room.near():
                return
            if now >= next_round:
                hint = self._pvm.machine.dirty_hint()  # 0: nothing, or nobody can tell
                if self._options.background and not 0 < hint < self._options.round_pages:
                    self._rounds.one()
                self._send_output()
                next_round = time.monotonic() + step
                continue
            self._inbox.arrived.wait(max(0.0, min(due, next_round, now + look) - now))

    def _above_dirty_limit(self) -> bool:
        limit = self._options.dirty_limit_pages
        return bool(limit) and self._pvm.dirty_pages() >= limit

    def _check_machine(self) -> None:
        failure = self._pvm.machine.failure
        if failure is not None:
            reason = f"the primary's machine failed: {failure}"
            end_with(self._channel, AbortKind.SESSION, reason)
            raise ColocacheError(reason)

    def _stay(self) -> None:
        """Stay connected without checkpoints, until stopped or killed."""
        self._room.lift()
        self._events.emit("holding", "no more checkpoints; running on")
        while not self._stop.is_set():
            self._inbox.check_idle()
            self._check_machine()
            self._inbox.arrived.wait(SLICE_SECONDS)

    # ---- the checkpoint ----

    def _checkpoint(self) -> bool:
        """Take one; False: it was given up."""
        epoch = self._pvm.epoch
        self._checkpoint_wanted.clear()
        self._inbox.checkpoint_wanted.clear()
        if self._room.near():
            self._room.stand()  # before the secondary answers it would have written more than there is room for
        if self._options.background and not self._pvm.allowance:  # else its machine would write on, and nobody looks
            self._rounds.last()
        self._inbox.hear_here(True)
        try:
            with self._apart:
                result = self._converse(epoch)
        except CheckpointAbortedError as error:
            self._channel.limit(None)
            self._pvm.give_up()
            self._pvm.resume()
            reason = f"the secondary gave up epoch {epoch}: {error}"
            self._events.emit("aborted", reason, epoch=epoch, reason=reason)
            return False
        finally:
            self._inbox.hear_here(False)
        self._save_failures = 0
        self._pvm.loaded()
        self._done(result)
        return True

    def _converse(self, epoch: int) -> SentCheckpoint:
        pvm, channel, timeout = self._pvm, self._channel, self._timing.checkpoint_timeout
        number = pvm.pair.checkpoints + 1
        stages = Stages()
        said = pvm.dirty_pages()
        low, high = split_u64(said)
        channel.send(MessageType.CHECKPOINT_REQUEST, epoch=epoch, a=low, b=high)
        self._rehearse()
        reply = self._inbox.expect(State.REQUESTED, epoch, timeout)
        room = join_u64(reply.a, reply.b)
        self._see_room(epoch, room, said)
        channel.limit(timeout, f"the secondary did not let epoch {epoch} be sealed within {timeout:g} s")
        if self._options.background and not room:
            self._rounds.after_waiting()
        background = pvm.sent.n_pages
        stages.done("ask")

        stopped = stages.done("stop", pvm.pause())
        stood_ns = self._room.stood_ns(stopped)
        try:
            saved = self._observer.save(pvm.machine, number)
        except ColocacheError as error:
            self._take_back(epoch, error)
            raise CheckpointAbortedError(f"its own device state can't be saved: {error}") from error
        # What is the machine's before its pages: the secondary looks at it while those are taken from the log.
        self._newest_state = saved.state if len(saved.state) <= REHEARSE_BYTES_MAX else b""
        parts = packed(MessageType.VMSTATE_SEND, epoch=epoch, body=saved.state) + self._packed_output()
        if pvm.typed.mark:
            parts += packed(MessageType.INPUT, epoch=epoch, body=encode_input(pvm.typed.mark))
        channel.send_together(parts)
        stages.done("state")
        steps = pvm.machine.steps
        pvm.sync()  # after the device state: saving it may itself write guest RAM
        stages.done("log")
        if pvm.beyond(room):
            reason = f"it has {pvm.unacked_pages} pages, more than was said, and the secondary has room for {room}"
            self._abort_epoch(epoch, reason)
            raise CheckpointAbortedError(reason)
        self._observer.about_to_send(number, epoch, pvm.pending_pages, self._send)
        self._send()
        sent = pvm.sent
        low, high = split_u64(sent.n_pages)
        stages.done("pages")
        self._check_disks(epoch)
        total = pvm.in_flight()
        parts = packed(MessageType.DISKS, epoch=epoch, body=total.pack()) if pvm.disks.sizes else []
        channel.send_together(parts + packed(MessageType.VMSTATE_SIZE, epoch=epoch, a=low, b=high))
        answer = self._inbox.expect(State.SENT, epoch, timeout)
        stages.done("answer")
        channel.limit(None)
        self._observer.received(number, epoch)
        if self._options.resume_at == "loaded":
            self._sealed(answer)
            self._inbox.expect(State.SEALED, epoch, timeout)
            stages.done("loaded")
        # The epoch can't be lost by one failure any more, so the machine need not wait for the secondary's flush, nor
        # for what RECEIVED frees. What it writes belongs to the next epoch, of which nothing goes out before LOADED.
        pvm.room_again()
        running = stages.done("resume", pvm.resume())
        self._rounds.running()
        if self._options.resume_at != "loaded":
            self._sealed(answer)
        if self._output_went:  # it is out: a takeover from now on does not let it out again
            self._output_went = False
            channel.send(MessageType.OUTPUT, epoch=pvm.epoch, body=HEAD.pack(*pvm.output.origin()))
        if self._options.resume_at != "loaded":
            self._inbox.expect(State.SEALED, epoch, timeout)
            stages.done("loaded")
        self._trace.checkpoint(epoch, stages, Span("the primary's machine stands", stopped, running))
        took = {span.name: span.ns for span in stages.spans()}
        took["state"] = max(0, took["state"] - saved.extra_ns)
        return SentCheckpoint(
            epoch=epoch,
            sent_pages=sent.n_pages,
            background_pages=background,
            zero_pages=sent.n_zero,
            n_bytes=sent.n_bytes,
            state_bytes=len(saved.state),
            steps=steps,
            **{f"{name}_ns": ns for name, ns in took.items()},
            pause_ns=max(0, running - stopped - saved.extra_ns),
            extra_ns=saved.extra_ns,
            stood_ns=stood_ns,
            **pvm.of_disks(),
        )

    def _rehearse(self) -> None:
        """While the secondary stops its machine: what is done while both stand, as far as it can be done before."""
        self._send_output()
        if self._newest_state:
            with contextlib.suppress(ColocacheError):
                self._pvm.machine.rehearse(self._newest_state)

    def _sealed(self, received: Message) -> None:
        """RECEIVED was heard: what it frees, and the next epoch."""
        self._pvm.received()
        self._pvm.open_epoch()
        self._told(join_u64(received.a, received.b))

    def _told(self, n_pages: int) -> None:
        """The secondary says how many pages it takes before the next checkpoint."""
        self._room.told(n_pages)
        self._inbox.slice_seconds = self._room.look_again() or SLICE_SECONDS

    def _see_room(self, epoch: int, room: int, said: int) -> None:
        """The secondary says how many pages the epoch may have, after it gave up what it must for those that it was
        told of. If there are more by now it is told anew; else nothing is left to give up, and what is unacknowledged
        only grows: neither this epoch can be sent nor any after it. SecondaryLostError."""
        if not self._pvm.beyond(room):
            return
        if said < self._pvm.unacked_pages:
            reason = f"it has {self._pvm.unacked_pages} pages by now, more than the {said} that were said"
            self._abort_epoch(epoch, reason)
            raise CheckpointAbortedError(reason)
        reason = (
            f"the memory limit of the secondary leaves room for {room} pages, and the next checkpoint has "
            f"{self._pvm.unacked_pages}: start a fresh one with a larger limit"
        )
        self._abort_epoch(epoch, reason)
        # Else that secondary would take over from its old epoch.
        end_with(self._channel, AbortKind.END, f"the primary goes on alone: {reason}")
        raise SecondaryLostError(reason)

    def _check_disks(self, epoch: int) -> None:
        """The machine stands. A mirror that failed can't be mended without all of its disk: SecondaryLostError."""
        try:
            self._mirrors.check()
        except SecondaryLostError as error:
            self._abort_epoch(epoch, str(error))
            end_with(self._channel, AbortKind.END, f"the primary goes on alone: {error}")
            raise

    def _take_back(self, epoch: int, error: ColocacheError) -> None:
        """The device state can't be saved: the secondary is told to forget the epoch."""
        self._save_failures += 1
        if self._save_failures >= SAVE_FAILURES_MAX:
            raise error
        self._abort_epoch(epoch, f"the primary's device state can't be saved: {error}")

    def _abort_epoch(self, epoch: int, reason: str) -> None:
        self._channel.abort(AbortKind.CHECKPOINT, reason, epoch=epoch, n_pages=self._pvm.sent.n_pages)
        if len(self._streams) > 1:
            self._inbox.expect(State.TAKING_BACK, epoch, self._timing.checkpoint_timeout)
