# SPDX-License-Identifier: Apache-2.0
"""What is measured: a case with a dirty set, and what one round of it gave."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from colocache.measure.patterns import Pattern, recorded, synthetic

# "pause" is the flush's part of a pause: seal and flush. The whole pause is standstill.py's.
CASES = ("union", "receive", "flush", "pause", "checkpoint")
SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)
RUNS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Cell:
    """What is measured. `pattern` synthetic, or a recorded workload: then share and run_pages are its own."""

    case: str
    share: float
    run_pages: int
    pattern: str = "synthetic"
    warm: bool = False

    def draw(self, n_pages: int, number: int, rng: np.random.Generator) -> Pattern:
        """A new dirty set for round `number`."""
        if self.pattern == "synthetic":
            return synthetic(n_pages, self.share, self.run_pages, rng)
        return recorded(self.pattern, number, n_pages)

    def __str__(self) -> str:
        what = f"{self.share:.3%} dirty, runs of {self.run_pages}" if self.pattern == "synthetic" else self.pattern
        return f"{self.case}, {what}{', warm' if self.warm else ''}"


@dataclass(frozen=True)
class Sample:
    """One round: nanoseconds of our way and of each baseline that there is."""

    ours_ns: int
    n_pages: int
    n_runs: int
    n_bytes: int
    guest_pages: int
    qemu_ns: int | None = None
    numpy_ns: int | None = None
    socket_ns: int | None = None
    in_place_ns: int | None = None
    peak_ns: int | None = None  # for peak_bytes
    peak_bytes: int = 0
    more: dict[str, float] = field(default_factory=dict)


def fits(cell: Cell, n_pages: int) -> bool:
    """Can a guest of this size have such a share in such runs, apart from each other? Else it is another's twin."""
    if cell.pattern != "synthetic":
        return True
    if cell.share >= 1:
        return cell.run_pages == max(RUNS)  # one run, whatever was asked for
    if cell.run_pages > n_pages or cell.share > cell.run_pages / (cell.run_pages + 1):
        return False
    wanted = cell.share * n_pages
    runs = max(1, round(wanted / cell.run_pages))
    return abs(runs * cell.run_pages - wanted) <= 0.25 * wanted
