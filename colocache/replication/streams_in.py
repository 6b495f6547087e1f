# SPDX-License-Identifier: Apache-2.0
"""The secondary's further streams: who may join a session, and a thread per stream that takes pages into the cache.

The loss of any stream is the loss of the connection. What a thread meets is kept as `failure`, and the control
connection stops reading, so that the session's own thread hears of it wherever it waits.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from colocache import HEADER_BYTES, Cache
from colocache.errors import ColocacheError, FailedOverError, PeerLostError, SealedError, TimedOutError
from colocache.replication.address import prepare
from colocache.replication.channel import Channel, parse_message
from colocache.replication.errors import ProtocolError, RefusedError
from colocache.replication.messages import AbortKind, Hello, MessageType, decode_reason

CANDIDATES_MAX = 64  # connections that have not said yet who they are
SLICE_SECONDS = 0.05


# ---- who joins ----


class _Candidate:
    """A connection whose first message is not whole yet. It is read without waiting: a silent one delays nobody."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._data = bytearray()

    def read(self, own: Hello, taken: tuple[int, ...]) -> int | None:
        """The stream's index once its message is whole, None before. PeerLostError; RefusedError: no stream of ours."""
        wanted = HEADER_BYTES
        while True:
            if len(self._data) >= HEADER_BYTES:
                try:
                    message = parse_message(bytes(self._data[:HEADER_BYTES]))
                except ProtocolError as error:
                    raise RefusedError(str(error)) from error
                if message.type is MessageType.HELLO:
                    # A primary that gave this session up and comes anew, or one of another pair: it tries again.
                    raise PeerLostError("a primary came while the streams of another were expected")
                if message.type is not MessageType.STREAM:
                    raise RefusedError(f"the peer sent {message} where STREAM must come")
                wanted = HEADER_BYTES + message.body_len
            if len(self._data) == wanted and wanted > HEADER_BYTES:
                break
            if len(self._data) == wanted:
                raise RefusedError("the stream shows no token")
            try:
                more = self.socket.recv(wanted - len(self._data), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise PeerLostError(f"the connection broke: {error.strerror or error}") from error
            if not more:
                raise PeerLostError("the peer closed the connection")
            self._data += more
        if bytes(self._data[HEADER_BYTES:]) != own.stream_token():
            raise RefusedError("the stream belongs to another session")
        if message.b != own.streams:
            raise RefusedError(f"the stream is one of {message.b}, this session has {own.streams}")
        if not 1 <= message.a < own.streams or message.a in taken:
            raise RefusedError(f"the stream has index {message.a}, which is not free in this session of {own.streams}")
        return message.a


def take_streams(
    channel: Channel, listener: socket.socket, own: Hello, *, seconds: float, refused: Callable[[str], None]
) -> None:
    """Wait for the further streams of the session that `own`, this side's HELLO, began; they end with `channel`.

    Whoever else comes is sent away and told to `refused`. TimedOutError: they did not all come within `seconds`;
    PeerLostError, RefusedError: the primary is gone, or refuses this secondary.
    """
    found: dict[int, Channel] = {}
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        waiting: dict[int, _Candidate] = {}
        stack.callback(_close, found, waiting)
        while len(found) < own.streams - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOutError(
                    f"{len(found)} of the primary's {own.streams - 1} further streams came within {seconds:g} s"
                )
            poll = select.poll()
            for fd in (channel.fileno(), listener.fileno(), *waiting):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll(left * 1000):
                if fd == channel.fileno():
                    _heed(channel)
                elif fd == listener.fileno():
                    with contextlib.suppress(OSError):
                        connection = prepare(listener.accept()[0])
                        if len(waiting) >= CANDIDATES_MAX:
                            connection.close()
                        else:
                            waiting[connection.fileno()] = _Candidate(connection)
                else:
                    _look_at(waiting, fd, found, own, channel.peer_timeout, refused)
        stack.pop_all()
        _close({}, waiting)
    channel.streams = tuple(found[index] for index in sorted(found))


def _close(found: dict[int, Channel], waiting: dict[int, _Candidate]) -> None:
    for stream in found.values():
        stream.close()
    for candidate in waiting.values():
        candidate.socket.close()


def _heed(channel: Channel) -> None:
    """What the primary says before its streams are there can only be that it refuses."""
    message = channel.receive()
    if message.type is MessageType.ABORT and message.a == AbortKind.REFUSED:
        raise RefusedError(f"the primary refuses this secondary: {decode_reason(message.body)}")
    raise ProtocolError(f"the primary sent {message} where its streams must come")


def _look_at(
    waiting: dict[int, _Candidate],
    fd: int,
    found: dict[int, Channel],
    own: Hello,
    peer_timeout: float,
    refused: Callable[[str], None],
) -> None:
    """Read on in a candidate; it becomes a stream, stays a candidate, or is sent away."""
    candidate = waiting[fd]
    try:
        index = candidate.read(own, tuple(found))
    except RefusedError as error:
        del waiting[fd]
        with Channel(candidate.socket, peer_timeout=SLICE_SECONDS) as stranger:
            stranger.abort(AbortKind.REFUSED, str(error))
        refused(str(error))
        return
    except PeerLostError:
        del waiting[fd]
        candidate.socket.close()
        return
    if index is not None:
        del waiting[fd]
        found[index] = Channel(candidate.socket, peer_timeout=peer_timeout)


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
                if message.type is not MessageType.PING:
                    raise ProtocolError(f"the primary sent {message} where pages must come")
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
