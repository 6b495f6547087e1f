# SPDX-License-Identifier: Apache-2.0
"""An ABORT that makes no sense where the conversation stands ends the session with one sentence on both sides; then the
secondary takes over, and a primary goes on alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_peer import STATE, FakePeer, accepted, fake_primary, fake_secondary, its_hello, packet
from toy import QUICK, TOY_BLOCKS, Pair, pair_of

from colocache import Memory
from colocache.replication.errors import ProtocolError
from colocache.replication.messages import AbortKind, MessageType

PAGE = 4096
M = MessageType
CHECKPOINT, SESSION, REFUSED, LOAD, END, TOOK_OVER = AbortKind


@pytest.fixture
def pair(make_memory: Callable[..., Memory], tmp_path: Path) -> Iterator[Pair]:
    timing = replace(QUICK, reconnect_limit=0.0, connect_limit=5.0)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as made:
        yield made


# ---- what a primary says ----


def page_of(epoch: int) -> bytes:
    return packet(1, [(5, 1, 0)], epoch=epoch, data=bytes([9]) * PAGE)


def epoch_with_a_page(peer: FakePeer, epoch: int) -> None:
    peer.socket.sendall(page_of(epoch))
    peer.say(M.CHECKPOINT_REQUEST, epoch)
    assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, epoch)
    peer.say(M.VMSTATE_SEND, epoch, STATE)
    peer.say(M.VMSTATE_SIZE, epoch, a=1)
    assert peer.hear()[:2] == (M.VMSTATE_RECEIVED, epoch)
    assert peer.hear()[:2] == (M.VMSTATE_LOADED, epoch)


def bring_secondary_to(stage: str, peer: FakePeer) -> None:
    """Epoch 1 is through, and of epoch 2 nothing has come ("idle"), a page, or the request and what belongs to it."""
    accepted(peer)
    epoch_with_a_page(peer, 1)
    if stage != "idle":
        peer.socket.sendall(page_of(2))
    if stage in ("requested", "sending"):
        peer.say(M.CHECKPOINT_REQUEST, 2)
        assert peer.hear()[:2] == (M.CHECKPOINT_REPLY, 2)
    if stage == "sending":
        peer.say(M.VMSTATE_SEND, 2, STATE)


@pytest.mark.parametrize(
    ("stage", "kind", "epoch"),
    [
        ("idle", CHECKPOINT, 0),
        ("idle", CHECKPOINT, 1),  # it is sealed
        ("idle", CHECKPOINT, 2),  # nothing of it has come
        ("idle", REFUSED, 0),  # it was accepted long ago
        ("idle", LOAD, 1),
        ("idle", 0, 0),
        ("idle", 77, 0),
        ("pages", CHECKPOINT, 3),
        ("pages", REFUSED, 0),
        ("requested", CHECKPOINT, 1),
        ("requested", CHECKPOINT, 3),
        ("requested", REFUSED, 0),
        ("requested", LOAD, 2),
        ("requested", END, 0),
        ("sending", CHECKPOINT, 0),
        ("sending", END, 0),
    ],
)
def test_a_senseless_abort_of_a_primary_ends_the_session_and_the_secondary_takes_over(
    pair: Pair, stage: str, kind: int, epoch: int
) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        bring_secondary_to(stage, peer)
        peer.say(M.ABORT, epoch, b"for no reason", a=int(kind))
        told = peer.hear_end()
    assert f"the primary sent ABORT({epoch})" in told
    ended = running.join()
    assert (ended.took_over, ended.epoch) == (True, 1)
    assert told in ended.end


@pytest.mark.parametrize("stage", ["pages", "requested", "sending"])
def test_a_primary_may_give_up_an_epoch_that_is_not_whole(pair: Pair, stage: str) -> None:
    pair.make_secondary()
    running = pair.run_secondary()
    with fake_primary(pair) as peer:
        bring_secondary_to(stage, peer)
        peer.say(M.ABORT, 2, b"it can't be saved", a=int(CHECKPOINT), b=1)
        epoch_with_a_page(peer, 3)
        peer.say(M.ABORT, a=int(END))
    assert running.join().epoch == 3


# ---- what a secondary says ----


def bring_primary_to(stage: str, peer: FakePeer, pair: Pair) -> None:
    """Until it waits for REPLY(1), RECEIVED(1) or LOADED(1), or after epoch 1 for nothing ("idle")."""

    def until(kind: MessageType) -> None:
        while peer.hear()[0] is not kind:
            pass

    if stage == "hello":
        return
    peer.say(M.HELLO, body=its_hello(pair))
    peer.say(M.CHECKPOINT_READY)
    until(M.CHECKPOINT_REQUEST)
    if stage == "reply":
        return
    peer.say(M.CHECKPOINT_REPLY, 1)
    until(M.VMSTATE_SIZE)
    if stage == "received":
        return
    peer.say(M.VMSTATE_RECEIVED, 1)
    if stage == "idle":
        peer.say(M.VMSTATE_LOADED, 1)
        pair.events_p.wait("holding")


@pytest.mark.parametrize(
    ("stage", "kind", "epoch"),
    [
        ("reply", CHECKPOINT, 2),
        ("reply", LOAD, 1),  # nothing was sealed that could be loaded
        ("reply", REFUSED, 0),
        ("reply", END, 0),
        ("reply", 0, 1),
        ("received", CHECKPOINT, 0),
        ("received", LOAD, 1),
        ("received", REFUSED, 0),
        ("loaded", CHECKPOINT, 1),  # it is sealed: no more to be given up
        ("loaded", LOAD, 2),
        ("loaded", END, 0),
        ("idle", CHECKPOINT, 0),
        ("idle", CHECKPOINT, 1),
        ("idle", LOAD, 1),
        ("idle", REFUSED, 0),
        ("idle", END, 0),
    ],
)
def test_a_senseless_abort_of_a_secondary_ends_the_session_and_the_primary_goes_on(
    pair: Pair, tmp_path: Path, stage: str, kind: int, epoch: int
) -> None:
    pair.make_primary(checkpoints=1, hold=True)
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        bring_primary_to(stage, peer, pair)
        peer.say(M.ABORT, epoch, b"for no reason", a=int(kind))
        told = peer.hear_end()
        assert f"the secondary sent ABORT({epoch})" in told
        ended = running.join()
    assert ended.alone
    assert told in ended.end


@pytest.mark.parametrize("kind", [CHECKPOINT, LOAD, END, 77])
def test_an_abort_before_hello_refuses_or_ends_and_nothing_else(pair: Pair, tmp_path: Path, kind: int) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        peer.say(M.ABORT, 0, b"for no reason", a=int(kind))
        assert "the secondary sent ABORT(0)" in peer.hear_end()
        with pytest.raises(ProtocolError, match="where HELLO must come: for no reason"):
            running.join()


def test_an_epoch_given_up_and_a_connection_closed_while_pages_are_sent_is_a_lost_secondary(
    pair: Pair, tmp_path: Path
) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        bring_primary_to("reply", peer, pair)
        peer.say(M.CHECKPOINT_REPLY, 1)
        peer.say(M.ABORT, 1, b"enough", a=int(CHECKPOINT))
        peer.socket.close()
        assert running.join().alone


def test_a_session_may_be_ended_at_any_time(pair: Pair, tmp_path: Path) -> None:
    pair.make_primary()
    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        bring_primary_to("received", peer, pair)
        peer.say(M.ABORT, 0, b"it was stopped", a=int(SESSION))
        ended = running.join()
    assert ended.alone
    assert "it was stopped" in ended.end
