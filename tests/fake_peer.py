# SPDX-License-Identifier: Apache-2.0
"""A peer on whose connection a test says what it wants, in place of a primary or of a secondary."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from toy import HEADER, Pair

from colocache import message_header
from colocache._native import ffi, lib
from colocache.replication.address import Address
from colocache.replication.hello import Hello
from colocache.replication.messages import MessageType, decode_reason

M = MessageType
PAGE = 4096
STATE = b'{"steps": 4, "sums": null}'  # of a toy machine


class FakePeer:
    """A connection on which a test says what it wants."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.n_pages = 0  # the number in the words a and b of what was heard last
        connection.settimeout(10)

    def say(self, kind: int, epoch: int = 0, body: bytes = b"", a: int = 0, b: int = 0) -> None:
        self.socket.sendall(message_header(kind, epoch, len(body), a, b) + body)

    def hear(self) -> tuple[MessageType, int, bytes]:
        """The next message but PING and PONG."""
        while True:
            # Not parse_header: the checksum of PAGES covers more than the header.
            _, _, kind, epoch, length, low, high, _ = HEADER.unpack(self._read(HEADER.size))
            body = self._read(length)
            if kind not in (M.PING, M.PONG):
                self.n_pages = high << 32 | low
                return MessageType(kind), epoch, body

    def hear_end(self) -> str:
        """The reason of the ABORT that must come, after which the connection must end."""
        while True:
            kind, _, body = self.hear()
            if kind is M.ABORT:
                break
        with contextlib.suppress(OSError):
            while self.socket.recv(1 << 16):
                pass
        return decode_reason(body)

    def _read(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            more = self.socket.recv(n - len(data))
            if not more:
                raise EOFError
            data += more
        return bytes(data)


@contextlib.contextmanager
def fake_primary(pair: Pair, /, **changes: object) -> Iterator[FakePeer]:
    """A primary that has said HELLO properly, unless `changes` say otherwise."""
    hello = Hello("primary", "toy", None, 0, 0, False, "toy", pair.blocks)
    with pair.address.connect(5.0) as connection:
        peer = FakePeer(connection)
        peer.say(M.HELLO, body=replace(hello, **changes).encode())  # type: ignore[arg-type]
        yield peer


def accepted(peer: FakePeer) -> None:
    assert peer.hear()[0] is M.HELLO
    assert peer.hear()[0] is M.CHECKPOINT_READY


@contextlib.contextmanager
def fake_secondary(pair: Pair, folder: Path) -> Iterator[Callable[[], FakePeer]]:
    """A listener for the primary of `pair`; calling it gives the next connection, whose HELLO was read."""
    listener, address = Address.parse(f"unix:{folder}/fake").listen()
    pair.primary._address = address
    with listener, contextlib.ExitStack() as stack:
        listener.settimeout(10)

        def accept() -> FakePeer:
            peer = FakePeer(stack.enter_context(listener.accept()[0]))
            assert peer.hear()[0] is M.HELLO
            return peer

        yield accept
    address.remove()


def its_hello(pair: Pair, /, **changes: object) -> bytes:
    hello = Hello("secondary", "toy", bytes(range(16)), 0, 0, False, "toy", pair.blocks)
    return replace(hello, **changes).encode()  # type: ignore[arg-type]


def packet(block: int, runs: list[tuple[int, int, int]], epoch: int = 1, data: bytes | None = None) -> bytes:
    """A PAGES packet with a right checksum over whatever it says."""
    body = b"".join(struct.pack("<QII", *run) for run in runs)
    pages = data if data is not None else bytes(PAGE * sum(n for _, n, flags in runs if not flags))
    head = struct.pack("<IHHQQII", *struct.unpack("<IH", message_header(M.PING, 1, 0)[:6]), M.PAGES, epoch,
                       len(body) + len(pages), block, len(runs))  # fmt: skip
    checksum = lib.colocache_checksum(ffi.from_buffer(head), len(head))
    if body:
        checksum ^= lib.colocache_checksum(ffi.from_buffer(body), len(body))
    return head + struct.pack("<Q", checksum) + body + pages
