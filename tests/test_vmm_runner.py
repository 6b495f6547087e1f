# SPDX-License-Identifier: Apache-2.0
"""The thread that runs a guest keeps its word: stop is bounded, death is told, the rate is kept, nothing is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from colocache.vmm import runner
from colocache.vmm.errors import MachineError
from colocache.vmm.mailbox import Mailbox
from colocache.vmm.runner import GuestThread

Make = Callable[..., GuestThread]


class FakeGuest:
    """A program in Python: a step a millisecond."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.kicked = threading.Event()
        self.entered = threading.Event()

    def enter(self) -> None:
        self.entered.set()
        box = self.mailbox.box
        while not box.stop and box.step != box.limit:
            box.step += 1
            time.sleep(0.001)

    def kick(self) -> None:
        self.kicked.set()


@pytest.fixture
def guest() -> FakeGuest:
    return FakeGuest()


@pytest.fixture
def make(guest: FakeGuest) -> Iterator[Make]:
    made = []

    def thread(enter: Callable[[], None] = guest.enter, rate: float = 0) -> GuestThread:
        made.append(GuestThread(guest.mailbox, enter, guest.kick, rate, "test guest"))
        return made[-1]

    yield thread
    for one in made:
        assert one.end()


@pytest.mark.parametrize("rate", [0, 5, 300, 1e9])
def test_go_and_stop_again_and_again(make: Make, guest: FakeGuest, rate: float) -> None:
    thread = make(rate=rate)
    for round_number in range(20):
        thread.go()
        thread.go()  # runs already
        if round_number % 2:
            time.sleep(0.003)
        thread.stop()
        at = guest.mailbox.box.step
        thread.stop()  # stands already
        time.sleep(0.003)
        assert guest.mailbox.box.step == at


def test_a_guest_with_a_rate_does_not_run_ahead_of_it(make: Make, guest: FakeGuest) -> None:
    thread = make(rate=50)
    begin = time.monotonic()
    thread.go()
    while guest.mailbox.box.step < 5:
        time.sleep(0.001)
    thread.stop()
    assert guest.mailbox.box.step <= 1 + (time.monotonic() - begin) * 50


def test_a_pause_costs_a_guest_with_a_rate_no_work(
    make: Make, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was due when it stood is done when it runs again."""
    monkeypatch.setattr(runner, "SLICE", 3600.0)  # one step, then nothing until it is stopped
    thread = make(rate=400)
    thread.go()
    while not guest.mailbox.box.step:
        time.sleep(0.001)
    time.sleep(0.05)  # of which 20 steps are due
    thread.stop()
    assert guest.mailbox.box.step == 1
    thread.go()
    deadline = time.monotonic() + 30
    while guest.mailbox.box.step < 20 and time.monotonic() < deadline:
        time.sleep(0.001)
    thread.stop()
    assert guest.mailbox.box.step >= 20


class Clock:
    """Stands instead of `time`: it moves when a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_guest_that_fell_far_behind_does_not_make_up_for_it_after_the_next_pause_either(
    make: Make, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds pass within its first step; the clock stands still before and after."""
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    box = guest.mailbox.box
    asked: list[int] = []  # steps, each time that it runs

    def enter() -> None:
        clock.now += 10.0 if not asked else 0.0
        asked.append(int(box.limit) - int(box.step))
        box.step = box.limit

    thread = make(enter, rate=100)
    for stops in (2, 3):
        thread.go()
        while len(asked) < stops:
            time.sleep(0.001)
        thread.stop()
    assert asked == [1, 1, 1]


def test_a_guest_that_dies_is_told_with_its_reason_and_never_waited_for(make: Make) -> None:
    def die() -> None:
        raise MachineError("exit reason 8 (shutdown)")

    thread = make(die)
    thread.go()
    while thread.failure is None:
        time.sleep(0.001)
    with pytest.raises(MachineError, match="no longer runs: exit reason 8"):
        thread.stop()
    assert thread.failure == "exit reason 8 (shutdown)"
    for what in (thread.go, thread.stop):
        with pytest.raises(MachineError, match="exit reason 8"):
            what()


def test_a_guest_that_does_not_come_out_is_kicked_and_comes(make: Make, guest: FakeGuest) -> None:
    def deaf() -> None:
        guest.entered.set()
        guest.kicked.wait()
        guest.enter()

    thread = make(deaf)
    thread.go()
    guest.entered.wait()
    thread.stop()
    assert guest.kicked.is_set()
    assert thread.failure is None


def test_a_guest_that_never_comes_out_is_given_up_in_bounded_time(
    make: Make, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PATIENCE", 0.1)
    let_go = threading.Event()

    def stuck() -> None:
        guest.entered.set()
        let_go.wait()

    thread = make(stuck)
    thread.go()
    guest.entered.wait()
    with pytest.raises(MachineError, match=r"no step boundary within 0\.1 s"):
        thread.stop()
    assert not thread.end()
    let_go.set()


def test_end_stops_a_running_guest(guest: FakeGuest) -> None:
    thread = GuestThread(guest.mailbox, guest.enter, guest.kick, 0, "test guest")
    thread.go()
    guest.entered.wait()
    assert thread.end()
    assert not thread.alive
