# SPDX-License-Identifier: Apache-2.0
"""Times, their percentiles, and the machine's noise."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from colocache.errors import ArgumentError

MIN_ROUNDS = 3  # of fewer, neither a spread nor a verdict is told


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
    """p10, p50 and p90 of some rounds. Of fewer than MIN_ROUNDS there is only the median: p10 and p90 are NaN."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < MIN_ROUNDS:
            return cls(math.nan, median(values), math.nan)
        return cls(quantile(values, 0.1), median(values), quantile(values, 0.9))

    @property
    def known(self) -> bool:
        return not math.isnan(self.p10)

    @property
    def width(self) -> float:
        """How far p10 and p90 are apart, as a share of the median; 0 of nothing, NaN if not known."""
        return (self.p90 - self.p10) / self.p50 if self.p50 else 0.0

    def to_json(self) -> dict[str, float | None]:
        """Three numbers, those not known as None."""
        return {name: None if math.isnan(value) else value for name, value in self.__dict__.items()}
