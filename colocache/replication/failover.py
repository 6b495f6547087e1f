# SPDX-License-Identifier: Apache-2.0
"""Who may take over. A side that lost its peer asks its arbiter; only a yes lets it go on alone.

For somebody's own arbiter (a quorum disk, a third host, a fencing device): give an object with `decide`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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
    """Decides which of the two machines the world sees. May take its time; may say no."""

    def decide(self, loss: Loss) -> Verdict:
        """May the side that asks go on alone?"""
        ...


class SoloArbiter:
    """The default: there is nobody else to ask, so the answer is yes, and it says what that is worth."""

    def decide(self, loss: Loss) -> Verdict:
        """Always yes."""
        peer = "primary" if loss.role == "secondary" else "secondary"
        return Verdict(
            True,
            f"arbiter solo says yes; it cannot tell a dead {peer} from a cut link, so make sure that the other "
            f"machine of pair {loss.pair!r} does not run on",
        )


class RefusingArbiter:
    """Always no: for tests, and for a secondary that must only ever be promoted by its operator."""

    def decide(self, loss: Loss) -> Verdict:
        """Always no."""
        return Verdict(False, f"arbiter never says no: {loss.role} of pair {loss.pair!r} may not go on alone")


ARBITERS: dict[str, type[SoloArbiter] | type[RefusingArbiter]] = {"solo": SoloArbiter, "never": RefusingArbiter}
