# SPDX-License-Identifier: Apache-2.0
"""One connection: whole messages in, whole messages out, a time limit on every wait, and a sign of life when idle.
The bytes are a Transport's; pages go through the C library.

Sending is locked, so that a heartbeat comes between messages and never inside one. Receiving belongs to one thread.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from colocache import HEADER_BYTES, Cache, Sender, SendResult, message_header
from colocache.disks.write import Write
from colocache.errors import (
    BlockError,
    EpochError,
    LengthError,
    PacketError,
    PeerLostError,
    RangeError,
    SystemCallError,
    TimedOutError,
    TooLargeError,
)
from colocache.replication.errors import ProtocolError
from colocache.replication.heartbeat import Heartbeat
from colocache.replication.incoming import Incoming
from colocache.replication.messages import AbortKind, Message, MessageType, encode_reason, packed, parse_message
from colocache.replication.page_packets import PagePackets
from colocache.replication.read_ahead import ReadAhead, body_of_pages
from colocache.replication.transport import Transport

WORD_SECONDS = 0.1
REST_SECONDS = 0.5  # that `rest` listens at most: a peer that talks on must not hold up a takeover
DISCARD_BYTES = 1 << 18
SPIN_SECONDS = 0.001  # that `spin` keeps a core awake: sleeping and waking costs more than most answers take


class Channel:
    """Messages over a transport, which it owns. Context manager; closing it twice is allowed.

    `peer_timeout` seconds without a byte from the peer mean that it is lost. Raises PeerLostError when the connection
    is gone, TimedOutError when the peer is silent, ProtocolError when what came is damaged or may not come.
    """

    def __init__(self, transport: Transport, *, peer_timeout: float, device_state_max: int = 0) -> None:
        self._transport = transport
        self._ahead = ReadAhead(transport) if transport.plain_fd is None else None
        self._fd = transport.fileno()
        self.may_spin = False
        self._readable = select.poll()
        self._readable.register(self._fd, select.POLLIN)
        self.peer_timeout = peer_timeout
        self._device_state_max = device_state_max
        self._send_lock = threading.Lock()
        self._turn = threading.Lock()  # held by who waits for it: a lock alone is often had again by who gave it back
        self._heartbeat: Heartbeat | None = None
        self._coming = Incoming(self._receive, self._parse)
        self._body_left = 0  # bytes of a device state, or of pages that nobody wants, which nobody has read
        self._packets = PagePackets() if transport.plain_fd is None else None
        self._closed = False
        self._limit: tuple[float, str] | None = None
        self.over = ""  # the sentence of the limit that was reached
        self._broken = False  # half a message went out: nothing may follow it
        self._cause: PeerLostError | TimedOutError | None = None  # of that
        self.last_heard = time.monotonic()
        self.last_sent = time.monotonic()
        self.streams: tuple[Channel, ...] = ()  # further connections of the session: they end with this one

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- sending ----

    def send(self, message: MessageType, *, epoch: int = 0, a: int = 0, b: int = 0, body: bytes = b"") -> None:
        """Send one message whole."""
        self.send_together(packed(message, epoch=epoch, a=a, b=b, body=body))

    def send_together(self, parts: list[bytes], timeout: float | None = None) -> None:
        """Send messages made by `packed`, one after the other, with one call of the system: the peer wakes once.
        `timeout`: the longest wait without a byte taken by the peer, if it is not the peer timeout."""
        with self._send_lock:
            self._send_all([memoryview(part) for part in parts], timeout)

    def send_write(self, write: Write, timeout: float) -> None:
        """Send a DISK message; `timeout` is the longest wait without a byte taken by the peer."""
        head = write.head()
        header = message_header(int(MessageType.DISK), 0, len(head) + len(write.data))
        with self._turn:
            self._send_lock.acquire()
        try:
            self._send_all([memoryview(header + head), *([memoryview(write.data)] if write.data else [])], timeout)
        finally:
            self._send_lock.release()

    def send_pages(
        self, sender: Sender, *, epoch: int, timeout: float, max_pages: int = 0, stripe: int = 0, n_stripes: int = 1
    ) -> SendResult:
        """Send pending pages of `epoch`; `timeout` is the longest wait without a byte taken by the peer."""
        with self._turn:  # a write to a disk that waits goes before more pages, however soon they follow
            self._send_lock.acquire()
        try:
            self._check_open()
            try:
                part = {"epoch": epoch, "max_pages": max_pages, "stripe": stripe, "n_stripes": n_stripes}
                if self._packets is not None:
                    return self._packets.send(sender, lambda packets: self._send_all([packets], timeout), **part)
                return sender.send(self._fd, timeout=timeout, **part)
            except SystemCallError as error:  # whatever the network calls it, it ends a connection and no machine
                self._broken = True
                raise PeerLostError(f"the connection broke while pages were sent: {error}") from error
            except BaseException:
                self._broken = True
                raise
            finally:
                self.last_sent = time.monotonic()
        finally:
            self._send_lock.release()

    def abort(self, kind: AbortKind, reason: str, *, epoch: int = 0, n_pages: int = 0) -> None:
        """Tell the peer what is given up and why. Never raises: a peer that is gone needs no telling."""
        with contextlib.suppress(PeerLostError, TimedOutError):
            count = min(n_pages, 0xFFFFFFFF)
            self.send(MessageType.ABORT, epoch=epoch, a=int(kind), b=count, body=encode_reason(reason))

    def last_word(self, kind: AbortKind, reason: str) -> None:
        """Tell the peer why this side is about to go, without waiting for it; nothing can be sent after it.

        Any thread, and more than one: the first says it. A message under way gets WORD_SECONDS to leave; a peer that
        takes nothing finds only a broken connection.
        """
        body = encode_reason(reason)
        if self._send_lock.acquire(timeout=WORD_SECONDS):
            try:
                if not (self._closed or self._broken):
                    self._broken = True
                    header = message_header(int(MessageType.ABORT), 0, len(body), int(kind))
                    with contextlib.suppress(PeerLostError):
                        self._transport.send([memoryview(header + body)])
            finally:
                self._send_lock.release()
        self._transport.shut_down(socket.SHUT_WR)
        self.stop_reading()
        for stream in self.streams:
            stream.shut_down()

    def _send_all(self, parts: list[memoryview], seconds: float | None = None) -> None:
        self._check_open()
        try:
            while parts:
                sent = self._transport.send(parts)
                if sent is None:
                    self._wait(select.POLLOUT, "take a message", seconds)
                    continue
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][sent:]
        except (PeerLostError, TimedOutError) as error:
            self._cause, self._broken = error, True
            raise
        self.last_sent = time.monotonic()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLostError("this side has closed the connection")
        if self._broken:  # both threads of a side tell the cause, not what followed from it
            if self.over:
                raise TimedOutError(self.over)
            raise self._cause or PeerLostError("the connection broke in the middle of a message")

    # ---- receiving ----

    def receive(self) -> Message:
        """The next message with its body; for all but pages and a device state.

        Once begun it must be whole within the peer timeout: single bytes now and then are no sign of life.
        """
        begin = time.monotonic()
        while (message := self.try_receive()) is None:
            self._wait(select.POLLIN, self._awaited, left=max(0.0, self._patient_until(begin) - time.monotonic()))
        return message

    def receive_within(self, seconds: float, wake_fd: int = -1) -> Message | None:
        """The same, or None after `seconds`, and as soon as `wake_fd` is readable. Silence is counted over calls."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if wake_fd >= 0:
            poll.register(wake_fd, select.POLLIN)
        while (message := self.try_receive()) is None:
            now, patient = time.monotonic(), self._patient_until(self.last_heard)
            if now >= patient:
                raise TimedOutError(f"the peer did not {self._awaited} for {self.peer_timeout:g} s")
            if now >= until:
                return None
            ready = poll.poll(max(0.0, min(until, patient) - now) * 1000)
            if any(fd == wake_fd for fd, _ in ready):
                return None
        return message

    @property
    def _awaited(self) -> str:
        return "finish its message" if self._coming.begun else "say anything"

    def _patient_until(self, begin: float) -> float:
        return (self._coming.began_at if self._coming.begun else begin) + self.peer_timeout

    def spin(self) -> None:
        """Wait a moment for the peer's next byte without going to sleep. For a machine that stands: while it does, a
        core has nothing better to do. Whoever receives must be the one who spins. Only if `may_spin` is set."""
        until = time.monotonic() + SPIN_SECONDS
        if self._ahead is not None and self._ahead.has_some():
            return  # a poll does not tell of it
        while self.may_spin and time.monotonic() < until and not self._readable.poll(0):
            pass

    def has_come(self) -> bool:
        """Is there a byte of the peer's, or the end of the connection, to be read?"""
        return bool(self._readable.poll(0)) or (self._ahead is not None and self._ahead.has_some())

    def try_receive(self) -> Message | None:
        """The next message if all of it has come; never waits. What has come of it is kept for the next call."""
        self._check_open()
        return self._take_message()

    def _take_message(self) -> Message | None:
        try:
            return self._coming.take()
        finally:
            self.last_heard = max(self.last_heard, self._coming.last_heard)

    def receive_past_pages(self, cache: Cache, epoch: int = 0) -> tuple[Message, int]:
        """Take pages into the cache until another message comes: that message and the number of pages.

        The body of a VMSTATE_SEND is left in the socket: read it with `receive_into`.
        """
        self._check_open()
        try:
            header, n_pages = self._past_pages(cache, epoch)
        except (PacketError, EpochError, BlockError, RangeError, LengthError, TooLargeError) as error:
            raise ProtocolError(f"a packet of the peer was refused before a byte of it was stored: {error}") from error
        except SystemCallError as error:
            raise PeerLostError(f"the connection broke while pages were received: {error}") from error
        self.last_heard = time.monotonic()
        message = self._parse(header)
        if message.type is MessageType.VMSTATE_SEND:
            self._body_left = message.body_len
        if message.type is MessageType.VMSTATE_SEND or not message.body_len:
            return message, n_pages
        self._coming.begin(header)
        return self.receive(), n_pages

    def _past_pages(self, cache: Cache, epoch: int) -> tuple[bytes, int]:
        if self._ahead is None:
            return cache.receive_stream(self._fd, timeout=self.peer_timeout, epoch=epoch)
        return self._ahead.take_packets(cache, epoch, self._more_ahead)

    def rest(self) -> Iterator[Message]:
        """What the peer had said when the connection broke, for whoever needs it. Pages and a device state are thrown
        away: their epoch is given up. The error that ends it says nothing new, nor does its time's end."""
        until = time.monotonic() + REST_SECONDS
        while not self._closed and time.monotonic() < until and self.has_come():
            if self._body_left:
                n = self._receive(memoryview(bytearray(min(self._body_left, DISCARD_BYTES))))
                if not n:
                    return  # the rest of it is not here, nor is what follows
                self._body_left -= n
                continue
            if not self._coming.begun:
                header = bytearray(HEADER_BYTES)
                self._fill(memoryview(header), until)
                self._body_left = body_of_pages(header)
                if not self._body_left and (message := self._parse(bytes(header))).type is MessageType.VMSTATE_SEND:
                    self._body_left = message.body_len
                if self._body_left:
                    continue
                self._coming.begin(header)
            while (found := self._take_message()) is None:
                self._wait(select.POLLIN, self._awaited, left=max(0.0, until - time.monotonic()))
            yield found

    def _receive(self, room: memoryview) -> int | None:
        return self._transport.receive(room) if self._ahead is None else self._ahead.receive(room)

    def _more_ahead(self) -> None:
        self._wait(select.POLLIN, "say anything")

    def wait_for_word(self) -> None:
        """Until the next byte or the end of the connection, however long that takes."""
        self._check_open()
        if self._ahead is not None and self._ahead.has_some():
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLRDHUP)
        poll.poll()

    def receive_into(self, room: memoryview) -> None:
        """Fill `room` with the body of the VMSTATE_SEND that came last."""
        self._check_open()
        self._fill(room)

    def _fill(self, room: memoryview, until: float | None = None) -> None:
        done = 0
        while done < len(room):
            n = self._receive(room[done:])
            if n is None:
                left = None if until is None else max(0.0, until - time.monotonic())
                self._wait(select.POLLIN, "say anything", left=left)
                continue
            if n == 0:
                raise PeerLostError("the peer closed the connection")
            done += n
            self._body_left = max(0, self._body_left - n)  # of a header there is none
            self.last_heard = time.monotonic()

    def _parse(self, header: bytes) -> Message:
        return parse_message(header, self._device_state_max)

    def _wait(self, event: int, what: str, limit: float | None = None, *, left: float | None = None) -> None:
        """Of `limit` seconds, or the peer timeout, `left` are left."""
        poll = select.poll()
        poll.register(self._fd, event)
        limit = self.peer_timeout if limit is None else limit
        if not poll.poll((limit if left is None else left) * 1000):
            raise TimedOutError(f"the peer did not {what} for {limit:g} s")

    # ---- signs of life ----

    def start_heartbeat(self, message: MessageType, interval: float) -> None:
        """Send `message` whenever this side has been silent for `interval` seconds, until the channel closes."""

        def beat() -> bool:
            # A message under way is a sign of life itself, or is held up by a peer that the receiving side watches.
            if not self._send_lock.acquire(blocking=False):
                return True
            try:
                self._send_all([memoryview(message_header(int(message), 0, 0))])
                return True
            except (PeerLostError, TimedOutError):
                return False
            finally:
                self._send_lock.release()

        self._heartbeat = Heartbeat(
            interval=interval, idle_seconds=lambda: time.monotonic() - self.last_sent, beat=beat, look=self._watch_limit
        )
        self._heartbeat.start()

    # ---- a limit on everything ----

    def limit(self, seconds: float | None, what: str = "") -> None:
        """From now on `seconds` for all that is said until limit(None), however busily the peer talks.

        Then whoever receives is told that nothing more comes, and `over` is `what`, a sentence. Needs the heartbeat,
        which looks once per beat.
        """
        self._limit = None if seconds is None else (time.monotonic() + seconds, what)

    def _watch_limit(self) -> None:
        limit = self._limit
        if limit is None or time.monotonic() < limit[0]:
            return
        self._limit, self.over = None, limit[1]
        self.stop_reading()
        for stream in self.streams:
            stream.shut_down()

    # ---- the end ----

    def shut_down(self) -> None:
        """Break the connection; whoever sends or receives on it, in whatever thread, is told at once. Any thread."""
        self._transport.shut_down(socket.SHUT_RDWR)
        for stream in self.streams:
            stream.shut_down()

    def stop_reading(self) -> None:
        """Whoever receives on it is told that nothing more comes; a last word can still be sent. Any thread."""
        self._transport.shut_down(socket.SHUT_RD)

    def fileno(self) -> int:
        """For a poll."""
        return self._fd

    def end_sending(self) -> None:
        """The peer reads to the end of what was sent."""
        self._transport.shut_down(socket.SHUT_WR)

    def discard(self) -> int | None:
        """Throw away what has come, at most 256 KiB of it: how many bytes, 0 at the end of the connection."""
        try:
            return self._receive(memoryview(bytearray(DISCARD_BYTES)))
        except (PeerLostError, ProtocolError):  # of a handshake that went wrong, too
            return 0

    def close(self) -> None:
        """Close the connection and end the heartbeat."""
        if self._closed:
            return
        self._closed = True
        self.shut_down()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        # Whoever still sends has been woken by the shutdown; the descriptor must not be reused under them.
        with self._send_lock:
            self._transport.close()
        for stream in self.streams:
            stream.close()
