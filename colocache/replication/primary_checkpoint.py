# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the primary has it: both machines stand, the secondary is sent what it lacks and seals it, and this
machine runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from colocache.errors import ColocacheError
from colocache.outputs.travel import HEAD
from colocache.replication.apart import Apart
from colocache.replication.channel import Channel
from colocache.replication.conversation import State
from colocache.replication.ending import end_with
from colocache.replication.errors import SecondaryLostError
from colocache.replication.events import Events
from colocache.replication.inbox import SLICE_SECONDS, CheckpointAbortedError, Inbox
from colocache.replication.messages import AbortKind, Message, MessageType, encode_input, join_u64, packed, split_u64
from colocache.replication.mirrors import Mirrors, NoMirrors
from colocache.replication.observer import Observer
from colocache.replication.options import PrimaryOptions
from colocache.replication.primary_room import PrimaryRoom
from colocache.replication.primary_sending import PrimarySending
from colocache.replication.pvm import Pvm
from colocache.replication.results import SentCheckpoint
from colocache.replication.rounds import Rounds
from colocache.replication.stages import Span, Stages
from colocache.replication.trace import Trace
from colocache.vmm.machine import REHEARSE_BYTES_MAX

SAVE_FAILURES_MAX = 3  # in a row


class PrimaryCheckpoint:
    """Takes one after the other over one connection. The session's thread calls all of it."""

    def __init__(
        self,
        pvm: Pvm,
        channel: Channel,
        options: PrimaryOptions,
        events: Events,
        *,
        inbox: Inbox,
        sending: PrimarySending,
        rounds: Rounds,
        room: PrimaryRoom,
        observer: Observer,
        mirrors: Mirrors | NoMirrors,
        done: Callable[[SentCheckpoint], None],
        trace: Trace,
    ) -> None:
        """`done` hears of each that is through."""
        self._pvm = pvm
        self._channel = channel
        self._options = options
        self._timing = options.timing
        self._events = events
        self._inbox = inbox
        self._sending = sending
        self._rounds = rounds
        self._room = room
        self._observer = observer
        self._mirrors = mirrors
        self._done = done
        self._trace = trace
        one_stream = len(sending.streams) == 1
        self._apart = Apart(channel.fileno(), "primary", wanted=one_stream, own_cores=options.own_cores)
        channel.may_spin = self._apart.own_core
        self._save_failures = 0
        self._newest_state = b""  # to rehearse with

    def take(self) -> bool:
        """Take one; False: it was given up."""
        epoch = self._pvm.epoch
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
        parts = packed(MessageType.VMSTATE_SEND, epoch=epoch, body=saved.state) + self._sending.packed_output()
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
        self._observer.about_to_send(number, epoch, pvm.pending_pages, self._sending.pages)
        self._sending.pages()
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
        if self._sending.output_went:  # it is out: a takeover from now on does not let it out again
            self._sending.output_went = False
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
        self._sending.output()
        if self._newest_state:
            with contextlib.suppress(Exception):  # nothing is lost by it, and this is the machine that the world sees
                self._pvm.machine.rehearse(self._newest_state)

    def _sealed(self, received: Message) -> None:
        """RECEIVED was heard: what it frees, and the next epoch."""
        self._pvm.received()
        self._pvm.open_epoch()
        self.told(join_u64(received.a, received.b))

    def told(self, n_pages: int) -> None:
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
        if len(self._sending.streams) > 1:
            self._inbox.expect(State.TAKING_BACK, epoch, self._timing.checkpoint_timeout)
