# SPDX-License-Identifier: Apache-2.0
"""A pair that lost its secondary becomes whole again, with its operator's consent and its machine running on; and who
takes over says so first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_peer import FakePeer, accepted, fake_primary, fake_secondary, its_hello, packet
from toy import QUICK, TOY_BLOCKS, TOY_PAGES, Pair, Running, no_page_wrong, pair_of

from colocache import Memory, Phase
from colocache.replication.arbiter import NeverArbiter
from colocache.replication.channel import Channel
from colocache.replication.errors import TookOverError
from colocache.replication.messages import AbortKind, MessageType

M = MessageType
Make = Callable[..., Memory]


@pytest.fixture
def pair(make_memory: Make, tmp_path: Path) -> Iterator[Pair]:
    timing = replace(QUICK, reconnect_limit=5.0, run_on=30.0)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as made:
        yield made


def end_secondary(pair: Pair, secondary: Running) -> None:
    """It and its memory are gone, as with its host."""
    pair.link.rule = lambda *_: "cut"
    pair.link.cut()
    pair.stop_s.set()
    secondary.join()
    pair.cache.close()
    pair.memory.unlink()
    pair.memory.close()


def fresh_secondary(pair: Pair, make_memory: Make) -> Running:
    """Another at the same address, with memory that holds nothing."""
    pair.memory = make_memory(TOY_BLOCKS)
    pair.stop_s = threading.Event()
    pair.make_secondary()
    pair.link.rule = lambda *_: "pass"
    return pair.run_secondary()


def test_a_fresh_secondary_at_the_old_address_is_taken_at_once_with_consent(pair: Pair, make_memory: Make) -> None:
    primary, secondary = pair.start(rejoin=True)
    pair.events_s.wait("checkpoint", 2)
    end_secondary(pair, secondary)
    steps = pair.pvm.resumes
    checkpoints = len(pair.events_s.all("checkpoint"))
    secondary = fresh_secondary(pair, make_memory)
    pair.events_p.wait("rejoined")
    pair.events_s.wait("checkpoint", checkpoints + 2)
    assert [event["fresh"] for event in pair.events_p.all("connected")] == [True, True]
    assert pair.pvm.resumes > steps
    # The one that held an epoch is given up: output left when that was decided, and is withheld again since.
    at = pair.released.index(None)
    assert pair.released[at + 1] == pair.released[at + 2] - 1
    pair.stop_p.set()
    assert not primary.join().alone
    assert secondary.join().wrong_pages == 0
    no_page_wrong(pair)


def test_without_consent_a_fresh_secondary_is_told_what_to_do_and_waits(pair: Pair, make_memory: Make) -> None:
    pair.timing = replace(pair.timing, reconnect_limit=1.0)
    primary, secondary = pair.start()
    pair.events_s.wait("checkpoint", 2)
    end_secondary(pair, secondary)
    secondary = fresh_secondary(pair, make_memory)
    assert "start the primary with --rejoin" in pair.events_s.wait("refused")["reason"]
    pair.events_p.wait("alone")
    assert secondary.thread.is_alive(), "somebody else's configuration ended the fresh secondary"
    assert pair.cache.status().phase is Phase.EMPTY
    pair.stop_p.set()
    assert primary.join().alone


def test_a_primary_that_goes_on_alone_takes_a_fresh_secondary(pair: Pair, make_memory: Make) -> None:
    pair.timing = replace(pair.timing, reconnect_limit=0.2, run_on=0.5)
    primary, secondary = pair.start(rejoin=True)
    pair.events_s.wait("checkpoint", 2)
    end_secondary(pair, secondary)
    pair.events_p.wait("alone")
    before = pair.link.pages()
    checkpoints = len(pair.events_s.all("checkpoint"))
    secondary = fresh_secondary(pair, make_memory)
    pair.events_p.wait("rejoined")
    pair.events_s.wait("checkpoint", checkpoints + 2)
    assert pair.link.pages() - before >= TOY_PAGES, "a fresh secondary needs all of RAM"
    assert pair.released.count(None) == 1
    # Whole again, it is a pair like any other: the secondary can take over.
    pair.secondary.request_failover()
    ended = secondary.join(60)
    assert ended.took_over
    assert ended.wrong_pages == 0
    with pytest.raises(TookOverError):
        primary.join()
    no_page_wrong(pair)


def test_a_fresh_secondary_that_is_lost_before_it_is_in_step_leaves_the_primary_alone_and_another_may_come(
    pair: Pair, make_memory: Make
) -> None:
    pair.timing = replace(pair.timing, reconnect_limit=0.2)
    primary, secondary = pair.start(rejoin=True)
    pair.events_s.wait("checkpoint", 2)
    end_secondary(pair, secondary)
    pair.events_p.wait("alone")
    pair.memory = make_memory(TOY_BLOCKS)
    pair.stop_s = threading.Event()
    pair.make_secondary()
    secondary = pair.run_secondary()
    pair.link.rule = lambda _way, kind, _epoch: "cut" if kind is M.VMSTATE_SIZE else "pass"
    pair.events_p.wait("lost", 2)
    pair.link.rule = lambda *_: "cut"
    pair.stop_s.set()
    secondary.join()
    assert pair.released[-1] is None
    secondary = fresh_secondary(pair, make_memory)
    pair.events_p.wait("rejoined")
    pair.stop_p.set()
    assert not primary.join().alone
    secondary.join()
    no_page_wrong(pair)


def test_an_arbiter_that_says_no_keeps_the_old_secondary(pair: Pair, make_memory: Make) -> None:
    """Consent is the operator's and the arbiter's: the secondary that is given up could still take over."""
    pair.make_secondary()
    pair.arbiter = NeverArbiter()
    pair.make_primary(rejoin=True)
    _, secondary = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    end_secondary(pair, secondary)
    fresh_secondary(pair, make_memory)
    assert "arbiter never says no" in pair.events_s.wait("refused")["reason"]
    assert None not in pair.released
    assert pair.events_p.all("rejoined") == []


def test_a_stranger_that_dies_in_its_first_copy_costs_a_fresh_secondary_nothing(
    make_memory: Make, tmp_path: Path
) -> None:
    """Nothing is sealed: it waits as long as at the start, and the primary that comes then is its own."""
    timing = replace(QUICK, reconnect_limit=0.05)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing) as pair:
        pair.make_secondary()
        secondary = pair.run_secondary()
        with fake_primary(pair) as peer:
            accepted(peer)
            peer.socket.sendall(packet(1, [(5, 1, 0)], data=bytes([9]) * 4096)[:2000])
        pair.events_s.wait("lost")
        pair.make_primary(checkpoints=2)
        assert pair.run_primary().join().checkpoints == 2
        assert secondary.join().wrong_pages == 0
        no_page_wrong(pair)


# ---- who takes over says so ----


@pytest.mark.parametrize("moment", ["idle", "flush", "load"])
def test_the_primary_is_told_of_a_takeover_before_the_secondary_runs(pair: Pair, moment: str) -> None:
    """The operator was wrong: the primary lives. It stands still at once, not after its time limits."""
    pair.make_secondary()
    pair.make_primary(interval=0.1)
    primary, secondary = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    stood: list[bool] = []
    resume = pair.svm.resume

    def ask() -> None:
        if not stood:
            stood.append(False)
            pair.svm.resume = lambda: (primary.thread.join(10), stood.append(not pair.pvm.running), resume())[2]  # type: ignore[method-assign]
            pair.secondary.request_failover()

    if moment == "idle":
        pair.secondary.request_failover()
    elif moment == "flush":
        flush = pair.cache.flush
        pair.cache.flush = lambda: (ask(), flush())[1]  # type: ignore[method-assign]
    else:
        pair.svm.on_load = ask
    with pytest.raises(TookOverError, match=r"operator said|failover was asked for|took over at epoch"):
        primary.join(10)
    assert not pair.pvm.running
    assert None not in pair.released
    pair.events_s.wait("takeover")
    pair.stop_s.set()
    assert secondary.join().took_over
    if moment != "idle":
        assert stood[1:], "the secondary did not take over"
        assert stood[1], "the secondary ran before the primary could have been told"


def test_a_session_that_meets_a_takeover_before_its_operator_has_told_the_primary_tells_it(pair: Pair) -> None:
    """The operator's thread grants it and tells the primary; in between the session's own thread may end it."""
    pair.make_secondary()
    pair.make_primary(interval=0.1)
    primary, secondary = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    last_word, main = Channel.last_word, threading.current_thread()
    met = threading.Event()

    def slow_operator(channel: Channel, kind: AbortKind, reason: str) -> None:
        if threading.current_thread() is main:
            assert met.wait(10)
            return
        last_word(channel, kind, reason)
        met.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "last_word", slow_operator)
        pair.secondary.request_failover()
        with pytest.raises(TookOverError):
            primary.join(10)
    pair.events_s.wait("takeover")
    pair.stop_s.set()
    assert secondary.join().took_over


@pytest.mark.parametrize("stage", ["hello", "ready", "idle", "requested", "sent", "received"])
def test_a_primary_that_is_told_of_a_takeover_stands_still_wherever_it_is(
    pair: Pair, tmp_path: Path, stage: str
) -> None:
    pair.make_primary(interval=0.05, checkpoints=1, hold=stage == "idle")

    def until(peer: FakePeer, kind: MessageType) -> None:
        while peer.hear()[0] is not kind:
            pass

    with fake_secondary(pair, tmp_path) as accept:
        running = pair.run_primary()
        peer = accept()
        if stage != "hello":
            peer.say(M.HELLO, body=its_hello(pair))
        if stage not in ("hello", "ready"):
            peer.say(M.CHECKPOINT_READY)
            until(peer, M.CHECKPOINT_REQUEST)
        if stage in ("sent", "received", "idle"):
            peer.say(M.CHECKPOINT_REPLY, 1)
            until(peer, M.VMSTATE_SIZE)
        if stage in ("received", "idle"):
            peer.say(M.VMSTATE_RECEIVED, 1)
        if stage == "idle":
            peer.say(M.VMSTATE_LOADED, 1)
            pair.events_p.wait("holding")
        peer.say(M.ABORT, 0, b"it takes over", a=int(AbortKind.TOOK_OVER))
        with pytest.raises(TookOverError, match="it takes over"):
            running.join()
    assert not pair.pvm.running
    assert None not in pair.released
