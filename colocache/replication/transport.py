# SPDX-License-Identifier: Apache-2.0
"""Bytes between two processes: what a channel needs of a connection, and the plain socket as the first such.

Another transport is a class with these calls, and a line in security.py. No call waits; who wants to wait polls
`fileno()`. One thread receives and any number send, one at a time.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Protocol

from colocache.errors import PeerLostError, reason_of

UNIX_BUFFER_BYTES = 4 << 20  # on their way; the kernel may take less of it


class Transport(Protocol):
    """A connected byte stream. `receive` and `send` raise PeerLostError when it is broken."""

    def receive(self, room: memoryview) -> int | None:
        """Bytes read into `room`, 0 at the end of the stream; None: nothing is there yet, poll for POLLIN."""

    def send(self, parts: list[memoryview]) -> int | None:
        """How many bytes of `parts`, one after the other, were taken; None: none now, poll for POLLOUT."""

    def fileno(self) -> int:
        """For a poll."""

    def shut_down(self, how: int) -> None:
        """socket.SHUT_RD, SHUT_WR or SHUT_RDWR: both sides are told, whoever waits wakes up. Any thread; no error."""

    def close(self) -> None:
        """Give back the descriptor. Nobody else may use it any more."""

    @property
    def plain_fd(self) -> int | None:
        """A stream socket that carries exactly these bytes, for the C library to move pages on; None: there is none."""


class PlainTransport:
    """A socket as it is."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages leave at once
        else:  # TCP's grows by itself; a write to a disk that is cut in parts wakes both sides for each
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        self._socket = connection
        self._fd = connection.fileno()

    def receive(self, room: memoryview) -> int | None:
        """See Transport."""
        try:
            return self._socket.recv_into(room, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerLostError(f"the connection broke while receiving: {reason_of(error)}") from error

    def send(self, parts: list[memoryview]) -> int | None:
        """See Transport."""
        try:
            return self._socket.sendmsg(parts, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerLostError(f"the connection broke while sending: {reason_of(error)}") from error

    def fileno(self) -> int:
        """See Transport; the number stays the same after close."""
        return self._fd

    def shut_down(self, how: int) -> None:
        """See Transport."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)

    def close(self) -> None:
        """See Transport."""
        self._socket.close()

    @property
    def plain_fd(self) -> int | None:
        """See Transport."""
        return self._fd


Wrap = Callable[[socket.socket], Transport]  # takes a connected socket over
