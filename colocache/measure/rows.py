# SPDX-License-Identifier: Apache-2.0
"""The rounds of a cell as one row: medians, spread, share of peak, times the baseline, and whether to believe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from colocache.measure.cells import Cell, Sample
from colocache.measure.clock import MIN_ROUNDS, Spread

PEAK_LIMIT = 1.03  # of peak: above it, something was measured wrongly
BASELINES = ("qemu", "socket", "in_place", "numpy")  # the first that there is gives baseline_ratio


@dataclass(frozen=True)
class Row:
    """A cell, measured. The first eleven fields are those of `bench --json`; ratios are medians of each round's own."""

    case: str
    backing: str
    strategy: str
    ram_bytes: int
    dirty_ratio: float
    run_pages: float
    threads: int
    seconds: Spread
    gb_per_s: float
    of_peak: float | None
    baseline_ratio: float | None  # the baseline's time over ours
    baseline: str | None  # qemu, socket (bytes through it and no further, then QEMU's flush) or numpy
    baseline_seconds: Spread | None
    numpy_ratio: float | None
    pattern: str
    warm: bool
    n_pages: int
    n_runs: int
    n_bytes: int
    rounds: int
    ratios: dict[str, Spread] = field(default_factory=dict)  # of every baseline; in_place: see cases.measure_checkpoint
    more: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def of(cls, cell: Cell, samples: Sequence[Sample], *, backing: str, threads: int) -> Row:
        """From the rounds of a cell, at least one."""
        ours = Spread.of([one.ours_ns / 1e9 for one in samples])
        ratios = {
            name: [value / one.ours_ns for one in samples if (value := getattr(one, f"{name}_ns")) is not None]
            for name in BASELINES
        }
        baseline = next((name for name in BASELINES if ratios[name]), None)
        of_peak = [
            (one.n_bytes / one.ours_ns) / (one.peak_bytes / one.peak_ns) for one in samples if one.peak_ns is not None
        ]
        times = [getattr(one, f"{baseline}_ns") / 1e9 for one in samples] if baseline else []
        row = cls(
            case=cell.case,
            backing=backing,
            strategy="copy",
            ram_bytes=samples[0].guest_pages * 4096,
            dirty_ratio=median(one.n_pages / one.guest_pages for one in samples),
            run_pages=median(one.n_pages / one.n_runs if one.n_runs else 0.0 for one in samples),
            threads=1 if cell.case == "receive" else threads,
            seconds=ours,
            gb_per_s=median(one.n_bytes / one.ours_ns for one in samples),
            of_peak=median(of_peak) if of_peak else None,
            baseline_ratio=median(ratios[baseline]) if baseline else None,
            baseline=baseline,
            baseline_seconds=Spread.of(times) if times else None,
            numpy_ratio=median(ratios["numpy"]) if ratios["numpy"] else None,
            pattern=cell.pattern,
            warm=cell.warm,
            n_pages=round(median(one.n_pages for one in samples)),
            n_runs=round(median(one.n_runs for one in samples)),
            n_bytes=round(median(one.n_bytes for one in samples)),
            rounds=len(samples),
            ratios={name: Spread.of(values) for name, values in ratios.items() if values},
            more={name: median(one.more[name] for one in samples) for name in samples[0].more},
        )
        return row.judged()

    def judged(self) -> Row:
        """Itself, with the sentence for a cell that can't be true."""
        if self.of_peak is None or self.of_peak <= PEAK_LIMIT:
            return self
        sentence = (
            f"measuring error: {self.of_peak:.2f} of the peak copy bandwidth, and nothing copies faster than that"
        )
        return Row(**{**self.__dict__, "error": sentence})

    @classmethod
    def failed(cls, cell: Cell, sentence: str, *, backing: str, threads: int, ram_bytes: int) -> Row:
        """A cell whose result was wrong: it has no figures."""
        none = Spread(0.0, 0.0, 0.0)
        return cls(
            cell.case, backing, "copy", ram_bytes, cell.share, cell.run_pages, threads, none, 0.0, None, None, None,
            None, None, cell.pattern, cell.warm, 0, 0, 0, 0, {}, {}, sentence,
        )  # fmt: skip

    @property
    def wrong(self) -> bool:
        """What was timed did not do its work."""
        return self.rounds == 0

    @property
    def slower(self) -> bool:
        """Slower than QEMU's way by more than the rounds of both spread; never told from too few rounds."""
        if self.baseline != "qemu" or self.baseline_seconds is None or self.rounds < MIN_ROUNDS:
            return False
        spread = max(self.seconds.p90 - self.seconds.p10, self.baseline_seconds.p90 - self.baseline_seconds.p10)
        return self.seconds.p50 - self.baseline_seconds.p50 > spread

    def to_json(self) -> dict[str, Any]:
        """The fields of a row, with times in seconds."""
        made = dict(self.__dict__)
        made["seconds"] = self.seconds.to_json()
        made["ratios"] = {name: spread.to_json() for name, spread in self.ratios.items()}
        made["baseline_seconds"] = self.baseline_seconds.to_json() if self.baseline_seconds else None
        return made

    def __str__(self) -> str:
        what = (
            self.pattern if self.pattern != "synthetic" else f"{self.dirty_ratio:.1%} in runs of {self.run_pages:.0f}"
        )
        heat = ", warm" if self.warm else ""
        return f"{self.case} of {what} on {self.backing}, {self.ram_bytes >> 20} MiB, threads {self.threads}{heat}"
