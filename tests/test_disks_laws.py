# SPDX-License-Identifier: Apache-2.0
"""The disks of a pair by their laws: both halves, on real files, in every order of events against an oracle of a few
bytes; and a mutant of each law, which the same machine must find."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from colocache import Attachment
from colocache.disks.apart import ApartDisks, NoDisks, open_disks
from colocache.disks.mirrored import MirroredDisks
from colocache.disks.write import Kind, Total, Write, unpack
from colocache.errors import CorruptError, IncompleteError, PeerLostError

SIZES = (192 << 10, 96 << 10)
UNIT = 8 << 10
Mutation = Callable[["World"], None]


def check_same(found: bytes | bytearray, expected: bytes | bytearray) -> None:
    """Without pytest's own account of how they differ, which takes minutes, many times in a run."""
    if found != expected:
        raise AssertionError("not the disk that it must be")


class World(RuleBasedStateMachine):
    """A primary that writes, a secondary that seals and dies. `truth`: what the disk was when each epoch was sealed."""

    mutation: Mutation = staticmethod(lambda _world: None)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.paths = [str(Path(self.folder.name) / f"disk{n}") for n in range(len(SIZES))]
        for path, size in zip(self.paths, SIZES, strict=True):
            Path(path).write_bytes(bytes(size))
        self.disk = [bytearray(size) for size in SIZES]  # the primary's
        self.primary = MirroredDisks(SIZES)
        self.spoil: Callable[[ApartDisks], None] = lambda _: None
        type(self).mutation(self)
        self.secondary = self.opened()
        self.record = (0, Attachment())  # what shared memory says: newest sealed epoch, its log
        self.committed = True
        self.truth = [bytes(one) for one in self.disk]
        self.connected = False
        self.whole = False  # all of the disk was sent once
        self.flying: list[bytes] | None = None  # sent whole, and nobody told the primary what became of it
        self.numbers = random.Random(1)

    def teardown(self) -> None:
        self.secondary.close()
        self.folder.cleanup()

    def opened(self) -> ApartDisks:
        found = open_disks(self.paths, self.folder.name, "test")
        assert not isinstance(found, NoDisks)
        self.spoil(found)
        return found

    # ---- what happens ----

    @rule(
        disk=st.integers(0, 1),
        at=st.integers(0, 31),
        units=st.integers(1, 3),
        kind=st.sampled_from([Kind.WRITE, Kind.WRITE, Kind.ZERO]),
    )
    def write(self, disk: int, at: int, units: int, kind: Kind) -> None:
        offset = at * UNIT % SIZES[disk]
        length = min(units * UNIT, SIZES[disk] - offset)
        data = self.numbers.randbytes(length) if kind is Kind.WRITE else b""
        self.primary.write(Write(disk, kind, offset, length, data))
        self.disk[disk][offset : offset + length] = data or bytes(length)

    @precondition(lambda self: not self.connected)
    @rule()
    def meet(self) -> None:
        """A connection: everything, if nothing is sealed; else what is unacked, read from the disk as it is now."""
        sealed, _ = self.record
        if self.flying is not None and self.truth == self.flying and sealed:
            self.primary.received()
        else:
            self.primary.give_up()
        self.flying = None
        self.secondary.lost()
        self.primary.connect(self.carry)
        self.connected = True
        for number, disk in enumerate(self.disk):
            blocks = self.primary.unacked_runs(number) if sealed else [(0, len(disk))]
            for offset, length in blocks:
                self.primary.send_again(number, offset, length, lambda at, n, disk=disk: disk[at : at + n])  # type: ignore[misc]

    def carry(self, write: Write) -> None:
        if not self.connected:
            raise PeerLostError("the link is dead")
        self.secondary.come(write.pack())

    @rule(chance=st.integers(0, 3))
    def lose_the_link(self, chance: int) -> None:
        if not chance:
            self.connected = False

    @precondition(lambda self: self.connected)
    @rule(fate=st.sampled_from(["done", "done", "done", "aborted", "heard late", "never sealed", "killed", "torn"]))
    def checkpoint(self, fate: str) -> None:
        self.primary.stopping(True)
        total = self.primary.in_flight()
        state = [bytes(one) for one in self.disk]
        self.secondary.told(total)
        if fate == "aborted":
            self.primary.give_up()
        elif fate == "never sealed":
            self.flying, self.connected = state, False
        else:
            attachment = self.secondary.sealing()
            self.record = (self.record[0] + 1, attachment)
            self.truth, self.committed = state, False
            if fate in ("done", "heard late"):
                self.secondary.sealed()
                self.secondary.apply()
                self.committed = True
                if fate == "done":
                    self.primary.received()
                else:
                    self.flying, self.connected = state, False
            else:
                self.flying, self.connected = state, False
                if fate == "torn":
                    self.secondary.sealed()
                    self.tear()
                self.attach()
        self.primary.stopping(False)

    def tear(self) -> None:
        """Half of the log is applied."""
        log = self.secondary.sealed_log
        for n, write in enumerate(log.read(log.extent, SIZES)):
            if n % 2:
                self.secondary.images[write.disk].apply(write)

    @rule(chance=st.integers(0, 3))
    def kill_the_secondary(self, chance: int) -> None:
        """Between two checkpoints. One that held nothing is fresh again."""
        if not chance:
            self.connected = False
            self.attach()

    def attach(self) -> None:
        self.secondary.close()
        self.secondary = self.opened()
        self.secondary.attach(*self.record)
        self.committed = True

    # ---- what always holds ----

    @invariant()
    def the_image_is_the_disk_of_the_committed_epoch(self) -> None:
        if self.record[0] and self.committed:
            for path, truth in zip(self.paths, self.truth, strict=True):
                check_same(Path(path).read_bytes(), truth)

    @invariant()
    def what_differs_from_the_sealed_epoch_is_unacked(self) -> None:
        if not self.record[0] or self.flying is not None:
            return
        for number, (disk, truth) in enumerate(zip(self.disk, self.truth, strict=True)):
            known = bytearray(truth)
            for offset, length in self.primary.unacked_runs(number):
                known[offset : offset + length] = disk[offset : offset + length]
            check_same(known, disk)


def run(mutation: Mutation, *, examples: int) -> None:
    machine = type("Mutated", (World,), {"mutation": staticmethod(mutation)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_order_of_events_keeps_image_and_epoch_together() -> None:
    run(lambda _: None, examples=int(os.environ.get("COLOCACHE_TEST_EXAMPLES", "400")))


def applied_before_the_seal(world: World) -> None:
    """What comes goes to the image at once."""

    def spoil(disks: ApartDisks) -> None:
        real = disks.come

        def come(body: bytes) -> None:
            real(body)
            write = unpack(body, SIZES)
            disks.images[write.disk].apply(write)

        disks.come = come  # type: ignore[method-assign]

    world.spoil = spoil


def never_applied(world: World) -> None:
    """An attach, or whoever calls the epoch committed, forgets the log."""

    def spoil(disks: ApartDisks) -> None:
        disks.apply = lambda: None  # type: ignore[method-assign]

    world.spoil = spoil


def without_the_aborted_epochs_writes(world: World) -> None:
    """An epoch that is given up takes its writes with it."""
    real = world.primary.give_up

    def give_up() -> None:
        if world.connected:
            world.secondary.open.empty()
        real()

    world.primary.give_up = give_up  # type: ignore[method-assign]


def the_older_log_once_more(world: World) -> None:
    """The log of the epoch before is applied after the newer one."""

    def spoil(disks: ApartDisks) -> None:
        older: list[Write] = []
        sealed, apply = disks.sealed, disks.apply

        def sealed_and_kept() -> None:
            log = disks.sealed_log
            older[:] = log.read(log.extent, SIZES)
            sealed()

        def applied_twice() -> None:
            apply()
            for write in older:
                disks.images[write.disk].apply(write)

        disks.sealed, disks.apply = sealed_and_kept, applied_twice  # type: ignore[method-assign]

    world.spoil = spoil


def the_other_log_is_named(world: World) -> None:
    """The record names the log that is not the epoch's."""

    def spoil(disks: ApartDisks) -> None:
        real = disks.sealing

        def sealing() -> Attachment:
            found = real()
            return replace(found, slot=1 - found.slot)

        disks.sealing = sealing  # type: ignore[method-assign]

    world.spoil = spoil


def forgets_unacked_when_an_epoch_fails(world: World) -> None:
    real = world.primary.give_up

    def give_up() -> None:
        for flight in world.primary._flight:
            flight.clear()
        real()

    world.primary.give_up = give_up  # type: ignore[method-assign]


def forgets_what_was_written_since(world: World) -> None:
    """RECEIVED(N) clears what was written after N, too."""
    real = world.primary.received

    def received() -> None:
        for unacked in world.primary._unacked:
            unacked.clear()
        real()

    world.primary.received = received  # type: ignore[method-assign]


def counts_on_over_connections(world: World) -> None:
    def spoil(disks: ApartDisks) -> None:
        disks.lost = lambda: None  # type: ignore[method-assign]

    world.spoil = spoil


MUTANTS = (
    applied_before_the_seal,
    never_applied,
    without_the_aborted_epochs_writes,
    the_older_log_once_more,
    the_other_log_is_named,
    forgets_unacked_when_an_epoch_fails,
    forgets_what_was_written_since,
    counts_on_over_connections,
)


@pytest.mark.parametrize("mutation", MUTANTS)
def test_a_pair_that_breaks_a_law_is_found(mutation: Mutation) -> None:
    with pytest.raises((AssertionError, IncompleteError, CorruptError)):
        run(mutation, examples=3000)


def test_a_count_that_does_not_fit_seals_nothing() -> None:
    world = World()
    try:
        world.meet()
        world.write(0, 1, 1, Kind.WRITE)
        for told in (Total(), Total(1, 1)):
            world.secondary.told(told)
            with pytest.raises(IncompleteError, match=r"writes of \d+ bytes"):
                world.secondary.sealing()
    finally:
        world.teardown()
