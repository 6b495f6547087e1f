# SPDX-License-Identifier: Apache-2.0
"""Bytes of a transport without a socket for the C library: read ahead in large pieces, whole packets handed over."""

from __future__ import annotations

from collections.abc import Callable

from colocache import HEADER_BYTES, MSG_PAGES, Cache
from colocache.errors import PeerLostError
from colocache.replication.errors import ProtocolError
from colocache.replication.transport import Transport

ROOM_BYTES = 1 << 20
PACKET_BYTES_MAX = 40 + 1024 * 16 + (16 << 20)  # 4096 pages of 4 KiB, or some of a larger kind


def body_of_pages(header: bytes | bytearray) -> int:
    """Bytes behind the header of a PAGES packet, 0 for any other message. ProtocolError: more than are taken. (Its
    checksum covers more than the header: only the C library, which has the rest, can tell whether it is right.)"""
    if int.from_bytes(header[6:8], "little") != MSG_PAGES:
        return 0
    n_bytes = int.from_bytes(header[16:24], "little")
    if HEADER_BYTES + n_bytes > PACKET_BYTES_MAX:
        raise ProtocolError(f"a PAGES packet of {n_bytes} bytes came, at most {PACKET_BYTES_MAX} are taken")
    return n_bytes


class ReadAhead:
    """Reads `transport`; what was read too far is kept for whoever reads next. One thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._room = bytearray()
        self._first = self._end = 0  # what is in the room and not taken yet

    def receive(self, room: memoryview) -> int | None:
        """As Transport's."""
        n = min(len(room), self._end - self._first)
        if not n:
            return self._transport.receive(room)
        room[:n] = memoryview(self._room)[self._first : self._first + n]
        self._took(n)
        return n

    def has_some(self) -> bool:
        """Is there a byte that a poll would not tell of? Looks, and never waits."""
        return self._first < self._end or self._fill(1)

    def take_packets(self, cache: Cache, epoch: int, wait: Callable[[], None]) -> tuple[bytes, int]:
        """As Cache.receive_stream: pages into the cache until another message's header; `wait` for more bytes."""
        n_pages = 0
        while True:
            wanted = self._wanted()
            if self._end - self._first >= wanted:
                with memoryview(self._room) as room, room[self._first : self._end] as data:
                    used, header, n = cache.receive_packets(data, epoch=epoch)
                self._took(used)
                n_pages += n
                if header is not None:
                    return header, n_pages
            elif not self._fill(wanted):
                wait()

    def _wanted(self) -> int:
        """How many bytes make the next step: a header, or the packet that it begins."""
        at = self._first
        if self._end - at < HEADER_BYTES:
            return HEADER_BYTES
        return HEADER_BYTES + body_of_pages(self._room[at : at + HEADER_BYTES])

    def _fill(self, wanted: int) -> bool:
        """Read what is there, until `wanted` bytes are. False: there was nothing."""
        if self._first + max(wanted, 1) > len(self._room):
            kept = self._room[self._first : self._end]
            if max(wanted, ROOM_BYTES) > len(self._room):
                self._room = bytearray(max(wanted, ROOM_BYTES))
            self._room[: len(kept)] = kept  # the same room again: a new one would be zeroed and faulted in each time
            self._first, self._end = 0, len(kept)
        some = False
        with memoryview(self._room) as room:
            while self._end < len(self._room) and self._end - self._first < max(wanted, 1):
                n = self._transport.receive(room[self._end :])
                if n is None:
                    return some
                if n == 0:
                    raise PeerLostError("the peer closed the connection")
                self._end += n
                some = True
        return some

    def _took(self, n: int) -> None:
        self._first += n
        if self._first == self._end:
            self._first = self._end = 0
