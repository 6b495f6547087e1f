# SPDX-License-Identifier: Apache-2.0
"""Console input by its laws: what the world types, in every order of events, comes to the machine that it sees once and
in order, whoever dies. An oracle of a few bytes, and a mutant of each law, which the same machine must find."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from qemu_support import wait_until

from colocache.errors import PeerLostError, TooLargeError
from colocache.outputs import typed
from colocache.outputs.typed import KEPT_BYTES_MAX, TypedInput

Mutation = Callable[["World"], None]
ROOM = 12  # of a machine's socket


class Console:
    """A machine's: what it was given waits in a socket until its devices take it in."""

    def __init__(self) -> None:
        self.waits = b""
        self.taken = b""

    def give(self, data: bytes) -> int:
        n_bytes = max(0, min(len(data), ROOM - len(self.waits)))
        self.waits += data[:n_bytes]
        return n_bytes

    def take_back(self) -> bytes:
        back, self.waits = self.waits, b""
        return back

    def take_in(self, n_bytes: int) -> None:
        self.taken += self.waits[:n_bytes]
        self.waits = self.waits[n_bytes:]


class World(RuleBasedStateMachine):
    """Somebody types 1, 2, 3 ... at a primary's console; the oracle knows what each state has taken in."""

    mutation: Mutation = staticmethod(lambda _world: None)

    def __init__(self) -> None:
        super().__init__()
        self.typed = b""
        self.counter = 0
        self.machine = Console()
        self.primary = TypedInput(live=True, limit_bytes=40)
        self.primary._give, self.primary._take_back = self.machine.give, self.machine.take_back
        self.wire: list[tuple[int, int, bytes]] = []  # epoch, offset or mark, bytes
        self.taken_in_by = {0: b""}
        self.epoch, self.sealed = 1, 0
        self.connected = True
        self.fresh()
        self.mutation(self)
        self.primary.again(self.pass_on)

    def fresh(self) -> None:
        self.secondary, self.other = TypedInput(), Console()
        self.secondary._give, self.secondary._take_back = self.other.give, self.other.take_back

    def pass_on(self, offset: int, data: bytes) -> None:
        if not self.connected:
            raise PeerLostError("the link was cut")
        self.wire.append((0, offset, data))

    # ---- the machines run ----

    @rule()
    def somebody_types(self) -> None:
        word = b"%d " % (self.counter + 1)
        if self.primary.room >= len(word):
            self.counter += 1
            self.typed += word
            self.primary.put(word)

    @rule(n_bytes=st.integers(1, 9))
    def the_machine_takes_some_in(self, n_bytes: int) -> None:
        self.machine.take_in(n_bytes)
        self.primary.push()

    @rule()
    def what_is_on_its_way_comes(self) -> None:
        wire, self.wire = self.wire, []
        for epoch, number, data in wire:
            if epoch:
                self.secondary.taken_in(epoch, number)
            else:
                self.secondary.arrived(number, data)

    # ---- a checkpoint, which may end anywhere ----

    @precondition(lambda self: self.connected)
    @rule(ends=st.sampled_from(["given up", "cut before the seal", "cut after the seal", "heard"]),
          types=st.integers(0, 2))  # fmt: skip
    def a_checkpoint(self, ends: str, types: int) -> None:
        epoch, self.epoch = self.epoch, self.epoch + 1
        self.primary.stand()
        self.taken_in_by[epoch] = self.machine.taken
        for _ in range(types):
            self.somebody_types()
        self.wire.append((epoch, self.primary.mark, b""))
        self.primary.in_flight(epoch)
        if ends == "cut before the seal":
            self.wire.clear()
            self.connected = False
        else:
            self.what_is_on_its_way_comes()
        if ends.startswith(("cut after", "heard")):
            self.sealed = epoch
            self.secondary.sealed(epoch)
            self.connected = ends == "heard"
        if ends == "heard":
            self.primary.received(epoch)
        self.heard = ends == "heard"
        self.primary.run()

    # ---- the connection ----

    @precondition(lambda self: self.epoch > 1)
    @rule()
    def the_connection_is_lost_and_they_meet_again(self) -> None:
        self.wire.clear()
        self.connected = True
        self.epoch += 1
        if self.sealed in self.primary._marks:  # it was sealed, and nobody heard
            self.primary.received(self.sealed)
        self.primary.again(self.pass_on)

    @precondition(lambda self: not self.connected)
    @rule()
    def the_primary_is_declared_alone_and_finds_a_fresh_secondary(self) -> None:
        self.wire.clear()
        self.primary.free()
        self.fresh()
        self.sealed = 0
        self.connected = True
        self.mutation(self)
        self.primary.again(self.pass_on)

    def teardown(self) -> None:
        """It ends with the primary's death and a takeover, if there is a state to take over from."""
        if not self.sealed or not self.connected:
            return
        self.what_is_on_its_way_comes()  # the link lives on until all that was said is heard
        before = self.taken_in_by[self.sealed]
        self.secondary.take_over(self.sealed)
        while self.other.waits:
            self.other.take_in(5)
            self.secondary.push()
        assert before + self.other.taken == self.typed, "each byte once, in order: the state's, then what was kept"
        self.secondary.put(b"more")
        self.other.take_in(9)
        assert before + self.other.taken == self.typed + b"more"

    # ---- the laws ----

    @invariant()
    def the_machine_that_the_world_sees_gets_all_of_it_in_order(self) -> None:
        assert self.typed.startswith(self.machine.taken + self.machine.waits)
        assert self.other.taken + self.other.waits == b"", "the other gets nothing"


def find(mutation: Mutation, *, again: bool = False) -> None:
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


def test_what_is_typed_comes_to_the_machine_that_the_world_sees_once_and_in_order() -> None:
    find(lambda _: None)


def nothing_is_taken_back_before_the_state_is_saved(world: World) -> None:
    world.primary._take_back = bytes


def given_while_it_stands(world: World) -> None:
    world.primary.stand = lambda: (TypedInput.stand(world.primary), TypedInput.run(world.primary))[0]  # type: ignore[func-returns-value,method-assign]


def the_secondary_is_not_told_what_was_taken_in(world: World) -> None:
    world.secondary.taken_in = lambda *_: None  # type: ignore[method-assign]


def forgotten_before_the_seal(world: World) -> None:
    world.secondary.taken_in = lambda _epoch, n_bytes: world.secondary._forget(n_bytes)  # type: ignore[method-assign]


def received_forgets_one_too_many(world: World) -> None:
    world.primary.received = lambda epoch: (  # type: ignore[method-assign]
        TypedInput.received(world.primary, epoch), world.primary._forget(world.primary._start + 1)
    )[0]  # type: ignore[func-returns-value]  # fmt: skip


def not_kept(world: World) -> None:
    world.primary.in_flight = lambda epoch: (  # type: ignore[method-assign]
        TypedInput.in_flight(world.primary, epoch), setattr(world.primary, "_kept", False)
    )[0]  # type: ignore[func-returns-value]  # fmt: skip


def not_passed_on(world: World) -> None:
    world.primary.again = lambda _: None  # type: ignore[method-assign]


def not_passed_on_again(world: World) -> None:
    told = [False]

    def again(pass_on: typed.PassOn) -> None:
        passed = world.primary._passed
        TypedInput.again(world.primary, pass_on if not told[0] else None)
        told[0], world.primary._pass_on, world.primary._passed = True, pass_on, passed

    world.primary.again = again  # type: ignore[method-assign,assignment]


def what_comes_again_is_kept_again(world: World) -> None:
    world.secondary.arrived = lambda _offset, data: world.secondary._data.extend(data)  # type: ignore[method-assign]


def a_gap_is_not_noticed(world: World) -> None:
    """Of a secondary that came late: what was taken in before it came is none of its."""
    arrived = world.secondary.arrived
    world.secondary.arrived = lambda offset, data: arrived(min(offset, len(world.secondary._data)), data)  # type: ignore[method-assign]


def all_that_is_kept_is_given_at_a_takeover(world: World) -> None:
    world.secondary.received = lambda _epoch: None  # type: ignore[method-assign]


def the_other_machine_is_given_it_too(world: World) -> None:
    world.secondary.arrived = lambda offset, data: (  # type: ignore[method-assign]
        TypedInput.arrived(world.secondary, offset, data), world.other.give(data)
    )[0]  # type: ignore[func-returns-value]  # fmt: skip


@pytest.mark.parametrize(
    "mutation",
    [
        nothing_is_taken_back_before_the_state_is_saved,
        given_while_it_stands,
        the_secondary_is_not_told_what_was_taken_in,
        forgotten_before_the_seal,
        received_forgets_one_too_many,
        not_kept,
        not_passed_on,
        not_passed_on_again,
        what_comes_again_is_kept_again,
        a_gap_is_not_noticed,
        all_that_is_kept_is_given_at_a_takeover,
        the_other_machine_is_given_it_too,
    ],
)
def test_a_law_of_input_that_is_broken_is_found(mutation: Mutation) -> None:
    with pytest.raises(AssertionError):
        for number in range(4):  # a rare one need not come among so many examples
            find(mutation, again=number > 0)


# ---- bounds ----


def test_a_guest_that_takes_nothing_leaves_the_rest_in_the_clients_socket() -> None:
    asked: list[bool] = []
    machine = Console()
    one = TypedInput(live=True, limit_bytes=20, on_full=lambda: asked.append(True))
    one.plug(machine.give, machine.take_back)
    one.in_flight(1)
    one.put(b"x" * 19)
    assert (one.room, asked) == (1, [])
    one.put(b"y")
    assert (one.room, asked, machine.waits) == (0, [True], b"x" * ROOM)
    machine.take_in(ROOM)
    wait_until(lambda: machine.waits == b"xxxxxxxy")  # tried again without anybody asking
    one.stand()
    one.in_flight(2)
    one.run()
    one.received(2)
    assert one.room == ROOM
    one.close()
    assert not any(thread.name == "colocache-typed" for thread in threading.enumerate())


def test_a_machine_that_the_world_does_not_see_has_no_room() -> None:
    assert TypedInput().room == 0


def test_a_primary_can_not_fill_the_secondarys_memory_with_input() -> None:
    kept = TypedInput()
    kept.arrived(0, bytes(KEPT_BYTES_MAX))
    kept.arrived(KEPT_BYTES_MAX, bytes(KEPT_BYTES_MAX))
    with pytest.raises(TooLargeError, match="more than 128 KiB"):
        kept.arrived(2 * KEPT_BYTES_MAX, b"1")
