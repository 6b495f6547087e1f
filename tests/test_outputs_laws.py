# SPDX-License-Identifier: Apache-2.0
"""What the world sees of a pair, by its laws: both halves in every order of events against an oracle of a few lists,
and a mutant of each law, which the same machine must find."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from colocache.errors import OrderError, TooLargeError
from colocache.outputs import apart
from colocache.outputs.apart import ApartOutput
from colocache.outputs.held import HeldOutput
from colocache.outputs.piece import CONSOLE, COST_BYTES, Piece

Mutation = Callable[["World"], None]


class World(RuleBasedStateMachine):
    """A primary that says 1, 2, 3 ... and a secondary; the oracle knows what each sealed state has said."""

    mutation: Mutation = staticmethod(lambda _world: None)

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []  # by the world
        self.primary = HeldOutput(lambda _, data: self.seen.append(data))
        self.secondary = ApartOutput(lambda _, data: self.seen.append(data), seen=self.world_has_seen)
        self.one_host = self.tells_before_it_dies = False
        # The oracle: what the primary said, what it had said in the state of each epoch, and the secondary's branch.
        self.said: list[bytes] = []
        self.n_said_at = {0: 0}
        self.branch: list[bytes] = []
        self.epoch, self.sealed, self.heard = 1, 0, 0
        self.n_free = 0  # of what it said: the world may see it whatever becomes of the pair
        self.free = True
        self.connected = True
        self.live = False
        self.counter = 0
        self.mutation(self)

    def world_has_seen(self, _origin: object, _channel: int) -> int:
        return sum(map(len, self.seen)) if self.one_host else 0

    @initialize(one_host=st.booleans(), tells=st.booleans())
    def somewhere(self, one_host: bool, tells: bool) -> None:
        self.one_host, self.tells_before_it_dies = one_host, tells

    def word(self) -> bytes:
        self.counter += 1
        return b"%d " % self.counter

    def out(self) -> int:
        """How much of what the primary said the world must have seen."""
        return max(self.n_free, self.n_said_at[self.heard])

    # ---- both machines run ----

    @rule()
    def the_primary_says_something(self) -> None:
        self.said.append(self.word())
        if self.free:
            self.n_free = len(self.said)
        self.primary.put(CONSOLE, self.said[-1])

    @rule()
    def the_secondary_says_something_on_its_own_branch(self) -> None:
        self.branch.append(self.word())
        self.secondary.put(CONSOLE, self.branch[-1])

    @precondition(lambda self: self.connected)
    @rule()
    def output_travels(self) -> None:
        for piece in self.primary.take():
            self.secondary.arrived(piece)

    # ---- a checkpoint, which may end anywhere ----

    @precondition(lambda self: self.connected)
    @rule(ends=st.sampled_from(["given up", "cut before the seal", "cut after the seal", "heard"]),
          says=st.integers(0, 2))  # fmt: skip
    def a_checkpoint(self, ends: str, says: int) -> None:
        self.secondary.released(self.sealed)  # it heard CHECKPOINT_REQUEST
        self.output_travels()
        epoch, self.epoch = self.epoch, self.epoch + 1
        self.n_said_at[epoch] = len(self.said)
        self.free = False
        self.primary.move(epoch + 1)
        if ends in ("given up", "cut before the seal"):
            self.connected = ends == "given up"
        else:
            self.sealed = epoch
            self.connected = ends != "cut after the seal"
        if self.connected and ends != "given up":
            self.heard = epoch
            self.primary.received(epoch)
        for _ in range(says):  # the primary runs, the secondary has not loaded yet
            self.the_primary_says_something()
        if self.sealed == epoch:
            self.branch.clear()
            self.secondary.loaded()

    # ---- the connection ----

    @precondition(lambda self: not self.free)
    @rule()
    def the_connection_is_lost_and_they_meet_again(self) -> None:
        self.connected = True
        self.epoch += 1
        self.primary.again()
        self.secondary.lost(self.sealed)
        if self.heard < self.sealed:
            self.heard = self.sealed
            self.primary.received(self.sealed)

    @precondition(lambda self: not self.connected)
    @rule()
    def the_primary_is_declared_alone_and_finds_a_fresh_secondary(self) -> None:
        self.free, self.n_free = True, len(self.said)
        self.primary.free()
        self.check()
        self.secondary = ApartOutput(lambda _, data: self.seen.append(data), seen=self.world_has_seen)
        self.branch.clear()
        self.primary.again()
        self.sealed = self.heard = 0
        self.connected = True
        self.mutation(self)

    def teardown(self) -> None:
        """It ends with a takeover from wherever the pair is, if there is a state to take over from."""
        if not self.sealed or self.free:
            return
        if self.heard < self.sealed or self.tells_before_it_dies:
            if self.heard == self.sealed:
                self.secondary.released(self.sealed)
        else:  # it let out the epoch and did not come to tell: only a front of the same host knows
            self.one_host = True
        before = self.said[: self.n_said_at[self.sealed]]
        self.secondary.take_over(self.sealed)
        assert self.seen == before + self.branch, "each word once, in order: the state's, then the branch's"
        self.live = True
        self.the_secondary_says_something_on_its_own_branch()
        assert self.seen == before + self.branch

    # ---- the laws ----

    @invariant()
    def check(self) -> None:
        if not self.live:
            assert self.seen == self.said[: self.out()], "too early is never, and what is sealed leaves"


def find(mutation: Mutation, *, again: bool = False) -> None:
    """Let Hypothesis look for what this mutation breaks; `again`: somewhere else than the time before."""

    class Mutant(World):
        pass

    Mutant.mutation = staticmethod(mutation)
    run_state_machine_as_test(
        Mutant,
        settings=settings(
            max_examples=2000, stateful_step_count=12, phases=[Phase.generate], deadline=None,
            database=None, derandomize=not again,
            suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
        ),
    )  # fmt: skip


def test_the_world_sees_each_word_once_in_order_and_none_of_an_epoch_that_can_be_lost() -> None:
    find(lambda _: None)


def number_never_moves(world: World) -> None:
    world.primary.move = lambda _epoch: HeldOutput.move(world.primary, 1)  # type: ignore[method-assign]


def number_moves_before_the_machine_stands(world: World) -> None:
    world.primary.take = lambda: (HeldOutput.move(world.primary, world.epoch + 1), HeldOutput.take(world.primary))[1]  # type: ignore[method-assign,func-returns-value]


def received_frees_one_too_many(world: World) -> None:
    world.primary.received = lambda epoch: HeldOutput.received(world.primary, epoch + 1)  # type: ignore[method-assign]


def received_frees_one_too_few(world: World) -> None:
    world.primary.received = lambda epoch: HeldOutput.received(world.primary, epoch - 1)  # type: ignore[method-assign]


def held_from_the_start(world: World) -> None:
    if not world.primary._number:
        world.primary._number = 1


def own_branch_kept_at_a_load(world: World) -> None:
    world.secondary.loaded = lambda: None  # type: ignore[method-assign]


def newer_goes_out_at_a_takeover(world: World) -> None:
    world.secondary.take_over = lambda epoch: ApartOutput.take_over(world.secondary, epoch + 1)  # type: ignore[method-assign]


def held_is_forgotten_at_a_takeover(world: World) -> None:
    world.secondary.take_over = lambda _epoch: ApartOutput.take_over(world.secondary, 0)  # type: ignore[method-assign]


def not_sent_again_after_a_lost_connection(world: World) -> None:
    world.primary.again = lambda: None  # type: ignore[method-assign]


def kept_though_it_comes_again(world: World) -> None:
    world.secondary.lost = lambda _epoch: None  # type: ignore[method-assign]


def released_is_not_forgotten(world: World) -> None:
    world.secondary.released = lambda _epoch: None  # type: ignore[method-assign]


def what_a_front_has_shown_is_not_asked(world: World) -> None:
    world.secondary._seen = apart.nothing_seen


@pytest.mark.parametrize(
    "mutation",
    [
        number_never_moves,
        number_moves_before_the_machine_stands,
        received_frees_one_too_many,
        received_frees_one_too_few,
        held_from_the_start,
        own_branch_kept_at_a_load,
        newer_goes_out_at_a_takeover,
        held_is_forgotten_at_a_takeover,
        not_sent_again_after_a_lost_connection,
        kept_though_it_comes_again,
        released_is_not_forgotten,
        what_a_front_has_shown_is_not_asked,
    ],
)
def test_a_law_that_is_broken_is_found(mutation: Mutation) -> None:
    with pytest.raises((AssertionError, OrderError)):
        for number in range(4):  # a rare one need not come among so many examples
            find(mutation, again=number > 0)


# ---- bounds ----


def test_a_full_queue_asks_for_a_checkpoint_and_drops_nothing() -> None:
    asked: list[bool] = []
    seen: list[bytes] = []
    held = HeldOutput(
        lambda _, data: seen.append(data), limit_bytes=3 * (COST_BYTES + 10), on_full=lambda: asked.append(True)
    )
    held.move(2)
    words = [b"%010d" % n for n in range(5)]
    for n, word in enumerate(words, 1):
        held.put(CONSOLE, word)
        assert held.full == (n >= 3)
    assert asked == [True]
    held.received(2)
    assert seen == words
    assert not held.full
    assert held.held_bytes == 0


def test_it_is_known_how_long_the_oldest_piece_has_waited() -> None:
    held = HeldOutput(lambda *_: None)
    held.put(CONSOLE, b"free")
    assert held.oldest() is None
    held.move(2)
    before = time.monotonic()
    held.put(CONSOLE, b"one")
    first = held.oldest()
    assert first is not None
    assert before <= first <= time.monotonic()
    held.put(CONSOLE, b"two")
    assert held.oldest() == first
    held.received(2)
    assert held.oldest() is None


def test_a_number_never_goes_back() -> None:
    held = HeldOutput(lambda *_: None)
    held.move(5)
    with pytest.raises(OrderError, match="of epoch 5 already and can't become of epoch 4"):
        held.move(4)


def test_a_primary_can_not_fill_the_secondarys_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "ARRIVED_BYTES_MAX", 1 << 20)
    held = ApartOutput(lambda *_: None)
    piece = Piece(1, CONSOLE, 0, bytes(1 << 19))
    held.arrived(piece)
    with pytest.raises(TooLargeError, match="more than 1 MiB"):
        held.arrived(replace(piece, offset=1 << 19))
    held.released(1)
    held.arrived(piece)


def test_the_secondarys_own_output_is_bounded_by_whoever_reads_it() -> None:
    own = ApartOutput(lambda *_: None, limit_bytes=2 * (COST_BYTES + 1))
    own.put(CONSOLE, b"a")
    assert not own.full
    own.put(CONSOLE, b"b")
    assert own.full
    own.loaded()
    assert not own.full
