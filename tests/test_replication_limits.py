# SPDX-License-Identifier: Apache-2.0
"""However busily a peer talks, neither machine stands longer than a checkpoint may take as a whole."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_peer import STATE, FakePeer, accepted, fake_primary, fake_secondary, its_hello, packet
from test_replication_aborts import epoch_with_a_page
from toy import QUICK, TOY_BLOCKS, Pair, pair_of

from colocache import Memory, message_header
from colocache.replication.messages import MessageType

M = MessageType
LIMIT = 1.0


@pytest.fixture
def pair(make_memory: Callable[..., Memory], tmp_path: Path) -> Iterator[Pair]:
    timing = replace(QUICK, peer_timeout=1.0, checkpoint_timeout=LIMIT, reconnect_limit=10.0)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as made:
        yield made


def pages_without_end(peer: FakePeer, stop: threading.Event) -> None:
    while not stop.is_set():
        peer.socket.sendall(packet(1, [(7, 2, 0)], epoch=2))


def byte_by_byte(data: bytes) -> Callable[[FakePeer, threading.Event], None]:
    def say(peer: FakePeer, stop: threading.Event) -> None:
        for i in range(len(data)):
            peer.socket.sendall(data[i : i + 1])
            if stop.wait(0.1):
                return

    return say


WAYS = {
    "pages without end": pages_without_end,
    "a packet byte by byte": byte_by_byte(packet(1, [(7, 2, 0)], epoch=2)),
    "a device state byte by byte": byte_by_byte(message_header(M.VMSTATE_SEND, 2, len(STATE) * 40) + STATE * 40),
    "signs of life without end": lambda peer, stop: (
        [peer.say(M.PING) for _ in range(10_000) if not stop.wait(0.05)] and None
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_primary_that_talks_without_end_holds_the_secondary_no_longer_than_a_checkpoint_may_take(
    pair: Pair, way: str
) -> None:
    pair.make_secondary()
    pair.run_secondary()
    stop = threading.Event()
    with fake_primary(pair) as peer:
        accepted(peer)
        epoch_with_a_page(peer, 1)
        peer.say(M.CHECKPOINT_REQUEST, 2)
        assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, 2)
        begin = time.monotonic()
        if way != "a device state byte by byte":
            peer.say(M.VMSTATE_SEND, 2, STATE)
        assert not pair.svm.running

        def talk() -> None:
            with contextlib.suppress(OSError):
                WAYS[way](peer, stop)

        talking = threading.Thread(target=talk)
        talking.start()
        cause = pair.events_s.wait("lost")["cause"]
        took = time.monotonic() - begin
        stop.set()
        talking.join()
    assert f"within {LIMIT:g} s" in cause or f"for {LIMIT:g} s" in cause, cause
    assert took < LIMIT + 1.0 + 2.0, "with a beat's time, and some for a loaded machine"
    assert pair.svm.running, "the epoch was given up, and the machine still stands"
    assert pair.cache.status().sealed_epoch == 1


def test_a_secondary_that_takes_two_bytes_now_and_then_holds_the_primary_no_longer(pair: Pair, tmp_path: Path) -> None:
    pair.timing = replace(pair.timing, reconnect_limit=0.0, peer_timeout=5.0)  # else that may come first
    pair.make_primary()
    pair.pvm.save_device_state = lambda **_: bytes(8 << 20)  # type: ignore[method-assign]
    stop = threading.Event()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        peer.say(M.HELLO, body=its_hello(pair))
        peer.say(M.CHECKPOINT_READY)
        while peer.hear()[0] is not M.CHECKPOINT_REQUEST:
            pass
        peer.say(M.CHECKPOINT_REPLY, 1)
        begin = time.monotonic()

        def sip() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.05) and peer.socket.recv(2):
                    peer.say(M.PONG)

        sipping = threading.Thread(target=sip)
        sipping.start()
        ended = running.join()
        took = time.monotonic() - begin
        stop.set()
        sipping.join()
    assert ended.alone
    assert f"within {LIMIT:g} s" in ended.end
    assert took < LIMIT + 1.0 + 2.0
