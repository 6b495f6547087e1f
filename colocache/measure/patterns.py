# SPDX-License-Identifier: Apache-2.0
"""Which pages are dirty: made ones of a given share and run length, and ones recorded in a real Linux guest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from colocache.errors import ArgumentError

TRACES = Path(__file__).resolve().parent / "traces"
WORKLOADS = ("sqlite", "compile", "sort", "stream", "idle")  # the busiest first

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pattern:
    """A dirty set of a guest of n_pages pages, as u64 bitmap words."""

    words: npt.NDArray[np.uint64]
    n_pages: int  # of the guest
    n_dirty: int
    n_runs: int

    @classmethod
    def of(cls, bits: Bits) -> Pattern:
        """From one bool per page."""
        padded = np.zeros(-(-bits.size // 64) * 64, np.uint8)
        padded[: bits.size] = bits
        words = np.packbits(padded, bitorder="little").view(np.uint64)
        starts = int(np.count_nonzero(bits[1:] & ~bits[:-1])) + int(bits[0])
        return cls(words, bits.size, int(np.count_nonzero(bits)), starts)

    @property
    def bits(self) -> Bits:
        """One bool per page."""
        return np.unpackbits(self.words.view(np.uint8), bitorder="little", count=self.n_pages).astype(np.bool_)

    @property
    def share(self) -> float:
        return self.n_dirty / self.n_pages

    @property
    def mean_run(self) -> float:
        """Mean length of a run in pages; 0 of nothing."""
        return self.n_dirty / self.n_runs if self.n_runs else 0.0


def synthetic(n_pages: int, share: float, run_pages: int, rng: np.random.Generator) -> Pattern:
    """Runs of exactly run_pages pages, apart from each other, at random places, together `share` of the guest.

    Where that leaves no room for gaps, fewer and longer runs take their place; a share of 1 is one run.
    At least one run is dirty. ArgumentError for a share outside 0 to 1, or a run longer than the guest.
    """
    if not 0 <= share <= 1 or not 1 <= run_pages <= n_pages:
        raise ArgumentError(f"a share of {share} in runs of {run_pages} pages of a guest of {n_pages} pages")
    bits = np.zeros(n_pages, np.bool_)
    wanted = round(share * n_pages)
    if wanted >= n_pages:
        bits[:] = True
        return Pattern.of(bits)
    if share == 0:
        return Pattern.of(bits)
    n_runs = max(1, round(wanted / run_pages))
    clean = n_pages - n_runs * run_pages
    # Each run but the last must have a clean page behind it: the rest of the clean pages fall anywhere between.
    n_runs = min(n_runs, max(1, (n_pages + 1) // (run_pages + 1)))
    clean = n_pages - n_runs * run_pages
    free = clean - (n_runs - 1)
    gaps = np.sort(rng.integers(0, free + 1, n_runs))
    starts = gaps + np.arange(n_runs) * (run_pages + 1)
    bits[(starts[:, None] + np.arange(run_pages)).ravel()] = True
    return Pattern.of(bits)


@cache
def _recorded(workload: str) -> npt.NDArray[np.uint8]:
    if workload not in WORKLOADS:
        raise ArgumentError(f"workload is {workload!r}, recorded are {', '.join(WORKLOADS)}")
    with np.load(TRACES / f"{workload}.npz") as arrays:
        changed: npt.NDArray[np.uint8] = arrays["changed"]
    return changed


def n_intervals(workload: str) -> int:
    """How many intervals were recorded."""
    return int(_recorded(workload).shape[0])


def recorded(workload: str, interval: int, n_pages: int) -> Pattern:
    """One interval (counted round) of a Linux guest of 512 MiB; tiled over a larger guest.

    A smaller guest gets the part of its size that is dirtiest.
    """
    changed = _recorded(workload)
    bits = np.unpackbits(changed[interval % changed.shape[0]], bitorder="little").astype(np.bool_)
    if n_pages < bits.size:
        parts = bits[: bits.size // n_pages * n_pages].reshape(-1, n_pages)
        bits = parts[np.count_nonzero(parts, axis=1).argmax()]
    return Pattern.of(np.resize(bits, n_pages))
