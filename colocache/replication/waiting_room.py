# SPDX-License-Identifier: Apache-2.0
"""Connections that have not said yet who they are, read side by side.

One that is silent, or says its first message byte by byte, keeps nobody else from pairing and is closed when its time
is over.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable

from colocache.errors import PeerLostError, TimedOutError
from colocache.replication.channel import Channel
from colocache.replication.ending import LINGER_SECONDS
from colocache.replication.errors import ProtocolError, RefusedError
from colocache.replication.messages import Message
from colocache.replication.transport import PlainTransport, Wrap

GUESTS_MAX = 64  # when one more comes, the one that came first goes
SLICE_SECONDS = 0.1  # a wait that must notice a signal
LAST_WORD_SECONDS = 0.5  # after the deadline, for who came before it


class WaitingRoom:
    """Accepts on `listener`; each connection has `peer_timeout` seconds for the whole of its first message."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        peer_timeout: float,
        device_state_max: int,
        wrap: Wrap = PlainTransport,
    ) -> None:
        self._listener = listener
        self._wrap = wrap
        self._peer_timeout = peer_timeout
        self._device_state_max = device_state_max
        self._guests: dict[int, tuple[Channel, float]] = {}  # by descriptor, in order of their time's end
        self._leaving: dict[int, tuple[Channel, float]] = {}  # were told to go, and may read it

    def next(
        self,
        deadline: float,
        halted: Callable[[], bool] = lambda: False,
        last_word: float = LAST_WORD_SECONDS,
        beside: Channel | None = None,
    ) -> tuple[Channel, Message | ProtocolError] | None:
        """The first connection to say something whole, or something wrong; it is the caller's to close from then on.

        None: nobody did by the deadline (who came before it has `last_word` seconds more), or `halted()`, or `beside`,
        a connection of the caller's, has something to read.
        """
        open_once = True  # also with a deadline that is over
        while not halted():
            now = time.monotonic()
            is_open = now < deadline or open_once
            if not is_open and (not self._guests or now >= deadline + last_word):
                return None
            open_once = False
            soonest = min((end for _, end in self._guests.values()), default=now + SLICE_SECONDS)
            until = min(deadline if now < deadline else deadline + last_word, soonest, now + SLICE_SECONDS)
            for fd in self._ready(is_open, max(0.0, until - now), beside):
                if beside is not None and fd == beside.fileno():
                    return None
                if fd == self._listener.fileno():
                    self._let_in()
                elif fd in self._leaving:
                    if self._leaving[fd][0].discard() == 0:
                        self._leaving.pop(fd)[0].close()
                elif fd in self._guests and (heard := self._hear(fd)) is not None:
                    return heard
            for group in (self._guests, self._leaving):
                for fd, (channel, end) in list(group.items()):
                    if time.monotonic() >= end:
                        del group[fd]
                        channel.close()
        return None

    def see_out(self, channel: Channel) -> None:
        """Close it when its peer has read what was said last, or after LINGER_SECONDS; nobody waits for that."""
        channel.end_sending()
        if len(self._leaving) == GUESTS_MAX:
            self._leaving.pop(next(iter(self._leaving)))[0].close()
        self._leaving[channel.fileno()] = channel, time.monotonic() + LINGER_SECONDS

    def close(self) -> None:
        """Close every connection; new ones may come."""
        for group in (self._guests, self._leaving):
            while group:
                group.popitem()[1][0].close()

    def _ready(self, is_open: bool, seconds: float, beside: Channel | None) -> list[int]:
        poll = select.poll()
        if beside is not None:
            poll.register(beside.fileno(), select.POLLIN)
        for fd in (*self._guests, *self._leaving):
            poll.register(fd, select.POLLIN)
        if is_open:
            poll.register(self._listener.fileno(), select.POLLIN)
        return [fd for fd, _ in poll.poll(seconds * 1000)]

    def _let_in(self) -> None:
        try:
            transport = self._wrap(self._listener.accept()[0])
        except (OSError, RefusedError, PeerLostError):
            return  # it was gone before we came, or may not talk to us at all
        if len(self._guests) == GUESTS_MAX:
            self._guests.pop(next(iter(self._guests)))[0].close()
        channel = Channel(transport, peer_timeout=self._peer_timeout, device_state_max=self._device_state_max)
        self._guests[channel.fileno()] = channel, time.monotonic() + self._peer_timeout

    def _hear(self, fd: int) -> tuple[Channel, Message | ProtocolError] | None:
        channel, _ = self._guests[fd]
        heard: Message | ProtocolError
        try:
            message = channel.try_receive()
            if message is None:
                return None
            heard = message
        except ProtocolError as error:
            heard = error
        except (PeerLostError, TimedOutError):  # a port scanner, or a primary that died while it connected
            del self._guests[fd]
            with contextlib.suppress(OSError):
                channel.close()
            return None
        del self._guests[fd]
        return channel, heard
