# SPDX-License-Identifier: Apache-2.0
"""Times, their percentiles, and the machine's noise."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from colocache.errors import ArgumentError


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of all lie, between two where it falls between. ArgumentError for none."""
    if not values:
        raise ArgumentError("a quantile of no values")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Spread:
    """p10, p50 and p90 of some rounds."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(quantile(values, 0.1), median(values), quantile(values, 0.9))

    @property
    def width(self) -> float:
        """How far p10 and p90 are apart, as a share of the median; 0 of nothing."""
        return (self.p90 - self.p10) / self.p50 if self.p50 else 0.0

    def scaled(self, factor: float) -> dict[str, float]:
        """For JSON."""
        return {"p10": self.p10 * factor, "p50": self.p50 * factor, "p90": self.p90 * factor}
