# SPDX-License-Identifier: Apache-2.0
"""A whole run: every cell on every backing in interleaved rounds, with what the machine allows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from colocache import backing as bk
from colocache.errors import ColocacheError, MemoryShortError
from colocache.measure import bitmaps
from colocache.measure.baseline import Eviction
from colocache.measure.cells import CASES, RECEIVE_BYTES, RUNS, SHARES, Cell, Sample, fits, measure, peak
from colocache.measure.clock import Spread
from colocache.measure.host import Host
from colocache.measure.huge import borrowed, command_for
from colocache.measure.patterns import WORKLOADS
from colocache.measure.rig import PAGE, Rig, WrongResultError
from colocache.measure.rows import Row

RAM_MIN = 16 << 20
QUICK_SECONDS = 22.0
PAUSE_BYTES = 100_000_000
WARM_UP_PASSES = 3

Progress = Callable[[int, int, str], object]  # steps done, steps in all, what is measured now


@dataclass(frozen=True)
class Plan:
    """What a run measures. Empty tuples mean: what suits the machine."""

    ram_bytes: tuple[int, ...] = ()
    backings: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    rounds: int = 0
    warm: bool = False
    quick: bool = False
    full: bool = False  # every share, run length and case with every number of threads

    @property
    def n_rounds(self) -> int:
        return self.rounds or (3 if self.quick else 5)


@dataclass
class Result:
    """What a run found. `notes`: what it could not do, and why; peaks in 1e9 bytes a second, one a round and cell."""

    host: Host
    plan: Plan
    rows: list[Row] = field(default_factory=list)
    peaks: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def peak_spreads(self) -> dict[tuple[str, int], Spread]:
        """Per backing and thread count."""
        return {key: Spread.of(values) for key, values in sorted(self.peaks.items())}

    @property
    def noise(self) -> float:
        """The widest spread of the peak, p10 to p90 as a share of its median, over backings and thread counts."""
        return max((spread.width for spread in self.peak_spreads().values()), default=0.0)


def thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all."""
    counts = [1]
    while counts[-1] * 2 < cores:
        counts.append(counts[-1] * 2)
    return tuple(sorted({*counts, cores}))


def cells_for(plan: Plan, n_pages: int, n_threads: int, most: int) -> list[Cell]:
    """The cells of one guest size and thread count. Few threads get only what a scaling plot needs."""
    shares, runs = (SHARES, RUNS) if not plan.quick else ((0.01, 0.1, 0.5), (1, 64))
    if plan.full:
        wanted = [Cell(case, share, run) for case in CASES for share in shares for run in runs]
    elif n_threads < most:
        wanted = [Cell("flush", 0.5, 1), Cell("flush", 0.5, 64)]
    else:
        wanted = [Cell("flush", share, run) for share in shares for run in runs]
        some = (0.1,) if plan.quick else shares
        wanted += [Cell("pause", share, 8) for share in shares]
        wanted += [Cell(case, share, 1) for case in ("union", "receive") for share in some]
        wanted += [Cell(case, 1.0, max(RUNS)) for case in ("pause", "union", "receive") if 1.0 in some]
        wanted += [Cell("checkpoint", share, 8) for share in some if share < 1]
    if n_threads == most or plan.full:
        wanted += [Cell("pause", PAUSE_BYTES / PAGE / n_pages, run) for run in (1, 8)]
        wanted += [Cell("flush", 0.0, 0, name) for name in (WORKLOADS[:1] if plan.quick else WORKLOADS)]
    cells = [cell for cell in dict.fromkeys(wanted) if fits(cell, n_pages)]
    warm = [Cell(one.case, one.share, one.run_pages, one.pattern, True) for one in cells] if plan.warm else []
    return cells + warm


def default_ram(host: Host, plan: Plan) -> int:
    """Several times what the CPU's caches hold, so that a pass over it is a pass over memory."""
    least = (128 if plan.quick else 256) << 20
    return max(least, bk.round_up(4 * host.l3_bytes, 64 << 20))


def needed(ram_bytes: int, host: Host) -> int:
    """Bytes that one guest size takes: two images, QEMU's cache, and what is touched."""
    return 3 * ram_bytes + host.touch_bytes + 2 * RECEIVE_BYTES


def affordable(ram_bytes: int, host: Host, available: int) -> int:
    """The size itself, or the largest power-of-two part of it for which there is memory."""
    while ram_bytes > RAM_MIN and needed(ram_bytes, host) > available:
        ram_bytes //= 2
    return bk.round_up(ram_bytes, 2 << 20)


class Session:
    """Runs a plan. `run` gives the result; what it borrowed is given back however it ends."""

    def __init__(self, plan: Plan, host: Host, progress: Progress = lambda *_: None) -> None:
        self.plan, self.host = plan, host
        self.result = Result(host, plan)
        self._progress = progress
        self._done = 0
        self._total = 1
        most = host.cores
        self._threads = plan.threads or ((most,) if plan.quick else thread_counts(most))
        self._most = max(self._threads)

    def run(self) -> Result:
        """Measure everything. MemoryShortError if there is no room for even the smallest guest on any backing."""
        start = time.monotonic()
        work = [(ram, backing) for ram in self._sizes() for backing in self._backings()]
        self._total = sum(self._steps(ram) for ram, _ in work) + (0 if self.plan.quick else 4 * self.plan.n_rounds)
        for number, (ram_bytes, backing) in enumerate(work):
            budget = None
            if self.plan.quick and not self.plan.rounds:
                left = QUICK_SECONDS - (time.monotonic() - start)
                budget = left / (len(work) - number)
            self._one_size(ram_bytes, backing, budget)
        if not self.plan.quick:
            self._large_guests()
        self.result.seconds = time.monotonic() - start
        if not self.result.rows:
            raise MemoryShortError(
                "nothing could be measured: " + "; ".join(self.result.notes),
                needed=needed(RAM_MIN, self.host),
                available=bk.memory_available(),
                command="free some memory, or choose another --backing",
            )
        return self.result

    def _sizes(self) -> list[int]:
        sizes = []
        for wanted in self.plan.ram_bytes or (default_ram(self.host, self.plan),):
            size = affordable(max(RAM_MIN, bk.round_up(wanted, PAGE)), self.host, bk.memory_available())
            if size < wanted:
                self.result.notes.append(
                    f"guest RAM is {size >> 20} MiB instead of {wanted >> 20}: "
                    f"{bk.memory_available() >> 20} MiB of memory are available and it takes three times the guest"
                )
            sizes.append(size)
        return list(dict.fromkeys(sizes))

    def _backings(self) -> Sequence[str]:
        return self.plan.backings or ("hugetlb", "thp", "shm")

    def _steps(self, ram_bytes: int) -> int:
        return self.plan.n_rounds * sum(
            len(cells_for(self.plan, ram_bytes // PAGE, n, self._most)) for n in self._threads
        )

    def _step(self, label: str) -> None:
        self._done += 1
        self._progress(min(self._done, self._total), self._total, label)

    # ---- one guest size on one backing ----

    def _one_size(self, ram_bytes: int, backing: str, budget: float | None) -> None:
        pages = 2 * bk.round_up(ram_bytes, bk.HUGE) // bk.HUGE if backing == "hugetlb" else 0
        steps = self._done + self._steps(ram_bytes)
        with contextlib.ExitStack() as stack:
            if pages:
                stack.enter_context(borrowed(pages))
                if bk.huge_pages().free < pages:
                    self.result.notes.append(
                        f"no hugetlb: {pages} huge pages of 2 MiB are needed and {bk.huge_pages().free} are free; "
                        f"as root: {command_for(pages)}"
                    )
                    self._done = steps
                    return
            try:
                rig = stack.enter_context(Rig(ram_bytes, backing, self.host.touch_bytes))
            except ColocacheError as error:
                self.result.notes.append(f"no {backing}: {error}")
                self._done = steps
                return
            self._rounds(rig, budget)
        self._done = max(self._done, steps)

    def _rounds(self, rig: Rig, budget: float | None) -> None:
        """All rounds; of each, every thread count and every cell, in changing order."""
        samples: dict[tuple[int, Cell], list[Sample]] = {}
        wrong: dict[tuple[int, Cell], str] = {}
        start = time.monotonic()
        for number in range(self.plan.n_rounds):
            spent = time.monotonic() - start
            if budget is not None and number and spent / number * (number + 1) > budget:
                break
            for n_threads in rig.rng.permutation(self._threads).tolist():
                with rig.threads(n_threads):
                    if number == 0:
                        for _ in range(WARM_UP_PASSES):
                            peak(rig)
                    self._round(rig, n_threads, number, samples, wrong)
        for (n_threads, cell), taken in samples.items():
            if (n_threads, cell) not in wrong:
                self.result.rows.append(Row.of(cell, taken, backing=rig.backing, threads=n_threads))
        for (n_threads, cell), sentence in wrong.items():
            row = Row.failed(cell, sentence, backing=rig.backing, threads=n_threads, ram_bytes=rig.ram_bytes)
            self.result.rows.append(row)

    def _round(
        self,
        rig: Rig,
        n_threads: int,
        number: int,
        samples: dict[tuple[int, Cell], list[Sample]],
        wrong: dict[tuple[int, Cell], str],
    ) -> None:
        cells = cells_for(self.plan, rig.n_pages, n_threads, self._most)
        for index in rig.rng.permutation(len(cells)).tolist():
            cell = cells[index]
            self._step(f"{rig.backing}, threads {n_threads}, round {number + 1}: {cell}")
            if (n_threads, cell) in wrong:
                continue
            try:
                sample = measure(rig, cell, number)
            except WrongResultError as error:
                wrong[n_threads, cell] = str(error)
                rig.settle()
                continue
            samples.setdefault((n_threads, cell), []).append(sample)
            if sample.peak_ns:
                threads = 1 if cell.case == "receive" else n_threads
                speed = sample.peak_bytes / sample.peak_ns
                self.result.peaks.setdefault((rig.backing, threads), []).append(speed)

    # ---- large guests ----

    def _large_guests(self) -> None:
        """Bitmaps of 16 GiB and 1 TiB: by their nature without a backing of their own."""
        rounds = self.plan.n_rounds
        touch = Eviction(self.host.touch_bytes)
        for warm in (False, True) if self.plan.warm else (False,):
            try:
                self.result.rows.append(bitmaps.dense(rounds, touch, warm=warm, step=self._step))
                self.result.rows.append(bitmaps.sparse(rounds, touch, warm=warm, step=self._step))
                for ram_bytes in bitmaps.IDLE_BYTES:
                    self.result.rows.append(bitmaps.idle(ram_bytes, rounds, touch, warm=warm, step=self._step))
            except (ColocacheError, MemoryError) as error:
                self.result.notes.append(f"no cells of large guests: {error}")
