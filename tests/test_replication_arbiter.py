# SPDX-License-Identifier: Apache-2.0
"""An arbiter whose lease may be lost at any moment: a machine that may not be seen stands still from that moment on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from toy import QUICK, TOY_BLOCKS, Pair, Running

from colocache import ArgumentError, ColocacheError, Memory, NoStateError, Phase
from colocache.replication import arbiter as arbiters
from colocache.replication.arbiter import ARBITERS, LeaseLostError, Loss, SoloArbiter, Verdict, make_arbiter

Make = Callable[..., Memory]


class Lease:
    """A test's arbiter: a lease that is lost from the `lose_at`-th time on that anybody asks for anything; 0 = never.

    It writes down whether the machine that asks runs at each call, and it may fail instead of answering.
    """

    def __init__(self, *, lose_at: int = 0, fails: str = "") -> None:
        self.calls: list[str] = []
        self.lose_at = lose_at
        self.fails = fails
        self.held = False
        self.renewed = threading.Event()

    def _call(self, name: str) -> bool:
        """Does the lease hold?"""
        self.calls.append(name)
        if name == self.fails:
            raise OSError(f"{name}: the arbiter's host is gone")
        return not self.lose_at or len(self.calls) < self.lose_at

    def acquire(self, loss: Loss) -> Verdict:
        assert loss.history
        self.held = self._call("acquire")
        return Verdict(self.held, "the lease is yours" if self.held else "somebody else has the lease")

    def fence(self, _loss: Loss) -> Verdict:
        held = self._call("fence")
        return Verdict(held, "the other one has no power" if held else "the other one can't be reached")

    def renew(self) -> Verdict:
        held = self._call("renew")
        self.renewed.set()
        return Verdict(held, "renewed" if held else "the lease is over")

    def lost(self) -> str | None:
        return None if self._call("lost") else "the lease ran out"

    def release(self) -> None:
        self.calls.append("release")
        self.held = False


def alone(make_memory: Make, folder: Path, arbiter: Lease, role: str, run_on: float = 0.5) -> tuple[Pair, Running]:
    """A pair whose link is cut for good after two checkpoints; only the side of `role` is left to ask the arbiter."""
    timing = replace(QUICK, reconnect_limit=0.1, connect_limit=0.4, run_on=run_on)
    made = Pair(make_memory(TOY_BLOCKS), folder, timing=timing)
    made.arbiter = arbiter if role == "secondary" else SoloArbiter()  # type: ignore[assignment]
    made.make_secondary()
    made.arbiter = arbiter if role == "primary" else SoloArbiter()  # type: ignore[assignment]
    made.make_primary(interval=0.05)
    primary, secondary = made.run_primary(), made.run_secondary()
    made.events_p.wait("checkpoint", 2)
    other = made.stop_s if role == "primary" else made.stop_p
    made.link.rule = lambda *_: "cut"
    made.link.cut()
    other.set()
    return made, primary if role == "primary" else secondary


def moments_of(make_memory: Make, folder: Path, role: str) -> list[str]:
    """Every call of a whole life of the arbiter, in order; the machine goes on until a renewal was seen."""
    lease = Lease()
    pair, running = alone(make_memory, folder, lease, role, run_on=0)
    try:
        assert lease.renewed.wait(30), f"no renewal among {lease.calls}"
        (pair.stop_p if role == "primary" else pair.stop_s).set()
        running.join()
        assert not lease.held, "the lease was never given back"
        return lease.calls
    finally:
        pair.close()


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_life_of_an_arbiter_is_acquire_fence_renew_release(
    make_memory: Make, tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arbiters, "RENEW_SECONDS", 0.05)
    calls = moments_of(make_memory, tmp_path, role)
    assert calls[0] == "acquire"
    assert calls[1] == "fence"
    assert "renew" in calls
    assert calls[-1] == "release"
    assert calls.count("release") == 1


@pytest.mark.parametrize("lose_at", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_lease_lost_at_any_moment_leaves_a_machine_that_stands(
    make_memory: Make, tmp_path: Path, role: str, lose_at: int
) -> None:
    """1 acquire, 2 fence, 3 the look before it is used, then the looks before and while the machine goes on."""
    lease = Lease(lose_at=lose_at)
    pair, running = alone(make_memory, tmp_path, lease, role, run_on=30.0)
    try:
        error: ColocacheError | None = None
        try:
            running.join(10)
        except ColocacheError as caught:
            error = caught
        machine = pair.pvm if role == "primary" else pair.svm
        assert not machine.running, "a machine without a lease runs"
        assert not lease.held
        if lose_at <= 3:
            # It never went on alone: no output left, and the secondary did not take over.
            assert not isinstance(error, LeaseLostError)
            assert None not in pair.released
            if role == "secondary":
                assert isinstance(error, NoStateError)
                assert pair.cache.status().phase is Phase.LIVE
        else:
            assert isinstance(error, LeaseLostError)
            assert "the lease ran out" in str(error) or "the lease is over" in str(error)
            stands = pair.events_p.all("stands") if role == "primary" else pair.events_s.all("lease_lost")
            assert len(stands) == 1
    finally:
        pair.close()


@pytest.mark.parametrize("fails", ["acquire", "fence", "lost", "renew"])
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_an_arbiter_that_cannot_answer_has_said_no(make_memory: Make, tmp_path: Path, role: str, fails: str) -> None:
    lease = Lease(fails=fails)
    pair, running = alone(make_memory, tmp_path, lease, role, run_on=30.0)
    try:
        begin = time.monotonic()
        try:
            running.join(15)
        except ColocacheError as error:
            assert f"{fails}: the arbiter's host is gone" in str(error)  # noqa: PT017 -- a primary ends without one
        assert time.monotonic() - begin < 15
        machine = pair.pvm if role == "primary" else pair.svm
        assert not machine.running
    finally:
        pair.close()


def test_arbiters_are_made_by_name_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_arbiter("solo").acquire(Loss("primary", "p", "", 1, "gone", 1.0)).yes
    assert not make_arbiter("never").acquire(Loss("primary", "p", "", 1, "gone", 1.0)).yes
    with pytest.raises(ArgumentError, match="there is no arbiter 'quorum'"):
        make_arbiter("quorum:host")
    with pytest.raises(ArgumentError, match="arbiter solo takes no arguments, and 'x' was given"):
        make_arbiter("solo:x")
    monkeypatch.setitem(ARBITERS, "named", f"{__name__}:Named")
    made = make_arbiter("named:some:where")
    assert isinstance(made, Named)
    assert made.args == "some:where"


class Named(SoloArbiter):
    """What somebody would write."""

    def __init__(self, args: str) -> None:
        super().__init__()
        self.args = args
