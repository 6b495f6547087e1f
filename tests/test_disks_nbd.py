# SPDX-License-Identifier: Apache-2.0
"""Our end of NBD: what a client is told, and that no bytes from outside do more than end their own connection."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocache.disks import nbd
from colocache.disks.export import Export
from colocache.disks.nbd import Session
from colocache.disks.write import DATA_BYTES_MAX

SIZE = 1 << 20
GREETING = 18
some = settings(max_examples=int(os.environ.get("COLOCACHE_TEST_EXAMPLES", "150")), deadline=None)


class Memory:
    """A disk in memory."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.bytes = bytearray(size)
        self.failing = False

    def write(self, offset: int, data: memoryview) -> None:
        if self.failing:
            raise RuntimeError("no")
        self.bytes[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.bytes[offset : offset + length] = bytes(length)

    trim = zero


class Client:
    """A client that says what it is told to say."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def take(self, n: int) -> bytes:
        found = b""
        while len(found) < n:
            more = self.end.recv(n - len(found))
            assert more, "the server closed the connection"
            found += more
        return found

    def option(self, number: int, data: bytes = b"") -> tuple[int, bytes]:
        self.end.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        return self.reply()

    def reply(self) -> tuple[int, bytes]:
        _, _, kind, length = struct.unpack(">QIII", self.take(20))
        return kind, self.take(length)

    def hello(self, flags: int = 3) -> None:
        assert self.take(GREETING)[:16] == b"NBDMAGICIHAVEOPT"
        self.end.sendall(struct.pack(">I", flags))

    def go(self) -> tuple[int, int]:
        """The handshake as QEMU does it: size and transmission flags."""
        self.hello()
        kind, export = self.option(nbd.GO, struct.pack(">IHH", 0, 1, 3))
        assert kind == nbd.INFORMATION
        kind, sizes = self.reply()
        assert struct.unpack(">HIII", sizes) == (3, 512, 4096, DATA_BYTES_MAX)
        assert self.reply() == (nbd.ACK, b"")
        _, size, flags = struct.unpack(">HQH", export)
        return size, flags

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        self.end.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, 77, offset, length) + data)
        magic, error, cookie = nbd.SIMPLE_REPLY.unpack(self.take(16))
        assert (magic, cookie) == (nbd.SIMPLE_REPLY_MAGIC, 77)
        return int(error)


@contextmanager
def served(disk: Memory) -> Iterator[tuple[Client, list[str]]]:
    ours, theirs = socket.socketpair()
    ends: list[str] = []

    def serve() -> None:
        with ours:
            ends.append(Session(ours, disk).serve())

    thread = threading.Thread(target=serve)
    thread.start()
    theirs.settimeout(10)
    try:
        yield Client(theirs), ends
    finally:
        theirs.close()
        thread.join(10)
        assert not thread.is_alive(), "the server hangs"
        assert len(ends) == 1


def test_what_a_client_writes_is_what_the_disk_holds() -> None:
    disk = Memory()
    with served(disk) as (client, ends):
        assert client.go() == (SIZE, nbd.TRANSMISSION_FLAGS)
        assert client.ask(nbd.WRITE, 512, 1024, b"x" * 1024) == 0
        assert client.ask(nbd.WRITE_ZEROES, 1024, 512, flags=nbd.NO_HOLE) == 0
        assert client.ask(nbd.FLUSH) == 0
        assert bytes(disk.bytes[:2048]) == bytes(512) + b"x" * 512 + bytes(1024)
        assert client.ask(nbd.TRIM, 512, 512) == 0
        assert not any(disk.bytes)
        client.end.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.DISC, 0, 0, 0))
        assert client.end.recv(1) == b""
    assert ends == ["the client went in order"]


def test_the_older_handshake_works_too() -> None:
    with served(Memory()) as (client, _):
        client.hello(flags=1)
        client.end.sendall(b"IHAVEOPT" + struct.pack(">II", nbd.EXPORT_NAME, 0))
        assert struct.unpack(">QH", client.take(134)[:10]) == (SIZE, nbd.TRANSMISSION_FLAGS)
        assert client.ask(nbd.FLUSH) == 0


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "error"),
    [
        (nbd.READ, 0, 512, 0, 95),
        (nbd.WRITE, SIZE - 512, 1024, 0, 28),
        (nbd.WRITE, (1 << 64) - 512, 512, 0, 28),
        (nbd.WRITE_ZEROES, SIZE, 512, 0, 28),
        (nbd.TRIM, 0, 0xFFFFFFFF, 0, 28),
        (nbd.TRIM, 0, 0, 0, 22),
        (nbd.FLUSH, 1, 0, 0, 22),
        (nbd.WRITE, 0, 512, 1, 22),
        (9, 0, 0, 0, 22),
    ],
)
def test_a_request_that_can_not_be_is_refused_and_changes_nothing(
    kind: int, offset: int, length: int, flags: int, error: int
) -> None:
    disk = Memory()
    with served(disk) as (client, _):
        client.go()
        data = b"x" * length if kind == nbd.WRITE else b""
        assert client.ask(kind, offset, length, data, flags) == error
        assert not any(disk.bytes)
        assert client.ask(nbd.WRITE, 0, 512, b"y" * 512) == 0, "the next request is understood"


def test_a_write_that_is_too_long_ends_the_connection_before_it_is_read() -> None:
    with served(Memory()) as (client, ends):
        client.go()
        client.end.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.WRITE, 0, 0, DATA_BYTES_MAX + 1))
        assert client.end.recv(1) == b""
    assert "at most" in ends[0]


def test_an_error_of_the_disk_is_an_error_for_the_client_and_no_end() -> None:
    disk = Memory()
    with served(disk) as (client, _):
        client.go()
        disk.failing = True
        assert client.ask(nbd.WRITE, 0, 512, bytes(512)) == 5
        disk.failing = False
        assert client.ask(nbd.WRITE, 0, 512, bytes(512)) == 0


def test_unknown_options_and_names_are_refused_and_the_handshake_goes_on() -> None:
    with served(Memory()) as (client, _):
        client.hello()
        assert client.option(5)[0] == nbd.UNSUPPORTED  # STARTTLS
        assert client.option(nbd.GO, struct.pack(">I", 3) + b"foo" + bytes(2))[0] == nbd.UNKNOWN
        assert client.option(nbd.GO, struct.pack(">IH", 0xFFFFFFFF, 1))[0] == nbd.INVALID
        assert client.option(nbd.LIST, b"x")[0] == nbd.INVALID
        assert client.option(nbd.LIST) == (nbd.SERVER, bytes(4))
        assert client.reply() == (nbd.ACK, b"")
        assert client.option(nbd.ABORT) == (nbd.ACK, b"")


def test_options_without_end_are_not_listened_to() -> None:
    with served(Memory()) as (client, ends):
        client.hello()
        for _ in range(nbd.OPTIONS_MAX):
            client.option(5)
        assert client.end.recv(1) == b""
    assert "options" in ends[0]


requests = st.builds(
    lambda kind, flags, offset, length, data: (
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, 1, offset, length) + data
    ),
    st.integers(0, 8),
    st.sampled_from([0, 1, 2, 0xFFFF]),
    st.sampled_from([0, 512, SIZE - 512, SIZE, (1 << 64) - 1]),
    st.sampled_from([0, 1, 512, DATA_BYTES_MAX, DATA_BYTES_MAX + 1, 0xFFFFFFFF]),
    st.binary(max_size=1024),
)
options = st.builds(
    lambda number, length, data: (
        b"IHAVEOPT" + struct.pack(">II", number, len(data) if length is None else length) + data
    ),
    st.integers(0, 12),
    st.sampled_from([None, None, 0, 4097, 0xFFFFFFFF]),
    st.binary(max_size=64),
)


@some
@given(
    flags=st.sampled_from([1, 3, 0, 0xFFFFFFFF]),
    first=st.lists(st.one_of(options, st.binary(max_size=64)), max_size=4),
    goes=st.booleans(),
    then=st.lists(st.one_of(requests, st.binary(max_size=64)), max_size=6),
)
def test_no_bytes_do_more_than_end_their_connection(
    flags: int, first: list[bytes], goes: bool, then: list[bytes]
) -> None:
    disk = Memory()
    go = b"IHAVEOPT" + struct.pack(">II", nbd.GO, 6) + bytes(6) if goes else b""
    with served(disk) as (client, ends):
        client.end.sendall(struct.pack(">I", flags))
        try:
            client.end.sendall(b"".join([*first, go, *then]))
            client.end.shutdown(socket.SHUT_WR)
            while client.end.recv(1 << 16):
                pass
        except OSError:
            pass  # it hung up on us
    assert len(disk.bytes) == SIZE
    assert len(ends) == 1


def test_an_export_serves_who_was_given_its_end_and_has_no_name() -> None:
    disk = Memory()
    export = Export(disk)
    one = export.client.dup()
    export.given()
    try:
        one.settimeout(10)
        client = Client(one)
        assert client.go()[0] == SIZE
        assert client.ask(nbd.WRITE, 0, 512, b"z" * 512) == 0
        assert one.getpeername() in ("", b""), "nobody else can find it"
    finally:
        export.close()
    assert one.recv(1) == b""
    one.close()
    assert disk.bytes[:512] == b"z" * 512


def test_requests_that_come_at_once_and_in_any_pieces_are_done_in_order() -> None:
    disk = Memory(8 << 20)
    whole = b"".join(
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.WRITE, n, n * 600_064, 600_064) + bytes([n]) * 600_064
        for n in range(13)
    )
    with served(disk) as (client, _):
        client.go()
        thread = threading.Thread(
            target=lambda: [client.end.sendall(whole[at : at + 77_777]) for at in range(0, len(whole), 77_777)]
        )
        thread.start()
        for n in range(13):
            assert nbd.SIMPLE_REPLY.unpack(client.take(16)) == (nbd.SIMPLE_REPLY_MAGIC, 0, n)
        thread.join(10)
    assert bool(disk.bytes[: 13 * 600_064] == b"".join(bytes([n]) * 600_064 for n in range(13)))


def test_an_export_that_nobody_opened_can_be_closed_at_once() -> None:
    export = Export(Memory())
    export.close()
    export.close()


def test_an_export_whose_client_is_gone_ends_by_itself() -> None:
    export = Export(Memory())
    export.given()  # and it was given to nobody
    export._thread.join(10)
    assert export.end
    export.close()
