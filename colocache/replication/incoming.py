# SPDX-License-Identifier: Apache-2.0
"""A message as it comes, in pieces of any length: what is here of it, and the whole when it is. Never waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from colocache import HEADER_BYTES
from colocache.errors import PeerLostError
from colocache.replication.errors import ProtocolError
from colocache.replication.messages import Message, MessageType


class Incoming:
    """Reads by `receive` (as Transport's); `parse` makes a header a message, its length within its bound."""

    def __init__(self, receive: Callable[[memoryview], int | None], parse: Callable[[bytes], Message]) -> None:
        self._receive, self._parse = receive, parse
        self._header = bytearray()
        self._message: Message | None = None  # whose header is whole
        self._body = bytearray()
        self._n_body = 0
        self.began_at = 0.0
        self.last_heard = 0.0

    @property
    def begun(self) -> bool:
        """Has a part of it come?"""
        return bool(self._header)

    def begin(self, header: bytes | bytearray) -> None:
        """The beginning of a message, which somebody else has read."""
        self.last_heard = time.monotonic()
        if not self._header:
            self.began_at = self.last_heard
        self._header += header

    def take(self) -> Message | None:
        """The message if all of it has come; what has come is kept for the next call. PeerLostError, ProtocolError."""
        while len(self._header) < HEADER_BYTES:
            more = bytearray(HEADER_BYTES - len(self._header))
            n = self._some(memoryview(more))
            if n is None:
                return None
            self.begin(more[:n])
        if self._message is None:
            self._see_header()
        while self._n_body < len(self._body):
            n = self._some(memoryview(self._body)[self._n_body :])
            if n is None:
                return None
            self._n_body += n
            self.last_heard = time.monotonic()
        message, body = self._message, bytes(self._body)
        self._forget()
        return message._replace(body=body) if body and message else message

    def _see_header(self) -> None:
        try:
            message = self._parse(bytes(self._header))
            if message.type in (MessageType.PAGES, MessageType.VMSTATE_SEND):
                raise ProtocolError(f"the peer sent {message}, which may not come here")
        except ProtocolError:
            self._forget()
            raise
        self._message, self._body, self._n_body = message, bytearray(message.body_len), 0

    def _forget(self) -> None:
        self._header.clear()
        self._message, self._body, self._n_body = None, bytearray(), 0

    def _some(self, room: memoryview) -> int | None:
        n = self._receive(room)
        if n == 0:
            raise PeerLostError("the peer closed the connection")
        return n
