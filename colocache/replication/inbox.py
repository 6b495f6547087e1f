# SPDX-License-Identifier: Apache-2.0
"""The primary's ear: a thread that reads what the secondary says, so that silence, a broken connection and an ABORT are
noticed also while the primary is busy sending."""

from __future__ import annotations

import queue
import threading

from colocache.errors import ColocacheError, TimedOutError
from colocache.replication.channel import Channel, Message
from colocache.replication.errors import (
    ProtocolError,
    RefusedError,
    SecondaryLostError,
    SessionEndedError,
)
from colocache.replication.messages import AbortKind, MessageType, decode_reason


class CheckpointAbortedError(ColocacheError):
    """The secondary gave up this epoch and goes on with the next."""


def meaning_of(message: Message, wanted: MessageType, epoch: int) -> ColocacheError:
    """What an ABORT of the secondary means where `wanted` for `epoch` must come. ProtocolError: nothing.

    It may end the session at any time; refuse the pair instead of its HELLO; give up an epoch until it is sealed; and
    be lost between that and its running again.
    """
    reason = decode_reason(message.body)
    if message.a == AbortKind.SESSION:
        return SessionEndedError(f"the secondary ended the session: {reason}")
    if message.a == AbortKind.REFUSED and wanted is MessageType.HELLO:
        return RefusedError(f"the secondary refuses this primary: {reason}")
    if message.epoch == epoch:
        if message.a == AbortKind.CHECKPOINT and wanted in (MessageType.CHECKPOINT_REPLY, MessageType.VMSTATE_RECEIVED):
            return CheckpointAbortedError(reason)
        if message.a == AbortKind.LOAD and wanted is MessageType.VMSTATE_LOADED:
            return SecondaryLostError(f"the secondary is lost: {reason}")
    return ProtocolError(
        f"the secondary sent {message} of kind {message.a} where {wanted.name}"
        + (f"({epoch})" if epoch else "")
        + f" must come: {reason}"
    )


class Inbox:
    """Reads a channel until it ends. When it does, it breaks the channel, so that a sender in C is woken too."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._queue: queue.SimpleQueue[Message | ColocacheError] = queue.SimpleQueue()
        self._end: ColocacheError | None = None
        self._ended = threading.Event()
        self._load_awaited = 0  # the epoch whose LOADED must come, 0 = none: only then may the secondary be lost
        self.checkpoint_wanted = threading.Event()  # the secondary asked for one
        self.arrived = threading.Event()  # something waits, or checkpoint_wanted: for who waits for several things
        self._thread = threading.Thread(target=self._run, name="colocache-inbox", daemon=True)

    def start(self) -> None:
        """Begin to read; nobody else may receive on the channel from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Break the channel and wait for the thread."""
        self._channel.shut_down()
        if self._thread.is_alive():
            self._thread.join()

    def expect(self, wanted: MessageType, epoch: int, timeout: float) -> Message:
        """The next message, which must be `wanted` for `epoch`. Raises what an ABORT means, or why nothing comes."""
        self._load_awaited = epoch if wanted is MessageType.VMSTATE_LOADED else 0
        try:
            found = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise TimedOutError(
                f"the secondary lives but did not answer {wanted.name}({epoch}) within {timeout:g} s"
            ) from None
        if isinstance(found, ColocacheError):
            self._queue.put(found)  # the end stays the end
            raise found
        if found.type is MessageType.ABORT:
            raise meaning_of(found, wanted, epoch)
        if found.type is not wanted or found.epoch != epoch:
            raise ProtocolError(f"the secondary sent {found} where {wanted.name}({epoch}) must come")
        self._load_awaited = 0
        return found

    def check_idle(self) -> None:
        """Between checkpoints nothing but signs of life may come: raises what came instead, or the end."""
        self.arrived.clear()
        if self._queue.empty():
            return
        self.expect(MessageType.PONG, 0, 1.0)

    def why_ended(self, error: ColocacheError) -> ColocacheError:
        """After a failed send or a wait in vain: the reason that was read, which says more than the broken pipe."""
        if not self._ended.wait(1.0):
            return error
        last: ColocacheError = self._end or error
        while not self._queue.empty():
            found = self._queue.get()
            if isinstance(found, ColocacheError):
                self._queue.put(found)
                break
            if found.type is MessageType.ABORT:
                wanted = MessageType.VMSTATE_LOADED if self._load_awaited else MessageType.PONG
                last = meaning_of(found, wanted, self._load_awaited)
                break
        return last

    def _run(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if message.type is MessageType.PONG:
                    continue
                if message.type is MessageType.CHECKPOINT_REQUEST and message.epoch == 0:
                    self.checkpoint_wanted.set()
                else:
                    self._queue.put(message)
                self.arrived.set()
        except ColocacheError as error:
            self._end = error
            self._queue.put(error)
        finally:
            self._ended.set()
            self.arrived.set()
            self._channel.shut_down()
