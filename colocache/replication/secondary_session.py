# SPDX-License-Identifier: Apache-2.0
"""One connection of a secondary, after HELLO: pages, checkpoints, and the end of the session."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from colocache import SealResult
from colocache.disks.write import Total
from colocache.errors import (
    ColocacheError,
    EpochError,
    FailedOverError,
    IncompleteError,
    PacketError,
    PeerLostError,
    TimedOutError,
    TooLargeError,
    VetoError,
)
from colocache.outputs.travel import unpack
from colocache.replication.apart import Apart
from colocache.replication.channel import Channel
from colocache.replication.conversation import Meaning, State, meaning_of, out_of_order
from colocache.replication.ending import end_with
from colocache.replication.errors import ProtocolError, RefusedError, SecondaryLostError, SessionEndedError
from colocache.replication.memory_limit import MemoryLimit
from colocache.replication.messages import (
    AbortKind,
    Message,
    MessageType,
    decode_input,
    decode_reason,
    encode_reason,
    join_u64,
    split_u64,
)
from colocache.replication.options import SecondaryOptions
from colocache.replication.results import CheckpointResult
from colocache.replication.signals import Flag
from colocache.replication.stages import Span, Stages
from colocache.replication.streams_in import InStreams
from colocache.replication.svm import Svm
from colocache.replication.trace import Trace


class StoppedError(ColocacheError):
    """This side was stopped by its operator."""


class TakeOverNowError(ColocacheError):
    """Failover was asked for, and the moment has come."""


class CheckpointGivenUpError(ColocacheError):
    """The primary gave up the epoch that is arriving."""


class SecondarySession:
    """Listens to one primary until it ends the session in order, or until an error says why there is no more."""

    def __init__(
        self,
        svm: Svm,
        channel: Channel,
        options: SecondaryOptions,
        *,
        stop: threading.Event,
        checkpoint_wanted: Flag,
        done: Callable[[CheckpointResult], None],
        trace: Trace | None = None,
        limit: MemoryLimit | None = None,
    ) -> None:
        self._svm = svm
        self._cache = svm.cache
        self._channel = channel
        self._streams = InStreams(channel, svm.cache)
        self._apart = Apart(channel.fileno(), "secondary", wanted=not self._streams, own_cores=options.own_cores)
        channel.may_spin = self._apart.own_core
        self._options = options
        self._stop = stop
        self._checkpoint_wanted = checkpoint_wanted
        self._done = done
        self._trace = trace or Trace()
        self._state = State.READY
        self._limit = limit
        self._asking = threading.Lock()
        self._asked = False  # for the checkpoint that comes next
        self._began = time.monotonic()
        self._n_pages = 0  # before the first checkpoint: the initial copy

    def run(self) -> str:
        """Until the primary says that it ends: its reason. PeerLostError, TimedOutError, ProtocolError, ..."""
        if self._limit:
            self._limit.ask = self.ask
        # After the streams are joined no page comes any more: only then may the caller give up the open epoch.
        with self._streams:
            try:
                return self._converse()
            except PeerLostError as error:
                if self._channel.over:
                    end_with(self._channel, AbortKind.SESSION, self._channel.over)
                    raise TimedOutError(self._channel.over) from error
                # A stream that broke ended the control connection too, and knows better why.
                failure = self._streams.failure
                if failure is None or isinstance(failure, PeerLostError):
                    raise failure or error from None
                end_with(self._channel, AbortKind.SESSION, str(failure))
                raise failure from error

    def _converse(self) -> str:
        try:
            return self._listen()
        except (PeerLostError, TakeOverNowError, FailedOverError):
            self._hear_the_rest()
            raise
        except (TimedOutError, SessionEndedError, SecondaryLostError):
            raise
        except StoppedError as error:
            end_with(self._channel, AbortKind.SESSION, str(error))
            raise
        except ColocacheError as error:
            end_with(self._channel, AbortKind.SESSION, str(error))
            raise

    def _listen(self) -> str:
        self._svm.output.lost(self._cache.status().sealed_epoch)  # it sends again what it did not hear to be sealed
        self._svm.disks.lost()
        while True:
            message, n_pages = self._channel.receive_past_pages(self._cache)
            self._n_pages += n_pages
            self._look_round()
            meaning = meaning_of(self._state, message, fits=self._may_be_open)
            if self._state is State.READY and meaning is not Meaning.REFUSED:
                self._state = State.BETWEEN
            if meaning is Meaning.ALIVE:
                if self._cache.status().sealed_epoch == 0:
                    self._cache.preflush()  # a moment between packets of the initial copy
            elif meaning is Meaning.OUTPUT:
                self._svm.output.released(self._cache.status().sealed_epoch)  # as below
                self._output_came(message)
            elif meaning is Meaning.TYPED:
                self._input_came(message)
            elif meaning is Meaning.DISK:
                self._disk_came(message)
            elif meaning is Meaning.CHECKPOINT:
                # It speaks of another only after it heard RECEIVED, and let out its output.
                self._svm.output.released(self._cache.status().sealed_epoch)
                with self._apart:
                    self._checkpoint(message.epoch, join_u64(message.a, message.b))
                self._state = State.BETWEEN
            elif meaning is Meaning.EPOCH_GIVEN_UP:
                self._epoch_given_up(message)
            elif meaning is Meaning.ENDED:
                return decode_reason(message.body)
            else:
                self._over(meaning, message)

    def _output_came(self, message: Message) -> None:
        try:
            origin, pieces = unpack(message.epoch, message.body)
            for piece in pieces:
                self._svm.output.arrived(piece, origin)
        except (PacketError, TooLargeError) as error:
            raise ProtocolError(f"the primary sent {message} that can't be kept: {error}") from error

    def _input_came(self, message: Message) -> None:
        offset, data = decode_input(message)
        if message.epoch:
            self._svm.typed.taken_in(message.epoch, offset)
            return
        try:
            self._svm.typed.arrived(offset, data)
        except TooLargeError as error:
            raise ProtocolError(str(error)) from error

    def _hear_the_rest(self) -> None:
        """This side's own words found nobody, or it listens no more: what the primary said before may still be here."""
        with contextlib.suppress(ColocacheError):
            for message in self._channel.rest():
                if message.type is MessageType.INPUT:
                    self._input_came(message)

    def _disk_came(self, message: Message) -> None:
        """A write to a disk, or how many of them came. SystemCallError: there is no room for it."""
        try:
            if message.type is MessageType.DISK:
                self._svm.disks.come(message.body)
            else:
                self._svm.disks.told(Total.unpack(message.body))
        except (PacketError, TooLargeError) as error:
            raise ProtocolError(f"the primary sent {message} that can't be kept: {error}") from error

    def _look_round(self) -> None:
        """Between messages: stop if asked to, notice a machine that died, ask for a checkpoint."""
        if self._stop.is_set():
            raise StoppedError("the secondary was stopped by its operator")
        if self._svm.machine.failure is not None:
            raise ColocacheError(f"the secondary's machine failed: {self._svm.machine.failure}")
        limit = self._options.ask_at_dirty_pages
        if self._checkpoint_wanted.is_set() or (
            limit and self._svm.running and self._svm.machine.dirty_hint() >= limit
        ):
            self._checkpoint_wanted.clear()
            self.ask()

    def ask(self) -> None:
        """Ask for a checkpoint, once for each. Any thread."""
        with self._asking:
            if self._asked:
                return
            self._asked = True
        self._channel.send(MessageType.CHECKPOINT_REQUEST)

    def _may_be_open(self, epoch: int) -> bool:
        """May a message now speak of this epoch: the one whose pages have come, or one newer than all before?"""
        status = self._cache.status()
        if status.open_epoch:
            return epoch == status.open_epoch
        return epoch > max(status.sealed_epoch, status.receiving_epoch)

    def _over(self, meaning: Meaning, message: Message) -> None:
        """Raise what ends the session."""
        reason = decode_reason(message.body)
        if meaning is Meaning.SESSION_ENDS:
            raise SessionEndedError(f"the primary ended the session: {reason}")
        if meaning is Meaning.REFUSED:
            raise RefusedError(f"the primary refuses this secondary: {reason}")
        raise out_of_order(self._state, message)

    def _epoch_given_up(self, message: Message) -> None:
        """The primary gives up the epoch under way, or one of which only pages have come."""
        epoch, reason = message.epoch, decode_reason(message.body)
        self._wait_for_pages(epoch, message.b)  # else its late pages would end the session
        if not self._svm.abort_open(reason) and self._state is State.BETWEEN:
            raise out_of_order(self._state, message)  # nothing of it has come
        what = f"the primary gave up epoch {epoch}: {reason}"
        self._svm.events.emit("aborted", what, epoch=epoch, reason=reason)
        self._take_over_if_asked(epoch)

    def _take_over_if_asked(self, epoch: int) -> None:
        """A failover that was asked for while `epoch` was about to be sealed is granted when it is given up."""
        if self._svm.failed_over:
            reason = f"failover was asked for while epoch {epoch} was given up"
            self._channel.last_word(AbortKind.TOOK_OVER, reason)
            raise TakeOverNowError(reason)

    # ---- the checkpoint ----

    def _expect(self, epoch: int) -> Message:
        """The message that this state waits for; pages before it go to the cache if they may come.

        A primary that hangs but still gives signs of life must not hold this machine paused for ever.
        """
        state = self._state
        limit = self._options.timing.checkpoint_timeout
        until = time.monotonic() + limit
        while True:
            if time.monotonic() > until:
                raise TimedOutError(f"the primary lives but sent no {state.value.awaits}({epoch}) for {limit:g} s")
            if self._stop.is_set():
                raise StoppedError("the secondary was stopped by its operator")
            self._channel.spin()
            message, n_pages = self._channel.receive_past_pages(self._cache, epoch)
            self._n_pages += n_pages
            if n_pages and not any(entry.meaning is Meaning.PAGES for entry in state.value.hears):
                raise ProtocolError(f"the primary sent {n_pages} pages where {state.value.awaits}({epoch}) must come")
            meaning = meaning_of(state, message, this=epoch)
            if meaning is Meaning.ANSWER:
                return message
            if meaning is Meaning.EPOCH_GIVEN_UP:
                self._epoch_given_up(message)
                raise CheckpointGivenUpError(decode_reason(message.body))
            if meaning is Meaning.OUTPUT:
                self._output_came(message)
            elif meaning in (Meaning.TYPED, Meaning.TAKEN_IN):
                self._input_came(message)
            elif meaning in (Meaning.DISK, Meaning.DISKS):
                self._disk_came(message)
            elif meaning is not Meaning.ALIVE:
                self._over(meaning, message)

    def _checkpoint(self, epoch: int, wanted_pages: int) -> None:
        stages = Stages()
        if self._cache.status().sealed_epoch == 0:
            self._initial_copy_done()
        self._asked = False
        self._svm.rehearse()
        stages.done("rehearse")
        if self._svm.running:
            self._svm.sync()  # most of its log, so that little of it is left when the primary stands
        stages.done("first sync")
        self._svm.pause()
        stages.done("stop")
        may_have = self._limit.make_room(wanted_pages) if self._limit else 0
        self._say(MessageType.CHECKPOINT_REPLY, epoch, may_have)
        self._svm.sync()  # while the primary stops its machine and saves it
        stages.done("sync")
        if not self._channel.has_come():  # else it would be waited for
            self._svm.rehearse()
            stages.done("rehearse again")
        limit = self._options.timing.checkpoint_timeout
        self._channel.limit(limit, f"the primary did not complete epoch {epoch} within {limit:g} s")
        try:
            self._state = State.PAUSED
            self._receive_state(self._expect(epoch), stages)
            self._state = State.COMPLETING
            size = self._expect(epoch)
        except CheckpointGivenUpError as error:
            if self._streams:
                # The primary waits for this: pages of the next epoch must not overtake its ABORT on another stream.
                self._channel.abort(AbortKind.CHECKPOINT, str(error), epoch=epoch)
            self._channel.limit(None)
            self._svm.resume()
            return
        n_pages = join_u64(size.a, size.b)
        self._wait_for_pages(epoch, n_pages)
        stages.done("pages")
        self._channel.limit(None)
        try:
            sealed = self._svm.seal(epoch, n_pages)
        except (VetoError, IncompleteError) as error:
            cause = error.__cause__ or error
            reason = f"{error.sentence}: {cause}" if cause is not error else str(error)
            self._channel.send(MessageType.ABORT, epoch=epoch, a=int(AbortKind.CHECKPOINT), body=encode_reason(reason))
            self._svm.events.emit("aborted", f"epoch {epoch} is given up: {reason}", epoch=epoch, reason=reason)
            self._take_over_if_asked(epoch)
            self._svm.resume()
            return
        stages.done("seal")
        self._finish(epoch, sealed, stages)

    def _receive_state(self, send: Message, stages: Stages) -> None:
        """The device state goes straight into the cache, and is looked at while the last pages are still to come."""
        stages.done("wait")
        try:
            room = self._cache.device_state_buffer(send.epoch, send.body_len)
        except EpochError as error:
            raise ProtocolError(f"pages of another epoch came in the checkpoint: {error}") from error
        with room:
            self._channel.receive_into(room)
            self._svm.look_at(room)
        stages.done("state")

    def _wait_for_pages(self, epoch: int, n_pages: int) -> None:
        timing = self._options.timing
        self._streams.wait_for_pages(epoch, n_pages, quiet=timing.peer_timeout, limit=timing.checkpoint_timeout)

    def _finish(self, epoch: int, sealed: SealResult, stages: Stages) -> None:
        """The epoch is sealed: it is finished whatever becomes of the primary."""
        lost: ColocacheError | None = None
        try:
            self._say(MessageType.VMSTATE_RECEIVED, epoch, self._limit.share() if self._limit else 0)
        except (PeerLostError, TimedOutError) as error:
            lost = error
        self._svm.typed.sealed(epoch)
        stages.done("answer")
        try:
            result, take_over = self._svm.finish(sealed, stages)
        except SecondaryLostError as error:
            end_with(self._channel, AbortKind.LOAD, str(error), epoch=epoch)
            raise
        if take_over:
            # Before the machine runs: the primary waits for LOADED, and must stand still instead.
            self._channel.last_word(AbortKind.TOOK_OVER, f"failover was asked for while epoch {epoch} was sealed")
        self._done(result)
        if take_over:
            raise TakeOverNowError(f"failover was asked for while epoch {epoch} was sealed")
        if lost is not None:
            raise lost
        self._channel.send(MessageType.VMSTATE_LOADED, epoch=epoch)
        self._svm.tidy()
        stages.done("loaded")
        self._trace.checkpoint(
            epoch,
            stages,
            Span("the secondary's machine stands", stages.span("stop").end, stages.span("resume").end),
            Span("pause", stages.span("pages").end, stages.span("resume").end),
            below=result.parts(stages),
        )

    def _say(self, message: MessageType, epoch: int, n_pages: int) -> None:
        """A message that tells the primary how many pages it may have; 0 = any number."""
        low, high = split_u64(n_pages)
        self._channel.send(message, epoch=epoch, a=low, b=high)

    def _initial_copy_done(self) -> None:
        seconds = time.monotonic() - self._began
        n_pages = self._n_pages + self._streams.n_pages
        self._svm.events.emit(
            "initial",
            f"the initial copy brought {n_pages} pages in {seconds:.2f} s",
            pages=n_pages,
            seconds=round(seconds, 4),
        )
