# SPDX-License-Identifier: Apache-2.0
"""The device state comes before an epoch's last pages, and is looked at meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_peer import PAGE, STATE, FakePeer, accepted, fake_primary, packet
from toy import TOY_BLOCKS, Pair, no_page_wrong, once, pair_of

from colocache import Memory, VetoError, message_header
from colocache.errors import PeerLostError, TimedOutError
from colocache.replication.channel import Channel
from colocache.replication.messages import AbortKind, MessageType, decode_input, encode_input
from colocache.replication.svm import Svm
from colocache.replication.transport import PlainTransport

M = MessageType


@pytest.fixture
def pair(make_memory: Callable[..., Memory], tmp_path: Path) -> Iterator[Pair]:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as made:
        yield made


def test_a_device_state_is_looked_at_while_the_last_pages_are_to_come(pair: Pair) -> None:
    looks: list[bytes] = []
    looked = threading.Event()
    pair.make_secondary()
    check = pair.svm.check_device_state

    def look(state: memoryview | bytes) -> None:
        looks.append(bytes(state))
        check(state)
        looked.set()

    pair.svm.check_device_state = look  # type: ignore[method-assign]
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.say(M.CHECKPOINT_REQUEST, 1)
        assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, 1)
        peer.say(M.VMSTATE_SEND, 1, STATE)
        assert looked.wait(10)
        peer.socket.sendall(packet(1, [(5, 1, 0)], data=bytes([9]) * PAGE))
        peer.say(M.VMSTATE_SIZE, 1, a=1)
        assert peer.hear()[:2] == (M.VMSTATE_RECEIVED, 1)
        assert peer.hear()[:2] == (M.VMSTATE_LOADED, 1)
        peer.say(M.ABORT, a=int(AbortKind.END))
        running.join()
    assert looks == [STATE], "the same bytes were looked at twice"


def test_a_device_state_that_changed_since_it_was_looked_at_is_looked_at_again(pair: Pair) -> None:
    """It lies in shared memory: what counts is what is there at the seal."""
    pair.make_secondary()
    svm = Svm(pair.cache, pair.svm, pair.events_s)
    with pair.cache.device_state_buffer(1, len(STATE)) as room:
        room[:] = STATE
        svm.look_at(room)
        room[:] = b"x" * len(STATE)
    with pytest.raises(VetoError):
        svm.seal(1, 0)
    assert pair.cache.status().sealed_epoch == 0


def test_a_device_state_of_which_half_came_is_no_epoch(pair: Pair) -> None:
    pair.link.rule = once(MessageType.VMSTATE_SEND, "half-cut", after=3)
    primary, secondary = pair.start(checkpoints=6)
    assert primary.join().checkpoints == 6
    assert secondary.join().wrong_pages == 0
    no_page_wrong(pair)


def test_a_device_state_that_a_machine_chokes_on_costs_its_epoch_only(pair: Pair) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        for epoch, state in ((1, b"\xff no JSON, which is a ValueError"), (2, STATE)):
            peer.say(M.CHECKPOINT_REQUEST, epoch)
            assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, epoch)
            peer.say(M.VMSTATE_SEND, epoch, state)
            peer.say(M.VMSTATE_SIZE, epoch)
            assert peer.hear()[:2] == (M.ABORT if epoch == 1 else M.VMSTATE_RECEIVED, epoch)
        assert peer.hear()[:2] == (M.VMSTATE_LOADED, 2)
        peer.say(M.ABORT, a=int(AbortKind.END))
        assert running.join().epoch == 2


@pytest.mark.parametrize("taken", [0, 7, 300_000])
def test_what_was_typed_is_found_behind_a_device_state_of_a_broken_connection(pair: Pair, taken: int) -> None:
    """Whatever of the state was read before: its rest is no messages, and pages behind it are nobody's any more."""
    pair.make_secondary()
    ours, theirs = socket.socketpair()
    with theirs, Channel(PlainTransport(ours), peer_timeout=2.0, device_state_max=1 << 20) as channel:
        peer = FakePeer(theirs)
        peer.say(M.INPUT, 0, encode_input(0, b"a"))
        assert channel.receive_past_pages(pair.cache)[0].type is M.INPUT

        def say() -> None:
            peer.say(M.VMSTATE_SEND, 1, b"COLO" * 100_000)
            peer.say(M.INPUT, 0, encode_input(1, b"b"))
            theirs.sendall(packet(1, [(5, 2, 0)]))
            peer.say(M.INPUT, 0, encode_input(2, b"c"))

        saying = threading.Thread(target=say)
        saying.start()
        send, _ = channel.receive_past_pages(pair.cache)
        assert (send.type, send.body_len) == (M.VMSTATE_SEND, 400_000)
        channel.receive_into(memoryview(bytearray(taken)))
        typed: list[tuple[int, bytes]] = []
        until = time.monotonic() + 10
        with contextlib.suppress(PeerLostError):
            while len(typed) < 2 and time.monotonic() < until:
                typed += [decode_input(message) for message in channel.rest()]
        saying.join()
    assert typed == [(1, b"b"), (2, b"c")]


def test_a_peer_that_talks_on_holds_up_no_takeover() -> None:
    """What it had said before is looked for; not for longer than a moment."""
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def talk() -> None:
        body = encode_input(0, bytes(60_000))
        slow = itertools.cycle(message_header(M.INPUT, 0, len(body)) + body)
        with contextlib.suppress(OSError):
            while not over.is_set():
                theirs.sendall(bytes([next(slow)]))
                over.wait(0.005)

    with theirs, Channel(PlainTransport(ours), peer_timeout=60.0, device_state_max=1 << 20) as channel:
        heard: list[object] = []

        def listen() -> None:
            with contextlib.suppress(TimedOutError, PeerLostError):
                heard.extend(channel.rest())
            over.set()

        talking, listening = threading.Thread(target=talk), threading.Thread(target=listen)
        talking.start()
        assert select.select([ours], [], [], 10)[0]
        listening.start()
        assert over.wait(30), "it listens for as long as the peer talks"
        channel.shut_down()
        talking.join()
        listening.join()
    assert heard == []
