# SPDX-License-Identifier: Apache-2.0
"""One connection of a secondary, after HELLO: pages, checkpoints, and the end of the session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from colocache import Phase
from colocache.errors import ColocacheError, EpochError, IncompleteError, PeerLostError, TimedOutError, VetoError
from colocache.replication.channel import Channel, Message
from colocache.replication.errors import ProtocolError, RefusedError, SecondaryLostError, SessionEndedError
from colocache.replication.messages import AbortKind, MessageType, decode_reason, join_u64, split_u64
from colocache.replication.options import SecondaryOptions
from colocache.replication.results import CheckpointResult
from colocache.replication.signals import Flag
from colocache.replication.streams_in import InStreams
from colocache.replication.svm import Sealed, Svm


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
    ) -> None:
        self._svm = svm
        self._cache = svm.cache
        self._channel = channel
        self._streams = InStreams(channel, svm.cache)
        self._options = options
        self._stop = stop
        self._checkpoint_wanted = checkpoint_wanted
        self._done = done
        self._began_to_talk = False  # the primary: it has accepted this side's HELLO
        self._asked = False  # for the checkpoint that comes next
        self._peer_hash_ns = 0
        self._began = time.monotonic()
        self._n_pages = 0  # before the first checkpoint: the initial copy

    def run(self) -> str:
        """Until the primary says that it ends: its reason. PeerLostError, TimedOutError, ProtocolError, ..."""
        # After the streams are joined no page comes any more: only then may the caller give up the open epoch.
        with self._streams:
            try:
                return self._converse()
            except PeerLostError as error:
                # A stream that broke ended the control connection too, and knows better why.
                failure = self._streams.failure
                if failure is None or isinstance(failure, PeerLostError):
                    raise failure or error from None
                self._give_up(AbortKind.SESSION, str(failure))
                raise failure from error

    def _converse(self) -> str:
        try:
            return self._listen()
        except (PeerLostError, TimedOutError, SessionEndedError, SecondaryLostError, TakeOverNowError):
            raise
        except StoppedError as error:
            self._give_up(AbortKind.SESSION, str(error))
            raise
        except ColocacheError as error:
            self._give_up(AbortKind.SESSION, str(error))
            raise

    def _give_up(self, kind: AbortKind, reason: str, epoch: int = 0) -> None:
        self._channel.abort(kind, reason, epoch=epoch)
        self._channel.linger()

    def _listen(self) -> str:
        while True:
            message, n_pages = self._channel.receive_past_pages(self._cache)
            self._n_pages += n_pages
            self._heed()
            if message.type is MessageType.PING:
                if self._cache.status().sealed_epoch == 0:
                    self._cache.preflush()  # a moment between packets of the initial copy
            elif message.type is MessageType.CHECKPOINT_REQUEST:
                self._checkpoint(message.epoch)
            elif message.type is MessageType.ABORT:
                if message.a == AbortKind.END:
                    return decode_reason(message.body)
                self._aborted(message)
            else:
                raise ProtocolError(f"the primary sent {message} where pages or CHECKPOINT_REQUEST must come")
            self._began_to_talk = True

    def _heed(self) -> None:
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
            if not self._asked:
                self._asked = True
                self._channel.send(MessageType.CHECKPOINT_REQUEST)

    def _aborted(self, message: Message, asked: int = 0) -> None:
        """The primary gives something up. Raises, unless it is only the epoch. `asked`: of the checkpoint under way.

        It may end the session at any time; refuse the pair as its first word after HELLO; and give up the epoch under
        way, or one of which pages have come.
        """
        reason = decode_reason(message.body)
        if message.a == AbortKind.SESSION:
            raise SessionEndedError(f"the primary ended the session: {reason}")
        if message.a == AbortKind.REFUSED and not asked and not self._began_to_talk:
            raise RefusedError(f"the primary refuses this secondary: {reason}")
        if message.a == AbortKind.CHECKPOINT:
            status = self._cache.status()
            epoch = message.epoch
            if epoch == (asked or status.open_epoch or max(epoch, status.sealed_epoch + 1, status.receiving_epoch)):
                self._wait_for_pages(epoch, message.b)  # else its late pages would end the session
                given_up = self._svm.abort_open(reason)
                if asked or given_up:
                    what = f"the primary gave up epoch {epoch}: {reason}"
                    self._svm.events.emit("aborted", what, epoch=epoch, reason=reason)
                    self._heed_failover(epoch)
                    return
        raise ProtocolError(f"the primary sent {message} of kind {message.a}, which makes no sense here: {reason}")

    def _heed_failover(self, epoch: int) -> None:
        """A failover that was asked for while `epoch` was about to be sealed is granted when it is given up."""
        if self._cache.status().phase is Phase.FAILED_OVER:
            raise TakeOverNowError(f"failover was asked for while epoch {epoch} was given up")

    # ---- the checkpoint ----

    def _expect(self, wanted: MessageType, epoch: int, *, pages: bool) -> Message:
        """The next message but PING, which must be `wanted` for `epoch`; pages before it only if they may come.

        A primary that hangs but still gives signs of life must not hold this machine paused for ever.
        """
        limit = self._options.timing.checkpoint_timeout
        until = time.monotonic() + limit
        while True:
            if time.monotonic() > until:
                raise TimedOutError(f"the primary lives but sent no {wanted.name}({epoch}) for {limit:g} s")
            if self._stop.is_set():
                raise StoppedError("the secondary was stopped by its operator")
            message, n_pages = self._channel.receive_past_pages(self._cache, epoch)
            self._n_pages += n_pages
            if n_pages and not pages:
                raise ProtocolError(f"the primary sent {n_pages} pages where {wanted.name}({epoch}) must come")
            if message.type is MessageType.PING:
                if message.epoch == epoch:
                    self._peer_hash_ns = join_u64(message.a, message.b)
                continue
            if message.type is MessageType.ABORT:
                self._aborted(message, epoch)
                raise CheckpointGivenUpError(decode_reason(message.body))
            if message.type is not wanted or message.epoch != epoch:
                raise ProtocolError(f"the primary sent {message} where {wanted.name}({epoch}) must come")
            return message

    def _checkpoint(self, epoch: int) -> None:
        requested = time.monotonic_ns()
        status = self._cache.status()
        if epoch <= status.sealed_epoch or epoch < status.receiving_epoch:
            raise ProtocolError(
                f"the primary wants checkpoint {epoch}; {status.sealed_epoch} is sealed and pages of "
                f"{status.receiving_epoch} have come"
            )
        if status.sealed_epoch == 0:
            self._initial_copy_done()
        self._asked = False
        self._peer_hash_ns = 0
        self._svm.pause()
        self._channel.send(MessageType.CHECKPOINT_REPLY, epoch=epoch)
        try:
            self._expect(MessageType.VMSTATE_SEND, epoch, pages=False)
            size = self._expect(MessageType.VMSTATE_SIZE, epoch, pages=True)
        except CheckpointGivenUpError as error:
            if self._streams:
                # The primary waits for this: pages of the next epoch must not overtake its ABORT on another stream.
                self._channel.abort(AbortKind.CHECKPOINT, str(error), epoch=epoch)
            self._svm.resume()
            return
        try:
            room = self._cache.device_state_buffer(epoch, size.body_len)
        except EpochError as error:
            raise ProtocolError(f"pages of another epoch came in the checkpoint: {error}") from error
        self._channel.receive_into(room)
        room.release()
        self._wait_for_pages(epoch, join_u64(size.a, size.b))
        received = time.monotonic_ns()
        try:
            sealed = self._svm.seal(epoch, join_u64(size.a, size.b))
        except (VetoError, IncompleteError) as error:
            cause = error.__cause__ or error
            reason = f"{error.sentence}: {cause}" if cause is not error else str(error)
            self._channel.send(MessageType.ABORT, epoch=epoch, a=int(AbortKind.CHECKPOINT), body=reason.encode()[:1024])
            self._svm.events.emit("aborted", f"epoch {epoch} is given up: {reason}", epoch=epoch, reason=reason)
            self._heed_failover(epoch)
            self._svm.resume()
            return
        # What the primary spent on hashes is no part of a checkpoint without them.
        self._finish(epoch, sealed, min(received, requested + self._peer_hash_ns), received)

    def _wait_for_pages(self, epoch: int, n_pages: int) -> None:
        timing = self._options.timing
        self._streams.wait_for_pages(epoch, n_pages, quiet=timing.peer_timeout, limit=timing.checkpoint_timeout)

    def _finish(self, epoch: int, sealed: Sealed, requested: int, received: int) -> None:
        """The epoch is sealed: it is finished whatever becomes of the primary."""
        lost: ColocacheError | None = None
        try:
            self._channel.send(MessageType.VMSTATE_RECEIVED, epoch=epoch)
        except (PeerLostError, TimedOutError) as error:
            lost = error
        try:
            result, take_over = self._svm.finish(sealed, requested=requested, received=received)
        except SecondaryLostError as error:
            self._give_up(AbortKind.LOAD, str(error), epoch)
            raise
        self._done(result)
        if take_over:
            raise TakeOverNowError(f"failover was asked for while epoch {epoch} was sealed")
        if lost is not None:
            raise lost
        low, high = split_u64(result.verify_ns)
        self._channel.send(MessageType.VMSTATE_LOADED, epoch=epoch, a=low, b=high)

    def _initial_copy_done(self) -> None:
        seconds = time.monotonic() - self._began
        n_pages = self._n_pages + self._streams.n_pages
        self._svm.events.emit(
            "initial",
            f"the initial copy brought {n_pages} pages in {seconds:.2f} s",
            pages=n_pages,
            seconds=round(seconds, 4),
        )
