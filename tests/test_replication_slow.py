# SPDX-License-Identifier: Apache-2.0
"""A peer that says its first message byte by byte holds off nobody, and nobody waits for it longer than the limit."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_peer import FakePeer, accepted, fake_primary, fake_secondary, its_hello
from toy import QUICK, TOY_BLOCKS, Pair, pair_of

from colocache import ColocacheError, Memory, message_header
from colocache.replication.errors import ProtocolError
from colocache.replication.hello import Hello
from colocache.replication.messages import AbortKind, MessageType
from colocache.replication.waiting_room import WaitingRoom

M = MessageType


@pytest.fixture
def pair(make_memory: Callable[..., Memory], tmp_path: Path) -> Iterator[Pair]:
    timing = replace(QUICK, reconnect_limit=0.1, connect_limit=5.0)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as made:
        yield made


def hello_of(pair: Pair) -> bytes:
    body = Hello("primary", "toy", None, 0, 0, False, "toy", pair.blocks).encode()
    return message_header(M.HELLO, 0, len(body), 0, 0) + body


@contextlib.contextmanager
def trickle(connection: socket.socket, data: bytes, seconds: float = 0.05) -> Iterator[threading.Thread]:
    """Says `data` byte by byte, far more often than the peer timeout."""
    stop = threading.Event()

    def run() -> None:
        with contextlib.suppress(OSError):
            for i in range(len(data)):
                if stop.wait(seconds):
                    return
                connection.send(data[i : i + 1], socket.MSG_NOSIGNAL)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def test_a_caller_that_says_hello_byte_by_byte_keeps_no_primary_waiting_and_is_sent_away(pair: Pair) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with pair.address.connect(1.0) as slow, trickle(slow, hello_of(pair)):
        time.sleep(0.3)
        with fake_primary(pair) as peer:
            peer.socket.settimeout(1.0)  # half of the peer timeout
            accepted(peer)
            peer.say(M.ABORT, a=int(AbortKind.END))
    assert running.join().checkpoints == 0


def test_a_caller_that_says_hello_byte_by_byte_has_the_peer_timeout_for_all_of_it(pair: Pair) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    begin = time.monotonic()
    with pair.address.connect(1.0) as slow, trickle(slow, hello_of(pair)) as still_talking:
        slow.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1) == b""
        assert 1.9 < time.monotonic() - begin < 5
        still_talking.join(2.0)
    pair.stop_s.set()
    with contextlib.suppress(ColocacheError):
        running.join()


def test_a_takeover_is_told_to_a_primary_also_beside_a_caller_that_is_slow(pair: Pair) -> None:
    room = WaitingRoom(pair.listener, peer_timeout=2.0, device_state_max=0)
    with pair.address.connect(1.0) as slow, pair.address.connect(1.0) as primary, contextlib.closing(room):
        slow.send(hello_of(pair)[:50])
        primary.send(hello_of(pair))
        begin, came = time.monotonic(), None
        while came is None and time.monotonic() < begin + 5:
            came = room.next(time.monotonic(), lambda: False, last_word=0.0)
        assert time.monotonic() - begin < 0.5
        assert came is not None
        with came[0]:
            assert not isinstance(came[1], ProtocolError)
            assert came[1].type is M.HELLO


def test_callers_that_were_sent_away_and_stay_keep_no_primary_waiting(pair: Pair) -> None:
    room = WaitingRoom(pair.listener, peer_timeout=2.0, device_state_max=0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(room))
        strangers = [stack.enter_context(pair.address.connect(1.0)) for _ in range(6)]
        for stranger in strangers:
            stranger.settimeout(10)
            stranger.send(bytes(48))
            came = room.next(time.monotonic() + 5, lambda: False)
            assert came is not None
            assert isinstance(came[1], ProtocolError)
            came[0].abort(AbortKind.SESSION, "no")
            room.see_out(came[0])
        with pair.address.connect(1.0) as primary:
            primary.send(hello_of(pair))
            came = room.next(time.monotonic() + 5, lambda: False)
            assert came is not None
            assert not isinstance(came[1], ProtocolError)
            came[0].close()
        for stranger in strangers:  # each could read why, to the end
            assert FakePeer(stranger).hear()[0] is M.ABORT
            assert stranger.recv(1) == b""
        assert room.next(time.monotonic() + 1.0, lambda: False) is None
        assert not room._leaving


def test_a_secondary_that_says_hello_byte_by_byte_does_not_hold_a_primary(pair: Pair, tmp_path: Path) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        body = its_hello(pair)
        with trickle(peer.socket, message_header(M.HELLO, 0, len(body), 0, 0) + body):
            begin = time.monotonic()
            with contextlib.suppress(OSError):
                while peer.socket.recv(1 << 16):
                    pass
            assert time.monotonic() - begin < 5
        pair.stop_p.set()
        with contextlib.suppress(ColocacheError):
            running.join()
