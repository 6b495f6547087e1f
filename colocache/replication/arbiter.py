# SPDX-License-Identifier: Apache-2.0
"""Who may go on alone. A side that lost its peer asks its arbiter, and runs on only as long as the arbiter lets it.

An arbiter has a life on each side:

    acquire(loss)   after the loss: may this side go on alone? A yes is a lease, for good or for a while.
    fence(loss)     after acquire said yes and before the machine is the one the world sees: see to it that the other
                    one can't be. A no here is a no.
    renew()         now and then, as long as this machine is the only one.
    lost()          asked often: None while the lease holds, else why it does not; then the machine stands at once.
    release()       when this side goes on alone no longer: it ends, or the pair is in step again. Never raises.

A new one is a file with a class and a line in `ARBITERS`; its constructor takes what stands after the colon in
`--arbiter NAME:ARGS`. An exception out of acquire, fence or renew counts as a no: see `Leave`, which both sides use.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from colocache.errors import ArgumentError, ColocacheError

RENEW_SECONDS = 1.0  # between two renewals


@dataclass(frozen=True)
class Loss:
    """What the side that asks knows about the loss of its peer.

    An arbiter that said yes to a primary with (history, epoch) must say no to a secondary of that history whose epoch
    is not newer: it is the one that was declared lost. A secondary with a newer epoch is in step again. That is why
    a primary gives the newest number it has used: the secondary may have sealed the epoch in flight.
    """

    role: str  # of the side that asks: "primary" or "secondary"
    pair: str
    history: str  # of the secondary's region, in hexadecimal; "" if the primary was never paired
    epoch: int  # of a secondary: the newest it has sealed; of a primary: the newest number it has used
    cause: str  # one sentence
    seconds: float  # since the peer was last heard


@dataclass(frozen=True)
class Verdict:
    """The arbiter's answer, with the sentence that people will read in the log."""

    yes: bool
    sentence: str


class Arbiter(Protocol):
    """Decides which of the two machines the world sees. `acquire`, `fence` and `renew` may take their time, `lost` not.

    One thread at a time.
    """

    def acquire(self, loss: Loss) -> Verdict:
        """May the side that asks go on alone?"""
        ...

    def fence(self, loss: Loss) -> Verdict:
        """Is it certain now that the other machine can't be seen by the world?"""
        ...

    def renew(self) -> Verdict:
        """May it go on?"""
        ...

    def lost(self) -> str | None:
        """Why this side may not go on any more; None: it may."""
        ...

    def release(self) -> None:
        """This side does not go on alone any longer."""
        ...


class SoloArbiter:
    """The default: there is nobody else to ask, so the answer is yes, and it says what that is worth."""

    def __init__(self, args: str = "") -> None:
        _no_arguments("solo", args)

    def acquire(self, loss: Loss) -> Verdict:
        """Always yes."""
        peer = "primary" if loss.role == "secondary" else "secondary"
        return Verdict(
            True,
            f"arbiter solo says yes; it cannot tell a dead {peer} from a cut link, so make sure that the other "
            f"machine of pair {loss.pair!r} does not run on",
        )

    def fence(self, _loss: Loss) -> Verdict:
        """It can't, and acquire said so."""
        return Verdict(True, "arbiter solo fences nobody")

    def renew(self) -> Verdict:
        """Always yes."""
        return Verdict(True, "arbiter solo says yes")

    def lost(self) -> str | None:
        """Never."""
        return None

    def release(self) -> None:
        """Nothing to give back."""


class NeverArbiter(SoloArbiter):
    """Always no: for tests, and for a secondary that must only ever be promoted by its operator."""

    def __init__(self, args: str = "") -> None:
        _no_arguments("never", args)

    def acquire(self, loss: Loss) -> Verdict:
        """Always no."""
        return Verdict(False, f"arbiter never says no: {loss.role} of pair {loss.pair!r} may not go on alone")


# By name; the class is loaded when it is asked for.
ARBITERS = {
    "solo": "colocache.replication.arbiter:SoloArbiter",
    "never": "colocache.replication.arbiter:NeverArbiter",
}


def make_arbiter(text: str) -> Arbiter:
    """The arbiter that `NAME` or `NAME:ARGS` names. ArgumentError: there is none, or it does not take these ARGS."""
    name, _, args = text.partition(":")
    if name not in ARBITERS:
        raise ArgumentError(f"there is no arbiter {name!r}", hint=f"give {', '.join(ARBITERS)}")
    module, kind = ARBITERS[name].split(":")
    made: Arbiter = getattr(importlib.import_module(module), kind)(args)
    return made


def _no_arguments(name: str, args: str) -> None:
    if args:
        raise ArgumentError(f"arbiter {name} takes no arguments, and {args[:100]!r} was given")


class LeaseLostError(ColocacheError):
    """The arbiter let this machine go on alone and does so no longer: it stands still."""


class Leave:
    """One side's leave to go on alone, from the loss of its peer on.

    What an arbiter raises counts as a no, so that one that can't be reached never lets two machines be seen.
    """

    def __init__(self, arbiter: Arbiter) -> None:
        self._arbiter = arbiter
        self._held = False
        self._renewed = 0.0

    def take(self, loss: Loss) -> Verdict:
        """Acquire, fence, and look whether the lease still holds. Only a yes lets the machine be seen."""
        verdict = _asked(lambda: self._arbiter.acquire(loss), "acquire")
        if not verdict.yes:
            return verdict
        self._held, self._renewed = True, time.monotonic()
        fenced = _asked(lambda: self._arbiter.fence(loss), "fence")
        if not fenced.yes:
            self.give_back()
            return fenced
        why = self._why_lost()
        if why is not None:
            self.give_back()
            return Verdict(False, f"the lease was lost before it was used: {why}")
        return verdict

    def check(self) -> None:
        """May it still go on? Renews when it is time. LeaseLostError: no, stand still at once."""
        if not self._held:
            return
        why = self._why_lost()
        if why is None and time.monotonic() - self._renewed >= RENEW_SECONDS:
            self._renewed = time.monotonic()
            verdict = _asked(self._arbiter.renew, "renew")
            why = self._why_lost() if verdict.yes else verdict.sentence
        if why is not None:
            self.give_back()
            raise LeaseLostError(f"this machine may not go on alone any more: {why}")

    def give_back(self) -> None:
        """It goes on alone no longer."""
        if self._held:
            self._held = False
            self._arbiter.release()

    def _why_lost(self) -> str | None:
        try:
            return self._arbiter.lost()
        except Exception as error:  # noqa: BLE001 -- an arbiter that can't say is one that says no
            return f"the arbiter can't say whether it may: {type(error).__name__}: {error}"


def _asked(question: Callable[[], Verdict], what: str) -> Verdict:
    try:
        return question()
    except Exception as error:  # noqa: BLE001 -- see Leave
        return Verdict(False, f"the arbiter failed to {what}: {type(error).__name__}: {error}")
