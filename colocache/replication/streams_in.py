# SPDX-License-Identifier: Apache-2.0
"""The secondary's further streams: who may join a session, and a thread per stream that takes pages into the cache.

The loss of any stream is the loss of the connection. What a thread meets is kept as `failure`, and the control
connection stops reading, so that the session's own thread hears of it wherever it waits.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
import time
from collections.abc import Callable
from types import TracebackType

from colocache import Cache
from colocache.errors import ColocacheError, FailedOverError, PeerLostError, SealedError, TimedOutError
from colocache.replication.channel import Channel
from colocache.replication.conversation import Meaning, State, meaning_of
from colocache.replication.errors import ProtocolError, RefusedError, SessionEndedError
from colocache.replication.hello import Hello
from colocache.replication.messages import AbortKind, Message, MessageType, decode_reason
from colocache.replication.waiting_room import WaitingRoom

SLICE_SECONDS = 0.05


# ---- who joins ----


def take_streams(
    room: WaitingRoom, channel: Channel, own: Hello, *, seconds: float, refused: Callable[[str], None]
) -> None:
    """Wait for the further streams of the session that `own`, this side's HELLO, began; they end with `channel`.

    Whoever else comes is rejected and told to `refused`. TimedOutError: they did not all come within `seconds`;
    PeerLostError, RefusedError, SessionEndedError: the primary is gone, or gives up.
    """
    found: dict[int, Channel] = {}
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        stack.callback(_close, found)
        while len(found) < own.streams - 1:
            _hear_the_primary(channel)
            came = room.next(deadline, last_word=0.0, beside=channel)
            if came is not None:
                _let_join(room, *came, own, found, refused)
            elif time.monotonic() >= deadline:
                raise TimedOutError(
                    f"{len(found)} of the primary's {own.streams - 1} further streams came within {seconds:g} s"
                )
        stack.pop_all()
    channel.streams = tuple(found[index] for index in sorted(found))


def _close(found: dict[int, Channel]) -> None:
    for stream in found.values():
        stream.close()


def _hear_the_primary(channel: Channel) -> None:
    """What it says before its streams are there can only be that it gives up."""
    while (message := channel.try_receive()) is not None:  # all of it: over TLS a poll need not tell of the rest
        meaning = meaning_of(State.STREAMS, message)
        if meaning is Meaning.REFUSED:
            raise RefusedError(f"the primary refuses this secondary: {decode_reason(message.body)}")
        if meaning is Meaning.SESSION_ENDS:
            raise SessionEndedError(f"the primary ended the session: {decode_reason(message.body)}")


def _let_join(
    room: WaitingRoom,
    stream: Channel,
    first: Message | ProtocolError,
    own: Hello,
    found: dict[int, Channel],
    refused: Callable[[str], None],
) -> None:
    """A connection that said its first word becomes a stream, or is rejected."""
    reason = _why_not(first, own, found)
    if reason is None and isinstance(first, Message):
        found[first.a] = stream
    elif isinstance(first, Message) and first.type is MessageType.HELLO:
        stream.close()  # a primary that gave this session up and comes anew, or one of another pair: it tries again
    else:
        stream.abort(AbortKind.REFUSED, reason or "")
        room.see_out(stream)
        refused(reason or "")


def _why_not(first: Message | ProtocolError, own: Hello, found: dict[int, Channel]) -> str | None:
    """Why this is no stream of the session; None: it is one."""
    if isinstance(first, ProtocolError):
        return str(first)
    try:
        meaning = meaning_of(State.AT_THE_DOOR, first)
    except ProtocolError as error:
        return str(error)
    if meaning is not Meaning.JOINS:
        return f"the peer sent {first} where STREAM must come"
    if not first.body:
        return "the stream shows no token"
    if not hmac.compare_digest(first.body, own.stream_token()):
        return "the stream belongs to another session"
    if first.b != own.streams:
        return f"the stream is one of {first.b}, this session has {own.streams}"
    if not 1 <= first.a < own.streams or first.a in found:
        return f"the stream has index {first.a}, which is not free in this session of {own.streams}"
    return None


# ---- what they bring ----


class InStreams:
    """Receives on the further streams of `channel` from enter to exit. With none of them it does nothing."""

    def __init__(self, channel: Channel, cache: Cache) -> None:
        self._channel = channel
        self._cache = cache
        self._changed = threading.Condition()
        self._failure: ColocacheError | None = None
        self.n_pages = 0  # taken so far
        self._threads = [
            threading.Thread(target=self._run, args=(index, stream), name=f"colocache-stream-{index}", daemon=True)
            for index, stream in enumerate(channel.streams, 1)
        ]

    def __bool__(self) -> bool:
        return bool(self._threads)

    def __enter__(self) -> InStreams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Break the streams and wait for their threads: after this no page of theirs comes any more."""
        for stream in self._channel.streams:
            stream.shut_down()
        for thread in self._threads:
            thread.join()

    @property
    def failure(self) -> ColocacheError | None:
        """Why a stream ended, if one did."""
        return self._failure

    def wait_for_pages(self, epoch: int, n_pages: int, *, quiet: float, limit: float) -> None:
        """Until `n_pages` pages of the open epoch have come over all streams together.

        ProtocolError if none came for `quiet` seconds, or not all within `limit`; the failure of a stream.
        """
        if not self._threads:
            return
        begin = heard = time.monotonic()
        seen = 0
        with self._changed:
            while True:
                status = self._cache.status()
                came = status.received_pages if status.open_epoch == epoch else 0
                if came >= n_pages:
                    return
                if self._failure is not None:
                    raise self._failure
                now = time.monotonic()
                if came != seen:
                    seen, heard = came, now
                if now - heard >= quiet or now - begin >= limit:
                    raise ProtocolError(
                        f"epoch {epoch}: the primary says that it sent {n_pages} pages, {came} came within "
                        f"{now - begin:.1f} s"
                    )
                self._changed.wait(SLICE_SECONDS)

    def _run(self, index: int, stream: Channel) -> None:
        try:
            while True:
                # Between bursts no limit: whether the peer lives is for the control connection to say.
                stream.wait_for_word()
                message, n_pages = stream.receive_past_pages(self._cache)
                meaning_of(State.ON_A_STREAM, message)
                with self._changed:
                    self.n_pages += n_pages
                    self._changed.notify_all()
        except FailedOverError as error:
            self._fail(error)
        except (PeerLostError, TimedOutError) as error:
            self._fail(PeerLostError(f"stream {index} broke: {error}"))
        except (ProtocolError, SealedError) as error:
            self._fail(ProtocolError(f"on stream {index}: {error}"))
        except ColocacheError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 -- a thread that ends must never leave the session waiting
            self._fail(ColocacheError(f"stream {index} ended: {type(error).__name__}: {error}"))

    def _fail(self, error: ColocacheError) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
        self._channel.stop_reading()
