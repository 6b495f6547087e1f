# SPDX-License-Identifier: Apache-2.0
"""The primary's ear: a thread that reads what the secondary says, so that silence, a broken connection and an ABORT are
noticed also while the primary is busy sending.

Through a checkpoint whoever expects an answer reads it (`hear_here`): the way through a second thread would be part of
the pause. If it is then busy with something else for long, the thread reads on.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable

from colocache.errors import ColocacheError, TimedOutError
from colocache.replication.channel import Channel
from colocache.replication.conversation import Meaning, State, meaning_of
from colocache.replication.errors import (
    ProtocolError,
    RefusedError,
    SecondaryLostError,
    SessionEndedError,
    TookOverError,
)
from colocache.replication.messages import Message, MessageType, decode_reason

SLICE_SECONDS = 0.1
IDLE_SECONDS = 3600.0  # of the thread, between two looks round: the peer's silence wakes it long before


class CheckpointAbortedError(ColocacheError):
    """The secondary gave up this epoch and goes on with the next."""


def answer(state: State, message: Message, epoch: int = 0) -> bool:
    """Is this what a primary waits for in `state`? False: only a sign of life. Raises what anything else means."""
    meaning = meaning_of(state, message, this=epoch)
    reason = decode_reason(message.body) if message.type is MessageType.ABORT else ""
    if meaning is Meaning.SESSION_ENDS:
        raise SessionEndedError(f"the secondary ended the session: {reason}")
    if meaning is Meaning.REFUSED:
        raise RefusedError(f"the secondary refuses this primary: {reason}")
    if meaning is Meaning.EPOCH_GIVEN_UP:
        raise CheckpointAbortedError(reason)
    if meaning is Meaning.SECONDARY_LOST:
        raise SecondaryLostError(f"the secondary is lost: {reason}")
    if meaning is Meaning.TOOK_OVER:
        raise TookOverError(f"the secondary took over, and this primary stands still: {reason}")
    return meaning is Meaning.ANSWER


class Inbox:
    """Reads a channel until it ends. When it does, it breaks the channel, so that a sender in C is woken too."""

    def __init__(self, channel: Channel, tick: Callable[[], None] = lambda: None) -> None:
        """`tick` is called at least every SLICE_SECONDS while somebody waits here, and may end that by raising."""
        self._channel = channel
        self._tick = tick
        self.slice_seconds = SLICE_SECONDS  # between two ticks
        self._queue: queue.SimpleQueue[Message | ColocacheError] = queue.SimpleQueue()
        self._end: ColocacheError | None = None
        self._ended = threading.Event()
        self._state, self._epoch = State.AT_REST, 0
        self.checkpoint_wanted = threading.Event()  # the secondary asked for one
        self.arrived = threading.Event()  # something waits, or checkpoint_wanted: for who waits for several things
        self._reading = threading.Lock()  # held by whichever thread receives on the channel
        self._here = False  # the thread that expects reads, and the inbox's only now and then
        self._woken = threading.Event()  # for the inbox's thread, while it leaves the reading to another
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # the same, while it reads
        weakref.finalize(self, os.close, self._wake_fd)
        self._thread = threading.Thread(target=self._run, name="colocache-inbox", daemon=True)

    def start(self) -> None:
        """Begin to read; nobody else may receive on the channel from now on."""
        self._thread.start()

    def hear_here(self, here: bool) -> None:
        """True: from now on whoever calls `expect` reads the channel itself; False: the inbox's thread does again."""
        if here != self._here:
            self._here = here
            if here:
                self._woken.clear()
                os.eventfd_write(self._wake_fd, 1)
            else:
                self._woken.set()

    def stop(self) -> None:
        """Break the channel and wait for the thread."""
        self._channel.shut_down()
        self.hear_here(False)
        if self._thread.is_alive():
            self._thread.join()

    def expect(self, state: State, epoch: int, timeout: float) -> Message:
        """The answer that `state` waits for. Raises what else comes means, or why nothing comes."""
        self._state, self._epoch = state, epoch
        found = self._next(time.monotonic() + timeout)
        if found is None:
            raise TimedOutError(
                f"the secondary lives but did not answer {state.value.awaits}({epoch}) within {timeout:g} s"
            )
        if isinstance(found, ColocacheError):
            self._queue.put(found)  # the end stays the end
            raise found
        answer(state, found, epoch)
        self._state = State.AT_REST
        return found

    def _next(self, until: float) -> Message | ColocacheError | None:
        while (left := until - time.monotonic()) > 0:
            self._tick()
            if self._here:
                self._read_here(min(left, self.slice_seconds))
                left = 0.0
            try:
                return self._queue.get(timeout=min(left, self.slice_seconds)) if left else self._queue.get_nowait()
            except queue.Empty:
                continue
        return None

    def _read_here(self, seconds: float) -> None:
        """In the thread that expects: what has come, or comes within `seconds`."""
        with self._reading:
            if self._ended.is_set() or not self._queue.empty():
                return
            try:
                if self._state is not State.SEALED:  # then the secondary has use for every core
                    self._channel.spin()
                message = self._channel.receive_within(seconds)
                if message is not None:
                    self._sort(message)
            except ColocacheError as error:
                self._over(error)

    def check_idle(self) -> None:
        """Between checkpoints nothing but signs of life may come: raises what came instead, or the end."""
        self._tick()
        self.arrived.clear()
        if not self._queue.empty():
            self.expect(State.AT_REST, 0, 1.0)

    def why_ended(self, error: ColocacheError) -> ColocacheError:
        """After a failed send or a wait in vain: the reason that was read, which says more than the broken pipe."""
        self.hear_here(False)
        if not self._ended.wait(1.0):
            return error
        last: ColocacheError = self._end or error
        while not self._queue.empty():
            found = self._queue.get()
            if isinstance(found, ColocacheError):
                self._queue.put(found)
                break
            if found.type is MessageType.ABORT:
                try:
                    answer(self._state, found, self._epoch)
                except ColocacheError as meant:
                    last = meant
                break
        return last

    # ---- reading ----

    def _run(self) -> None:
        patience = self._channel.peer_timeout / 4
        while not self._ended.is_set():
            aside = self._here
            if aside:
                self._woken.wait(patience)
            # Whoever expects holds the lock while it waits for an answer: then there is nothing to be done here.
            if not self._reading.acquire(blocking=not aside):
                continue
            try:
                if not self._ended.is_set():
                    self._read(0.0 if aside and self._here else IDLE_SECONDS)
            except ColocacheError as error:
                self._over(error)
            finally:
                self._reading.release()

    def _read(self, seconds: float) -> None:
        """Sort what comes within `seconds` after the message before, until this thread is woken."""
        while (message := self._channel.receive_within(seconds, self._wake_fd)) is not None:
            self._sort(message)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _sort(self, message: Message) -> None:
        """What may come at any moment is heard here; the rest waits for whoever knows where the primary stands."""
        try:
            meaning = meaning_of(State.AT_REST, message)
        except ProtocolError:
            meaning = None
        if meaning is Meaning.ALIVE:
            return
        if meaning is Meaning.CHECKPOINT_WANTED:
            self.checkpoint_wanted.set()
        else:
            self._queue.put(message)
        self.arrived.set()

    def _over(self, error: ColocacheError) -> None:
        """Nothing more comes. By whoever holds the lock, once."""
        self._end = error
        self._queue.put(error)
        self._ended.set()
        self.arrived.set()
        self._channel.shut_down()
