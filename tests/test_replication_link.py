# SPDX-License-Identifier: Apache-2.0
"""A link cut at every message, one that stalls, a process that dies: the pair goes on, sending only what is missing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import QUICK, TOY_BLOCKS, TOY_PAGES, Pair, ToyMachine, no_page_wrong, once, pair_of, while_set

from colocache import BlockSpec, ColocacheError, NoStateError, RamImage
from colocache.replication.arbiter import Loss, SoloArbiter, Verdict
from colocache.replication.messages import MessageType


@pytest.fixture
def pair(make_memory, tmp_path: Path) -> Iterator[Pair]:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as made:
        yield made


CUTS = [
    (MessageType.HELLO, "S→P", 1),
    (MessageType.CHECKPOINT_READY, "S→P", 1),
    (MessageType.PAGES, "P→S", 1),  # in the initial copy
    (MessageType.PAGES, "P→S", 6),
    (MessageType.CHECKPOINT_REQUEST, "P→S", 3),
    (MessageType.CHECKPOINT_REPLY, "S→P", 3),
    (MessageType.VMSTATE_SEND, "P→S", 3),
    (MessageType.VMSTATE_SIZE, "P→S", 3),
    (MessageType.VMSTATE_RECEIVED, "S→P", 3),
    (MessageType.VMSTATE_LOADED, "S→P", 3),
    (MessageType.VMSTATE_RECEIVED, "S→P", 1),
]


@pytest.mark.parametrize("verdict", ["cut", "pass-cut"])
@pytest.mark.parametrize(("kind", "direction", "after"), CUTS)
def test_a_link_cut_at_any_message_costs_no_page(
    pair: Pair, kind: MessageType, direction: str, after: int, verdict: str
) -> None:
    pair.link.rule = once(kind, verdict, after=after, direction=direction)
    goes_on_without_a_wrong_page(pair)


class WritesAsItSaves(ToyMachine):
    """Saving its device state writes a page, as that of a device may."""

    def save_device_state(self, *, with_hashes: bool = False) -> bytes:
        self.write(1, 299, self.steps)
        return super().save_device_state(with_hashes=with_hashes)


@pytest.mark.parametrize("verdict", ["cut", "half-cut", "pass-cut"])
def test_a_link_cut_among_the_last_pages_of_an_epoch_costs_no_page(pair: Pair, verdict: str) -> None:
    """Between VMSTATE_SEND and VMSTATE_SIZE: both machines stand, and the device state is at the secondary."""
    since_state = False
    cut: list[int] = []

    def rule(direction: str, kind: MessageType, epoch: int) -> str:
        nonlocal since_state
        if direction == "P→S" and kind in (MessageType.VMSTATE_SEND, MessageType.VMSTATE_SIZE):
            since_state = kind is MessageType.VMSTATE_SEND
        if since_state and kind is MessageType.PAGES and epoch == 3 and not cut:
            cut.append(epoch)
            return verdict
        return "pass"

    pair.link.rule = rule
    goes_on_without_a_wrong_page(pair, machine=WritesAsItSaves)
    assert cut == [3], "nothing was cut there"
    assert len(pair.events_p.all("connected")) == 2


def goes_on_without_a_wrong_page(pair: Pair, **options: Any) -> None:
    """Six checkpoints, whatever the link does."""
    primary, secondary = pair.start(checkpoints=6, **options)
    ended, followed = primary.join(), secondary.join()
    # Where RECEIVED or LOADED was lost the checkpoint is done and the primary does not count it.
    assert (ended.checkpoints, ended.alone) == (6, False)
    assert followed.wrong_pages == 0
    no_page_wrong(pair)
    epochs = [event["epoch"] for event in pair.events_s.all("checkpoint")]
    assert epochs == sorted(set(epochs)), "an epoch number was used twice"


def test_after_a_reconnection_only_unacknowledged_pages_are_sent_again(pair: Pair) -> None:
    primary, secondary = pair.start(interval=3600)
    pair.events_s.wait("checkpoint", 1)
    before = pair.link.pages()
    assert before >= TOY_PAGES
    pair.link.cut()
    pair.events_s.wait("checkpoint", 2)
    sent_again = pair.link.pages() - before
    assert 0 < sent_again < TOY_PAGES // 3
    assert pair.events_p.all("connected")[1]["fresh"] is False
    pair.stop_p.set()
    primary.join()
    secondary.join()
    no_page_wrong(pair)


def test_blocks_that_came_and_went_while_the_link_was_cut_are_told_in_the_next_hello(pair: Pair) -> None:
    cut = threading.Event()
    pair.link.rule = while_set(cut, "cut")
    primary, secondary = pair.start(interval=3600)
    pair.events_s.wait("checkpoint", 1)
    cut.set()
    pair.link.cut()
    pair.events_s.wait("lost", 1)
    with RamImage.create(BlockSpec("dimm", 4 * 4096), "shm") as dimm:
        dimm.view[:] = 7
        index = pair.sender.add_block("dimm", dimm.addr, 4 * 4096)
        late = pair.cache.add_block(pair.memory.add_block(dimm.spec))
        assert index == late.index == len(TOY_BLOCKS)
        cut.clear()
        pair.events_s.wait("checkpoint", 2)
        assert (np.array(late.guest) == 7).all()
        cut.set()
        pair.link.cut()
        pair.events_s.wait("lost", 2)
        pair.sender.remove_block(index)
        pair.cache.remove_block("dimm")
        cut.clear()
        pair.events_s.wait("checkpoint", 3)
        pair.stop_p.set()
        primary.join()
        secondary.join()
    assert "dimm" not in pair.cache.blocks
    no_page_wrong(pair)


def test_a_block_that_only_one_side_has_is_named_at_the_reconnection(pair: Pair) -> None:
    cut = threading.Event()
    pair.link.rule = while_set(cut, "cut")
    pair.start(interval=3600)
    pair.events_s.wait("checkpoint", 1)
    cut.set()
    pair.link.cut()
    pair.events_s.wait("lost", 1)
    pair.cache.add_block(pair.memory.add_block(BlockSpec("dimm", 4096)))
    cut.clear()
    reason = pair.events_s.wait("refused", 1)["reason"]
    assert "RAM block 2, dimm (4096 bytes in pages of 4096), is here and not at the peer" in reason


def test_pages_that_got_lost_in_an_epoch_that_was_given_up_come_with_the_next(pair: Pair) -> None:
    """The secondary counts too few and gives up the epoch; the connection lives, so no reconnection sends them."""
    pair.start(interval=3600)
    pair.events_s.wait("checkpoint", 1)
    pair.link.rule = once(MessageType.PAGES, "drop")
    pair.primary.request_checkpoint()
    assert "pages were sent, 0 came" in pair.events_p.wait("aborted")["reason"]
    pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 2)
    no_page_wrong(pair)
    assert pair.events_p.all("lost") == []


def test_a_lost_received_is_recognised_and_output_is_released_once(pair: Pair) -> None:
    pair.link.rule = once(MessageType.VMSTATE_RECEIVED, "cut", after=2)
    primary, secondary = pair.start(checkpoints=4)
    primary.join()
    secondary.join()
    connected = pair.events_p.all("connected")
    assert (connected[1]["sealed_epoch"], connected[1]["unacked_pages"]) == (2, 0)
    assert pair.released == [1, 2, 3, 4, 5]
    no_page_wrong(pair)


def test_what_is_marked_while_the_epoch_in_flight_is_in_doubt_is_not_forgotten(pair: Pair) -> None:
    """N is sealed but RECEIVED was lost. User space marks pages before the reconnection: they belong to N+1."""
    pair.link.rule = once(MessageType.VMSTATE_RECEIVED, "cut", after=2)
    pair.make_secondary()
    pair.make_primary(interval=3600)

    def on_lost(event: str, _fields: object) -> None:
        if event == "lost":
            pair.pvm.views[1][250] = 99  # written by user space: in no log
            pair.primary.mark_dirty(1, 250, 1)

    pair.events_p.on_event = on_lost
    pair.run_primary()
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 1)
    pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 3)
    no_page_wrong(pair)
    assert np.all(pair.cache.blocks["pc.ram"].cache[250] == 99)


@pytest.mark.parametrize(("resume_at", "runs"), [("received", True), ("loaded", False)])
def test_the_primary_stands_until_received_or_if_asked_until_loaded(pair: Pair, resume_at: str, runs: bool) -> None:
    """The secondary's load is held up: by then its primary has heard RECEIVED(3) and not LOADED(3)."""
    loading, go_on = threading.Event(), threading.Event()

    def load() -> None:
        if pair.cache.status().sealed_epoch == 3:
            loading.set()
            assert go_on.wait(10)

    pair.make_secondary()
    pair.make_primary(checkpoints=4, resume_at=resume_at)
    pair.svm.on_load = load
    primary, secondary = pair.run_primary(), pair.run_secondary()
    assert loading.wait(10)
    until = time.monotonic() + 10
    while pair.released[-1:] != [3] and time.monotonic() < until:
        time.sleep(0.01)
    assert pair.released[-1] == 3
    time.sleep(0.05)
    assert pair.pvm.running == runs
    go_on.set()
    assert primary.join().checkpoints == secondary.join().checkpoints == 4
    no_page_wrong(pair)
    third = pair.events_p.all("checkpoint")[2]
    standing = ["state", "log", "pages", "answer", "resume", *(["loaded"] if not runs else [])]
    assert sum(third["stages"][f"{stage}_ms"] for stage in standing) == pytest.approx(third["pause_ms"], abs=0.001)


def test_a_link_that_stalls_is_noticed_by_both(pair: Pair) -> None:
    """Nothing is closed, nothing comes: as with a stopped peer or a dead switch."""
    pair.timing = replace(QUICK, peer_timeout=0.6, reconnect_limit=1.0)
    stalled = threading.Event()
    pair.link.rule = while_set(stalled, "stall")
    primary, secondary = pair.start()
    pair.events_s.wait("checkpoint", 2)
    stalled.set()
    assert "0.6 s" in pair.events_s.wait("lost")["cause"]
    assert "0.6 s" in pair.events_p.wait("lost")["cause"]
    assert secondary.join().took_over
    assert primary.join().alone


# ---- a process that dies and comes back ----


def test_a_secondary_that_died_and_attached_goes_on_with_unacknowledged_pages(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=30.0)
    primary, secondary = pair.start(interval=3600)
    pair.events_s.wait("checkpoint", 1)
    pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 2)
    # Death: the machine's registers and dirty log are gone, the memory stays.
    pair.stop_s.set()
    secondary.join()
    pair.cache.close()
    pair.stop_s = threading.Event()
    before = pair.link.pages()
    pair.make_secondary(attach=True)
    pair.run_secondary()
    pair.primary.request_checkpoint()
    pair.events_s.wait("checkpoint", 3)
    assert pair.events_s.all("attached")[0]["action"] in ("RESTART", "NO_RESTART")
    assert pair.link.pages() - before < TOY_PAGES // 3
    no_page_wrong(pair)
    pair.stop_p.set()
    primary.join()


def test_without_a_state_a_secondary_waits_for_its_primary_and_never_asks_the_arbiter(
    make_memory, tmp_path: Path
) -> None:
    """It died while pages arrived: the cache is newer than its epoch. A yes would stop the primary, and nobody ran."""
    asked: list[Loss] = []

    class Asked(SoloArbiter):
        def acquire(self, loss: Loss) -> Verdict:
            asked.append(loss)
            return Verdict(True, "yes")

    with pair_of(make_memory(TOY_BLOCKS), tmp_path, timing=QUICK, arbiter=Asked()) as pair:
        _, secondary = pair.start(interval=0.1)
        pair.events_s.wait("checkpoint", 2)

        def die(*_: object, **__: object) -> None:
            pair.stop_p.set()
            raise ColocacheError("killed")

        pair.cache.seal = die  # type: ignore[method-assign]
        with pytest.raises(ColocacheError, match="killed"):
            secondary.join()
        pair.link.close()
        pair.cache.close()
        asked.clear()  # the primary may have asked
        pair.timing = replace(QUICK, reconnect_limit=0.05, connect_limit=0.5)
        pair.make_secondary(attach=True)
        assert pair.cache.recovery is not None
        assert pair.cache.recovery.action.name == "NO_RESTART"
        with pytest.raises(NoStateError, match=r"within 0\.5 s, and there is no state to take over from"):
            pair.secondary.run()
        assert [loss for loss in asked if loss.role == "secondary"] == []
        assert not pair.events_s.all("promoted")


def test_a_secondary_that_died_in_the_initial_copy_gets_a_new_one(pair: Pair) -> None:
    pair.timing = replace(QUICK, reconnect_limit=30.0)
    pair.link.rule = once(MessageType.CHECKPOINT_REQUEST, "stall")
    _, secondary = pair.start(interval=0.1)
    pair.events_p.wait("initial")
    pair.stop_s.set()
    pair.link.cut()
    with contextlib.suppress(ColocacheError):
        secondary.join()
    pair.cache.close()
    pair.stop_s = threading.Event()
    pair.make_secondary(attach=True)
    pair.run_secondary()
    pair.events_s.wait("checkpoint", 2)
    assert pair.events_s.all("attached")[0]["action"] == "NOTHING"
    connected = [event["fresh"] for event in pair.events_p.all("connected")]
    assert len(connected) >= 2
    assert all(connected)
    no_page_wrong(pair)
