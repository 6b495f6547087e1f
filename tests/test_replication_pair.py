# SPDX-License-Identifier: Apache-2.0
"""A pair that meets trouble: cut links, vetoes, failed loads, silence, strangers. After each the promise holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from toy import QUICK, TOY_BLOCKS, Pair, no_page_wrong, pair_of, while_set

from colocache import LogLostError, NoStateError, PeerLostError, Phase
from colocache.replication.arbiter import Loss, NeverArbiter, SoloArbiter, Verdict
from colocache.replication.errors import RefusedError, SecondaryLostError, TookOverError
from colocache.replication.messages import MessageType
from colocache.vmm import DeviceStateError


@pytest.fixture
def pair(make_memory, tmp_path: Path) -> Iterator[Pair]:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as made:
        yield made


# ---- the ordinary course ----


def test_a_pair_keeps_in_step_and_ends_in_order(pair: Pair) -> None:
    primary, secondary = pair.start(checkpoints=6)
    ended, followed = primary.join(), secondary.join()
    assert (ended.checkpoints, ended.alone, ended.wrong_pages) == (6, False, 0)
    assert (followed.checkpoints, followed.took_over, followed.wrong_pages) == (6, False, 0)
    assert [event["epoch"] for event in pair.events_s.all("checkpoint")] == [1, 2, 3, 4, 5, 6]
    no_page_wrong(pair)
    assert sum(event["svm_pages"] for event in pair.events_s.all("checkpoint")) > 0, "the two never drifted apart"


def test_output_is_released_only_for_sealed_epochs_and_in_order(pair: Pair) -> None:
    primary, secondary = pair.start(checkpoints=4)
    primary.join()
    secondary.join()
    assert pair.released == [1, 2, 3, 4]


def test_the_conversation_is_qemus_in_its_order(pair: Pair) -> None:
    primary, secondary = pair.start(checkpoints=2, background=False)
    primary.join()
    secondary.join()
    words = [
        f"{way} {kind.name}({epoch})"
        for way, kind, epoch, _ in pair.link.log
        if kind not in (MessageType.PING, MessageType.PONG, MessageType.PAGES) and epoch == 2
    ]
    assert words == [
        "P→S CHECKPOINT_REQUEST(2)",
        "S→P CHECKPOINT_REPLY(2)",
        "P→S VMSTATE_SEND(2)",
        "P→S VMSTATE_SIZE(2)",
        "S→P VMSTATE_RECEIVED(2)",
        "S→P VMSTATE_LOADED(2)",
    ]
    assert [kind for _, kind, _, _ in pair.link.log][:3] == [
        MessageType.HELLO,
        MessageType.HELLO,
        MessageType.CHECKPOINT_READY,
    ]


@pytest.mark.parametrize("who", ["primary", "secondary"])
def test_either_side_may_ask_for_a_checkpoint(pair: Pair, who: str) -> None:
    pair.start(interval=3600)
    pair.events_s.wait("checkpoint", 1)
    (pair.primary if who == "primary" else pair.secondary).request_checkpoint()
    pair.events_s.wait("checkpoint", 2)
    no_page_wrong(pair)


def test_many_dirty_pages_call_for_a_checkpoint_before_its_time(pair: Pair) -> None:
    pair.start(interval=3600, dirty_limit_pages=150)
    pair.events_s.wait("checkpoint", 1)
    time.sleep(0.3)
    assert len(pair.events_s.all("checkpoint")) == 1
    pair.pvm.write_all(1, range(200), 77)
    pair.events_s.wait("checkpoint", 2)
    no_page_wrong(pair)


def test_many_dirty_pages_on_the_secondary_make_it_ask(pair: Pair) -> None:
    pair.make_secondary(ask_at=150)
    pair.make_primary(interval=3600)
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 1)
    pair.svm.write_all(1, range(200), 77)
    pair.events_s.wait("checkpoint", 2)
    no_page_wrong(pair)


@pytest.mark.parametrize("who", ["primary", "secondary"])
def test_a_dirty_log_that_cannot_be_read_counts_as_all_ones(pair: Pair, who: str) -> None:
    pair.start(interval=3600)
    pair.events_p.wait("checkpoint", 1)  # both run on
    machine = pair.pvm if who == "primary" else pair.svm
    sync = machine.sync_dirty_log

    def lost(_target: object) -> None:
        machine.discard_dirty_log()
        machine.sync_dirty_log = sync  # type: ignore[method-assign]
        raise LogLostError("the log's owner died")

    for pfn in range(200, 230):
        machine.write(1, pfn, 77)
    machine.sync_dirty_log = lost  # type: ignore[method-assign]
    pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 2)
    no_page_wrong(pair)


def test_a_rehearsal_that_fails_costs_nothing(pair: Pair) -> None:
    """Both sides go through the newest state while they wait; only the look before the seal counts."""
    pair.make_secondary()
    pair.make_primary(checkpoints=4)
    rehearsed: list[bytes] = []

    def rehearse(state: bytes) -> None:
        rehearsed.append(state)
        raise DeviceStateError("not now")

    pair.svm.rehearse = pair.pvm.rehearse = rehearse  # type: ignore[method-assign]
    primary, secondary = pair.run_primary(), pair.run_secondary()
    assert primary.join().checkpoints == secondary.join().checkpoints == 4
    assert len(rehearsed) >= 2 * 3
    assert not pair.events_s.all("aborted")
    no_page_wrong(pair)


# ---- epochs that are given up ----


def test_a_veto_costs_the_epoch_and_nothing_else(pair: Pair) -> None:
    pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    pair.svm.veto = "this device is not known here"
    reason = pair.events_p.wait("aborted")["reason"]
    assert "this device is not known here" in reason
    sealed = pair.cache.status().sealed_epoch
    pair.events_p.wait("aborted", 2)
    assert pair.cache.status().sealed_epoch == sealed
    pair.svm.veto = None
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 2)
    no_page_wrong(pair)
    assert pair.svm.running or pair.svm.resumes > done
    given_up = {event["epoch"] for event in pair.events_p.all("aborted")}
    assert not given_up & set(pair.released), "output of an epoch that was never sealed"


def test_a_primary_that_cannot_save_gives_up_the_epoch_and_goes_on(pair: Pair) -> None:
    pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    pair.pvm.fail_save = "a device is in the middle of something"
    pair.events_s.wait("aborted")
    pair.pvm.fail_save = None
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 2)
    no_page_wrong(pair)


def test_a_failed_load_ends_the_secondary_and_the_primary_goes_on_alone(pair: Pair) -> None:
    primary, secondary = pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    pair.svm.fail_load = "the device is broken"
    with pytest.raises(SecondaryLostError, match="the device is broken"):
        secondary.join()
    ended = primary.join()
    assert ended.alone
    assert "did not load" in ended.end
    assert not pair.svm.running
    status = pair.cache.status()
    assert status.phase is Phase.LOAD_FAILED
    assert status.committed_epoch == status.sealed_epoch == 3
    # What was sealed stays for a fresh machine.
    pair.cache.close()
    pair.make_secondary(attach=True)
    assert pair.cache.recovery is not None
    assert pair.svm.load_device_state(pair.cache.device_state()).wrong_pages == ()


# ---- taking over ----


def test_a_takeover_asked_for_while_a_fresh_machine_loads_waits_for_the_load(pair: Pair) -> None:
    """Granted before, it would be final: an epoch that did not load could never be attached to again."""
    _, secondary = pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    pair.svm.fail_load = "the device is broken"
    with pytest.raises(SecondaryLostError):
        secondary.join()
    pair.primary.stop.set()
    pair.link.close()
    for broken in ("still broken", None):
        pair.cache.close()
        fresh = pair.make_secondary(attach=True)
        answers: list[bool] = []
        pair.svm.fail_load = broken
        pair.svm.on_load = lambda: answers.append(fresh.request_failover())  # noqa: B023
        running = pair.run_secondary()
        if broken:
            with pytest.raises(SecondaryLostError, match="still broken"):
                running.join()
            assert pair.cache.status().phase is Phase.LIVE
    ended = running.join()
    assert answers == [False]
    assert (ended.took_over, ended.epoch) == (True, 3)
    assert ended.end == "took over: the operator asked for it"


def test_a_primary_that_does_not_come_back_is_replaced(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=0.2)
    _, secondary = pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 3)
    pair.link.close()
    followed = secondary.join()
    assert followed.took_over
    assert followed.epoch >= 3
    assert pair.cache.status().phase is Phase.FAILED_OVER
    assert "cannot tell a dead primary from a cut link" in pair.events_s.all("arbiter")[0]["sentence"]


def test_without_a_committed_epoch_there_is_no_takeover(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=0.2, connect_limit=1.0)
    pair.link.rule = lambda _way, kind, _epoch: "cut" if kind is MessageType.CHECKPOINT_REQUEST else "pass"
    _, secondary = pair.start()
    pair.events_s.wait("lost")
    pair.link.close()
    with pytest.raises(PeerLostError, match=r"no primary came within 1 s after this"):
        secondary.join()
    assert not pair.svm.running


def test_an_arbiter_that_says_no_keeps_both_from_going_on_alone(make_memory, tmp_path: Path) -> None:
    timing = replace(QUICK, reconnect_limit=0.2, connect_limit=0.3)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing, arbiter=NeverArbiter()) as pair:
        primary, secondary = pair.start(interval=0.1)
        pair.events_s.wait("checkpoint", 2)
        pair.link.close()
        with pytest.raises(NoStateError, match="may not take over"):
            secondary.join()
        assert pair.cache.status().phase is Phase.LIVE
        assert primary.join().alone
        assert not pair.pvm.running
        assert None not in pair.released


def test_the_arbiter_is_told_what_is_known(make_memory, tmp_path: Path) -> None:
    asked: list[Loss] = []

    class Asked(SoloArbiter):
        def acquire(self, loss: Loss) -> Verdict:
            asked.append(loss)
            return Verdict(True, "yes")

    timing = replace(QUICK, reconnect_limit=0.1)
    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=timing, arbiter=Asked()) as pair:
        primary, secondary = pair.start(interval=0.1)
        pair.events_p.wait("checkpoint", 2)  # the primary knows of both
        pair.link.close()
        primary.join()
        secondary.join()
    by_role = {loss.role: loss for loss in asked}
    assert set(by_role) == {"primary", "secondary"}
    # A primary tells the newest number it has used: the secondary can't have sealed one that the arbiter wasn't told.
    assert by_role["primary"].epoch >= by_role["secondary"].epoch >= 2
    assert by_role["primary"].history == by_role["secondary"].history != ""
    assert SoloArbiter().acquire(by_role["primary"]).yes


def test_a_primary_that_comes_after_the_takeover_stands_still(pair: Pair) -> None:
    """The link was cut, not the primary dead: arbiter solo could not know. The late primary is told."""
    pair.timing = replace(QUICK, reconnect_limit=0.2, run_on=30.0)
    pair.make_secondary()
    pair.timing = replace(QUICK, reconnect_limit=30.0)
    pair.make_primary(interval=0.1)
    primary, _ = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    down = threading.Event()
    down.set()
    pair.link.rule = while_set(down, "cut")
    pair.events_s.wait("takeover")
    down.clear()
    with pytest.raises(TookOverError, match="this primary stands still"):
        primary.join()
    assert not pair.pvm.running


@pytest.mark.parametrize("moment", ["idle", "state", "seal", "flush", "load"])
def test_the_operator_may_ask_for_the_takeover_at_any_moment(pair: Pair, moment: str) -> None:
    pair.make_secondary()
    pair.make_primary(interval=0.1)
    answers: list[bool] = []

    def ask() -> None:
        if not answers:
            answers.append(pair.secondary.request_failover())

    pair.run_primary()
    secondary = pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    if moment == "idle":
        pair.primary.options = replace(pair.primary.options, interval=3600)
        ask()
    elif moment == "state":  # all pages of the epoch have come
        room = pair.cache.device_state_buffer
        pair.cache.device_state_buffer = lambda *given: (room(*given), ask())[0]  # type: ignore[method-assign]
    elif moment == "seal":
        seal = pair.cache.seal
        pair.cache.seal = lambda *given, **named: (ask(), seal(*given, **named))[1]  # type: ignore[method-assign]
    elif moment == "flush":
        flush = pair.cache.flush
        pair.cache.flush = lambda: (ask(), flush())[1]  # type: ignore[method-assign]
    else:
        pair.svm.on_load = ask
    followed = secondary.join()
    assert followed.took_over
    assert followed.wrong_pages == 0
    if moment != "idle":
        assert answers == [moment in ("state", "seal")], "while an epoch is sealed it is finished first"
    assert pair.events_s.all("takeover")[0]["epoch"] == followed.epoch
    no_page_wrong(pair)


# ---- who is refused ----


def test_another_pair_is_refused_with_one_sentence_on_both_sides(pair: Pair) -> None:
    pair.make_secondary(pair="mine")
    pair.make_primary()
    primary, secondary = pair.run_primary(), pair.run_secondary()
    with pytest.raises(RefusedError, match="the secondary refuses this primary: the peer belongs to pair 'toy'"):
        primary.join()
    assert "belongs to pair 'toy'" in pair.events_s.wait("refused")["reason"]
    assert secondary.thread.is_alive(), "a stranger ended the secondary"
    assert pair.cache.status().phase is Phase.EMPTY


def test_a_stranger_does_not_harm_a_pair_in_step(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=30.0)
    primary, secondary = pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    down = threading.Event()
    down.set()
    pair.link.rule = while_set(down, "cut")
    pair.link.cut()
    pair.events_s.wait("lost")
    with pair.address.connect(1.0) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(40))
        stranger.settimeout(5)
        while stranger.recv(4096):
            pass
    assert "no message of colocache" in pair.events_s.wait("refused")["reason"]
    down.clear()
    done = len(pair.events_s.all("checkpoint"))
    pair.events_s.wait("checkpoint", done + 1)
    pair.stop_p.set()
    primary.join()
    assert not secondary.join().took_over
    no_page_wrong(pair)


def test_a_new_primary_is_refused_by_a_secondary_that_holds_anothers_epoch(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=30.0)
    primary, _ = pair.start(interval=0.1)
    pair.events_s.wait("checkpoint", 2)
    down = threading.Event()
    down.set()
    pair.link.rule = while_set(down, "cut")  # nor may it end in order, which would end the secondary too
    pair.link.cut()
    pair.stop_p.set()
    primary.join()
    down.clear()
    pair.stop_p = threading.Event()
    pair.make_primary()
    with pytest.raises(RefusedError, match="of another primary: start a fresh one"):
        pair.run_primary().join()


def test_a_primary_that_declared_its_secondary_lost_never_takes_it_back(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=30.0)
    pair.make_secondary()
    pair.timing = replace(QUICK, reconnect_limit=0.3)
    pair.make_primary(interval=0.1)
    primary, secondary = pair.run_primary(), pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    down = threading.Event()
    down.set()
    pair.link.rule = while_set(down, "cut")
    pair.link.cut()
    assert primary.join().alone
    down.clear()
    # The same primary tries again: it must be the one to say that this secondary is lost.
    with pair.primary._dial(5.0) as channel, pytest.raises(RefusedError):
        pair.primary.greet(channel)
    with pytest.raises(RefusedError, match="declared this secondary lost"):
        secondary.join()
    assert pair.cache.status().phase is Phase.LIVE
