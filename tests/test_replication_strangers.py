# SPDX-License-Identifier: Apache-2.0
"""A peer that says wrong things: one sentence on both sides, no crash, no hang, and guest RAM untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_peer import STATE, FakePeer, accepted, fake_primary, fake_secondary, its_hello, packet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import QUICK, TOY_BLOCKS, Pair, Running, pair_of

from colocache import ColocacheError, Memory, message_header
from colocache.replication.errors import ProtocolError, RefusedError, TookOverError
from colocache.replication.messages import AbortKind, MessageType, decode_reason, split_u64

PAGE = 4096
M = MessageType


@pytest.fixture
def pair(make_memory: Callable[..., Memory], tmp_path: Path) -> Iterator[Pair]:
    timing = replace(QUICK, reconnect_limit=0.1, connect_limit=1.5)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as made:
        yield made


def test_the_packets_of_these_tests_are_good_ones(pair: Pair) -> None:
    """Otherwise the refusals below would prove nothing."""
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.socket.sendall(packet(1, [(5, 2, 0)], data=bytes([9]) * 2 * PAGE))
        peer.say(M.CHECKPOINT_REQUEST, 1)
        assert peer.hear() == (M.CHECKPOINT_REPLY, 1, b"")
        peer.say(M.VMSTATE_SEND, 1, STATE)
        peer.say(M.VMSTATE_SIZE, 1, b"", *split_u64(2))
        assert peer.hear()[:2] == (M.VMSTATE_RECEIVED, 1)
        assert peer.hear()[:2] == (M.VMSTATE_LOADED, 1)
        assert np.all(pair.guest_ram()[1][5:7] == 9)
        peer.say(M.ABORT, a=int(AbortKind.END))
        assert running.join().checkpoints == 1


BAD_PACKETS = {
    "unknown block": packet(2, [(0, 1, 0)]),
    "pfn past the end": packet(1, [(300, 1, 0)]),
    "run over the end": packet(0, [(12, 2, 0)]),
    "huge pfn": packet(1, [((1 << 64) - 1, 2, 0)]),
    "empty run": packet(1, [(3, 0, 0)]),
    "unknown flag": packet(1, [(3, 1, 8)]),
    "page too short": packet(1, [(3, 1, 0)], data=bytes(4095)),
    "page too long": packet(1, [(3, 1, 0)], data=bytes(4097)),
    "too many pages": packet(1, [(0, 5000, 1)]),
    "wrong checksum": packet(1, [(3, 1, 0)])[:32] + bytes(8) + packet(1, [(3, 1, 0)])[40:],
    "epoch 0": packet(1, [(3, 1, 0)], epoch=0),
    "an epoch past the last": packet(1, [(3, 1, 0)], epoch=1 << 48),
    "the last number there is": packet(1, [(3, 1, 0)], epoch=(1 << 64) - 1),
    "wrong magic": b"OLOC" + packet(1, [(3, 1, 0)])[4:],
}


@pytest.mark.parametrize("what", BAD_PACKETS)
def test_a_bad_packet_is_refused_whole(pair: Pair, what: str) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.socket.sendall(BAD_PACKETS[what])
        reason = peer.hear_end()
    assert reason
    with pytest.raises(ColocacheError) as caught:
        running.join()
    assert reason.split(":")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(not np.any(view) for view in pair.guest_ram())
    assert all(not np.any(np.array(block.cache)) for block in pair.cache.blocks.values())


OUT_OF_ORDER = {
    "VMSTATE_SEND without REQUEST": [(M.VMSTATE_SEND, 1)],
    "VMSTATE_SIZE without REQUEST": [(M.VMSTATE_SIZE, 1)],
    "HELLO twice": [(M.HELLO, 0)],
    "what only a secondary says": [(M.VMSTATE_LOADED, 1)],
    "PONG from a primary": [(M.PONG, 0)],
    "epoch 0": [(M.CHECKPOINT_REQUEST, 0)],
    "REQUEST twice": [(M.CHECKPOINT_REQUEST, 1), (M.CHECKPOINT_REQUEST, 1)],
    "another epoch": [(M.CHECKPOINT_REQUEST, 1), (M.VMSTATE_SEND, 2)],
    "SIZE without SEND": [(M.CHECKPOINT_REQUEST, 1), (M.VMSTATE_SIZE, 1)],
    "an ABORT of no kind": [(M.ABORT, 1)],
}


@pytest.mark.parametrize("what", OUT_OF_ORDER)
def test_what_comes_out_of_order_ends_the_session(pair: Pair, what: str) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        for kind, epoch in OUT_OF_ORDER[what]:
            peer.say(kind, epoch)
        assert "the primary" in peer.hear_end()
    with pytest.raises(ColocacheError, match="the primary"):
        running.join()
    assert all(not np.any(view) for view in pair.guest_ram())


def test_pages_between_request_and_send_are_of_that_epoch(pair: Pair) -> None:
    """A far primary's guest wrote on until REPLY was heard."""
    pair.make_secondary()
    pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.say(M.CHECKPOINT_REQUEST, 1)
        assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, 1)
        peer.socket.sendall(packet(1, [(3, 1, 0)], epoch=1, data=bytes([9]) * PAGE))
        peer.say(M.VMSTATE_SEND, 1, STATE)
        peer.say(M.VMSTATE_SIZE, 1, a=1)
        assert peer.hear()[:2] == (M.VMSTATE_RECEIVED, 1)


def test_pages_of_another_epoch_between_request_and_send_end_the_session(pair: Pair) -> None:
    pair.make_secondary()
    pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.say(M.CHECKPOINT_REQUEST, 1)
        peer.socket.sendall(packet(1, [(3, 1, 0)], epoch=2, data=bytes([9]) * PAGE))
        assert "epoch 1 is expected" in peer.hear_end()


def test_a_count_that_does_not_agree_aborts_the_epoch_and_the_pair_goes_on(pair: Pair) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        for epoch, told in ((1, 3), (2, 1)):
            peer.socket.sendall(packet(1, [(5, 1, 0)], epoch=epoch, data=bytes([9]) * PAGE))
            peer.say(M.CHECKPOINT_REQUEST, epoch)
            assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, epoch)
            peer.say(M.VMSTATE_SEND, epoch, STATE)
            peer.say(M.VMSTATE_SIZE, epoch, a=told)
            kind, of, body = peer.hear()
            assert of == epoch
            if epoch == 1:
                assert kind is M.ABORT
                assert "3" in decode_reason(body)
                assert "1" in decode_reason(body)
            else:
                assert kind is M.VMSTATE_RECEIVED
        peer.say(M.ABORT, a=int(AbortKind.END))
    assert running.join().epoch == 2


def test_a_device_state_above_its_bound_is_refused_before_memory_is_taken(pair: Pair) -> None:
    pair.make_secondary()
    pair.run_secondary()
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.say(M.CHECKPOINT_REQUEST, 1)
        peer.socket.sendall(message_header(M.VMSTATE_SEND, 1, 1 << 60))
        assert "announced 1152921504606846976 bytes" in peer.hear_end()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pair": "other"}, "belongs to pair 'other'"),
        ({"machine": "kvm"}, "the peer's machine is 'kvm'"),
        ({"role": "secondary"}, "both sides are a secondary"),
        ({"history": bytes(16), "sealed_epoch": 4, "used_epoch": 4}, "start the primary with --rejoin"),
    ],
)
def test_a_wrong_peer_is_told_why_and_ends_its_own_connection_only(
    pair: Pair, changes: dict[str, object], what: str
) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair, **changes) as peer:
        assert what in peer.hear_end()
    assert what in pair.events_s.wait("refused")["reason"]
    its_primary_gets_in(pair, running)


def its_primary_gets_in(pair: Pair, running: Running) -> None:
    """Whoever came before."""
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.say(M.ABORT, a=int(AbortKind.END))
    assert running.join().checkpoints == 0


def test_a_port_scanner_and_a_silent_caller_are_ignored(pair: Pair) -> None:
    pair.timing = replace(pair.timing, connect_limit=20.0)
    pair.make_secondary()
    running = pair.run_secondary()
    with pair.address.connect(1.0):
        pass
    with pair.address.connect(1.0) as silent:
        silent.settimeout(10)
        assert silent.recv(1) == b""  # its connection is closed after the time for a first word
    with fake_primary(pair) as peer:
        accepted(peer)
        peer.say(M.ABORT, a=int(AbortKind.END))
    assert running.join().checkpoints == 0


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_no_bytes_at_all_harm_a_secondary(
    make_memory: Callable[..., Memory], tmp_path: Path, noise: bytes, greeted: bool
) -> None:
    timing = replace(QUICK, peer_timeout=0.5, reconnect_limit=10.0, connect_limit=10.0)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as pair:
        pair.make_secondary()
        running = pair.run_secondary()
        with contextlib.ExitStack() as stack:
            if greeted:
                peer = stack.enter_context(fake_primary(pair))
                accepted(peer)
            else:
                peer = FakePeer(stack.enter_context(pair.address.connect(5.0)))
            with contextlib.suppress(OSError):
                peer.socket.sendall(noise)
                while peer.socket.recv(1 << 16):
                    pass
        pair.stop_s.set()  # it may still listen for a better peer
        with contextlib.suppress(ColocacheError):
            assert running.join().checkpoints == 0
        assert "\n" not in str(running.error)
        assert all(not np.any(view) for view in pair.guest_ram())
        pair.cache.validate()
    pair.memory.unlink()
    pair.memory.close()


# ---- the same, towards a primary ----


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pair": "other"}, "belongs to pair 'other'"),
        ({"sealed_epoch": 5, "used_epoch": 5}, "holds epoch 5 of another primary"),
        ({"history": None}, "tells no history"),
    ],
)
def test_a_primary_refuses_a_wrong_secondary_and_says_why(
    pair: Pair, tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        peer.say(M.HELLO, body=its_hello(pair, **changes))
        assert what in peer.hear_end()
        with pytest.raises(RefusedError, match=what):
            running.join()


def test_a_primary_stands_still_when_the_secondary_took_over(pair: Pair, tmp_path: Path) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        accept().say(M.HELLO, body=its_hello(pair, lost=True, sealed_epoch=7, used_epoch=7))
        with pytest.raises(TookOverError, match="took over at epoch 7"):
            running.join()
    assert not pair.pvm.running


def test_garbage_from_a_secondary_ends_a_primary_that_has_no_pair(pair: Pair, tmp_path: Path) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        accept().socket.sendall(b"SSH-2.0-OpenSSH_9.9\r\n" * 4)
        with pytest.raises(ProtocolError, match="no message of colocache"):
            running.join()


@pytest.mark.parametrize("answer", [M.CHECKPOINT_READY, M.VMSTATE_RECEIVED, M.VMSTATE_LOADED, M.HELLO])
def test_a_secondary_that_answers_wrongly_is_told_and_the_machine_goes_on(
    pair: Pair, tmp_path: Path, answer: MessageType
) -> None:
    pair.timing = replace(pair.timing, reconnect_limit=0.0)
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        peer.say(M.HELLO, body=its_hello(pair))
        peer.say(M.CHECKPOINT_READY)
        while peer.hear()[0] is not M.CHECKPOINT_REQUEST:
            pass
        peer.say(answer, 1)
        assert "where CHECKPOINT_REPLY(1) must come" in peer.hear_end()
        ended = running.join()
    assert ended.alone
    assert "where CHECKPOINT_REPLY(1) must come" in ended.end
    assert pair.pvm.resumes >= 1
    assert pair.released[-1] is None


def test_received_that_never_comes_keeps_output_withheld(pair: Pair, tmp_path: Path) -> None:
    """RECEIVED for another epoch is none."""
    pair.timing = replace(pair.timing, reconnect_limit=5.0)
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        pair.run_primary()
        peer = accept()
        peer.say(M.HELLO, body=its_hello(pair))
        peer.say(M.CHECKPOINT_READY)
        while peer.hear()[0] is not M.CHECKPOINT_REQUEST:
            pass
        peer.say(M.CHECKPOINT_REPLY, 1)
        while peer.hear()[0] is not M.VMSTATE_SIZE:
            pass
        peer.say(M.VMSTATE_RECEIVED, 2)
        assert "where VMSTATE_RECEIVED(1) must come" in peer.hear_end()
        pair.events_p.wait("lost")
        assert pair.released == []
        assert pair.sender.count()[1] > 0, "unacknowledged pages were forgotten"
