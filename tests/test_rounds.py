# SPDX-License-Identifier: Apache-2.0
"""Rounds before a pause: they shrink what is left, end where they do not pay, and never starve a guest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import TOY_BLOCKS, Pair, no_page_wrong, pair_of

from colocache.replication import rounds
from colocache.replication.messages import MessageType
from colocache.replication.rounds import LAST_MAX, Rounds, pays


class World:
    """A guest that dirties `rate` pages a second, of `n_pages` in all, and a link: `fixed` and `per_page` seconds."""

    def __init__(self, *, rate: float, fixed: float = 100e-6, per_page: float = 1.5e-6, n_pages: float = 1e9) -> None:
        self.rate, self.fixed, self.per_page, self.n_pages = rate, fixed, per_page, n_pages
        self.now = self.taken = 0.0
        self.sent: list[int] = []

    def dirty(self) -> int:
        return int(min(self.n_pages, self.rate * (self.now - self.taken)))

    def take(self) -> None:
        self.pending, self.taken = self.dirty(), self.now

    def send(self) -> int:
        self.now += self.fixed + self.per_page * self.pending
        self.sent.append(self.pending)
        return self.pending

    def run(self, seconds: float) -> Rounds:
        """The guest has run for so long since the pause before."""
        made = Rounds(self.take, self.send, lambda: 0)
        self.now += seconds
        return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[World]]:
    worlds: list[World] = []
    now = SimpleNamespace(monotonic=lambda: worlds[-1].now if worlds else 0.0)
    monkeypatch.setattr(rounds, "time", now)
    return worlds  # type: ignore[return-value]


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.1, 1.0])
def test_rounds_shrink_until_what_is_left_costs_less_than_another(clock: list[World], seconds: float) -> None:
    clock.append(world := World(rate=50_000))
    made = world.run(seconds)
    n_rounds = made.last()
    assert n_rounds == len(world.sent) < LAST_MAX
    assert world.sent == sorted(world.sent, reverse=True)
    assert not pays(world.dirty(), world.rate, world.fixed, world.per_page)
    assert world.per_page * world.dirty() < 2 * world.fixed, "the pause would still be much longer than it must"


def test_a_guest_that_is_faster_than_the_link_is_not_chased(clock: list[World]) -> None:
    clock.append(world := World(rate=1e6))  # it dirties a page in the time that one takes, and more
    made = world.run(0.01)
    assert made.last() <= 2


def test_an_idle_guest_costs_one_round(clock: list[World]) -> None:
    clock.append(world := World(rate=0))
    made = world.run(1.0)
    assert made.last() == 1


def test_a_slow_link_is_learned_and_makes_rounds_pay_sooner(clock: list[World]) -> None:
    clock.append(world := World(rate=5_000, per_page=36e-6))  # 1 Gbit/s
    made = world.run(0.5)
    for _ in range(20):
        made.one()
        world.now += 0.1
    assert made.per_page == pytest.approx(36e-6, rel=0.1)
    assert pays(40, world.rate, made.fixed, made.per_page)
    assert not pays(40, world.rate, made.fixed, 1.5e-6)
    made.last()
    assert world.dirty() < 10


@pytest.mark.parametrize(("rate", "per_page"), [(1e6, 1e-6), (2e6, 1e-6), (1e5, 1e-4)])
def test_no_round_pays_where_as_many_pages_get_dirty_as_are_sent(rate: float, per_page: float) -> None:
    assert not any(pays(n, rate, 1e-4, per_page) for n in (1, 100, 10_000, 1_000_000))


# ---- in a pair ----


@pytest.fixture
def pair(make_memory, tmp_path: Path) -> Iterator[Pair]:
    with pair_of(make_memory(TOY_BLOCKS), tmp_path) as made:
        yield made


@pytest.mark.parametrize("background", [True, False])
def test_what_is_dirty_goes_before_the_machine_is_stopped_unless_that_is_not_wanted(
    pair: Pair, background: bool
) -> None:
    pair.start(interval=3600, background=background)
    pair.events_p.wait("checkpoint", 1)
    for pfn in range(200):
        pair.pvm.write(1, pfn, pfn)
    pair.primary.request_checkpoint()
    done = pair.events_p.wait("checkpoint", 2)
    log = [(kind, n) for way, kind, epoch, n in pair.link.log if way == "P→S" and epoch == 2]
    asked = [kind for kind, _ in log].index(MessageType.CHECKPOINT_REQUEST)
    before, after = (sum(n for _, n in part) for part in (log[:asked], log[asked:]))
    assert (before >= 200) == background
    assert (after >= 200) != background
    assert done["background_pages"] == before
    no_page_wrong(pair)


def test_a_look_starts_a_round_only_where_so_much_is_dirty_as_the_operator_said(pair: Pair) -> None:
    pair.start(interval=3600, round_delay=0.02, round_pages=150)
    pair.events_p.wait("checkpoint", 1)
    sent = pair.link.pages()
    taken = []
    sync = pair.pvm.sync_dirty_log
    pair.pvm.sync_dirty_log = lambda target: (taken.append(pair.pvm.dirty_hint()), sync(target))[1]  # type: ignore[method-assign]
    for pfn in range(100):
        pair.pvm.write(1, pfn, pfn)
    time.sleep(0.2)  # some looks
    assert not taken
    for pfn in range(100, 200):
        pair.pvm.write(1, pfn, pfn)
    while pair.link.pages() == sent:
        pass
    assert taken[0] >= 150


@pytest.mark.parametrize(("wait", "expected"), [(0.0002, False), (0.010, True), (0.100, True)])
def test_a_far_secondary_is_sent_what_the_guest_wrote_while_it_answered(
    clock: list[World], wait: float, expected: bool
) -> None:
    clock.append(world := World(rate=50_000))
    made = world.run(0.1)
    made.last()
    n_before = len(world.sent)
    world.now += wait  # CHECKPOINT_REQUEST to REPLY
    left = world.dirty()
    assert (made.after_waiting() > 0) is expected
    assert (len(world.sent) > n_before) is expected
    assert world.dirty() < max(left / 4, 50) if expected else world.dirty() == left
    assert not pays(world.dirty(), world.rate, world.fixed, world.per_page)


def test_a_guest_that_is_faster_than_the_link_is_not_sent_after_for_ever(clock: list[World]) -> None:
    clock.append(world := World(rate=1e6))
    made = world.run(0.1)
    made.last()
    n_before = len(world.sent)
    world.now += 0.010
    made.after_waiting()
    assert len(world.sent) - n_before <= LAST_MAX
