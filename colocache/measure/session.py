# SPDX-License-Identifier: Apache-2.0
"""A whole run: every cell on every backing in interleaved rounds, with what the machine allows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from colocache import backing as bk
from colocache.errors import ColocacheError, MemoryShortError
from colocache.measure import bitmaps, words
from colocache.measure.baseline import Eviction, can_evict
from colocache.measure.cases import RECEIVE_BYTES, measure, peak
from colocache.measure.cells import CASES, RUNS, SHARES, Cell, Sample, fits
from colocache.measure.clock import MIN_ROUNDS, Spread
from colocache.measure.host import Host
from colocache.measure.huge import borrowed, command_for
from colocache.measure.patterns import WORKLOADS
from colocache.measure.rig import PAGE, Rig, WrongResultError
from colocache.measure.rows import Row

RAM_MIN = 16 << 20
QUICK_SECONDS = 22.0
QUICK_RAM = 64 << 20  # three rounds on two backings within the time
QUICK_TOUCH = 256 << 20
QUICK_LINES_TOUCH = 16 << 20  # for bitmaps, where the images are pushed out line by line
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
    seconds: float = QUICK_SECONDS  # of a quick run whose rounds are not given

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
    cold_by: str = "touching"  # or "lines"; see Cooling

    def peak_spreads(self) -> dict[tuple[str, int], Spread]:
        """Per backing and thread count."""
        return {key: Spread.of(values) for key, values in sorted(self.peaks.items())}

    @property
    def rounds(self) -> int:
        """Of the cell that has fewest; 0 if none was measured."""
        return min((row.rounds for row in self.rows if not row.wrong), default=0)

    @property
    def noise(self) -> float | None:
        """The widest spread of the peak, p10 to p90 as a share of its median, over backings and thread counts.

        None: there were too few rounds to tell.
        """
        if self.rounds < MIN_ROUNDS:
            return None
        return max((spread.width for spread in self.peak_spreads().values() if spread.known), default=None)


def thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all."""
    counts = [1]
    while counts[-1] * 2 < cores:
        counts.append(counts[-1] * 2)
    return tuple(sorted({*counts, cores}))


def cells_for(plan: Plan, n_pages: int, n_threads: int, most: int) -> list[Cell]:
    """The cells of one guest size and thread count.

    One thread gets every flush too, so that QEMU's one thread stands beside one of ours; two and more only what a
    scaling plot needs.
    """
    shares, runs = (SHARES, RUNS) if not plan.quick else ((0.01, 0.1, 0.5), (1, 64))
    if plan.full:
        wanted = [Cell(case, share, run) for case in CASES for share in shares for run in runs]
    elif 1 < n_threads < most:
        wanted = [Cell("flush", 0.5, 1), Cell("flush", 0.5, 64)]
    elif n_threads < most:
        wanted = [Cell("flush", share, run) for share in shares for run in runs]
    else:
        wanted = [Cell("flush", share, run) for share in shares for run in runs]
        some = (0.1,) if plan.quick else shares
        wanted += [Cell("pause", share, run) for share in shares for run in ((8,) if plan.quick else runs)]
        wanted += [Cell(case, share, 1) for case in ("union", "receive") for share in some]
        wanted += [Cell(case, 1.0, max(RUNS)) for case in ("union", "receive") if 1.0 in some]
        wanted += [Cell("checkpoint", share, 8) for share in ((0.1,) if plan.quick else (0.0001, *shares)) if share < 1]
    if n_threads == most or plan.full:
        wanted += [Cell("pause", PAUSE_BYTES / PAGE / n_pages, run) for run in (1, 8)]
    if n_threads in (1, most) or plan.full:
        wanted += [Cell("flush", 0.0, 0, name) for name in (WORKLOADS[:1] if plan.quick else WORKLOADS)]
    cells = [cell for cell in dict.fromkeys(wanted) if fits(cell, n_pages)]
    warm = [Cell(one.case, one.share, one.run_pages, one.pattern, True) for one in cells] if plan.warm else []
    return cells + warm


@dataclass(frozen=True)
class Cooling:
    """How the CPU's caches are made cold before a timed call, and the guest RAM that this asks for.

    Usually twice as much other memory as the caches have is touched, and a guest has several times as much as they,
    so that a pass over it is a pass over memory. `--quick` has no time for that where they are large: it pushes the
    images' own lines out, or touches less and says so.
    """

    touch_bytes: int
    by_lines: bool
    ram_bytes: int  # for a plan that names none
    reason: str = ""  # why it is less than usual, if it is

    @classmethod
    def of(cls, plan: Plan, host: Host) -> Cooling:
        usual = bk.round_up(4 * host.l3_bytes, 64 << 20)
        if not plan.quick:
            return cls(host.touch_bytes, False, max(256 << 20, usual))
        less = usual > QUICK_RAM or host.touch_bytes > QUICK_TOUCH
        l3 = f"--quick, and the L3 has {host.l3_bytes >> 20} MiB: "
        if can_evict():
            how = f"guest RAM is {QUICK_RAM >> 20} MiB unless given, and what is timed was pushed out of the caches"
            how += " line by line; what is copied may stay in them, which flatters QEMU's way"
            return cls(QUICK_LINES_TOUCH, True, QUICK_RAM, l3 + how if less else "")
        touch = min(host.touch_bytes, QUICK_TOUCH)
        how = f"only {touch >> 20} MiB of other memory were touched before each timed call, so its data may be cached"
        return cls(touch, False, QUICK_RAM, l3 + how if less else "")

    def needed(self, ram_bytes: int) -> int:
        """Bytes that one guest size takes: two images, QEMU's cache, and what is touched."""
        return 3 * ram_bytes + self.touch_bytes + 2 * RECEIVE_BYTES

    def affordable(self, ram_bytes: int, available: int, room: int = bk.UNKNOWN) -> int:
        """The size itself, or the largest power-of-two part of it for which there is memory.

        `room`: what the two images of a backing may take, if it has a limit of its own.
        """
        while ram_bytes > RAM_MIN and (self.needed(ram_bytes) > available or 2 * ram_bytes > room):
            ram_bytes //= 2
        return max(RAM_MIN, bk.round_up(ram_bytes, 2 << 20))


def importance(cell: Cell) -> tuple[int, float]:
    """The place of a cell in a run that has no time for all: the answer first."""
    return ("pause", "flush", "checkpoint", "receive", "union").index(cell.case), -cell.share


def _may_be_had(backing: str) -> bool:
    """Whether this machine may have any of that memory; of huge pages a run may borrow what is missing."""
    try:
        for kind in bk.kinds(backing):
            bk.check_room(kind, 0)
    except ColocacheError:
        return False
    return True


@dataclass
class _Taken:
    """What the rounds on one backing gave, per number of threads and cell."""

    samples: dict[tuple[int, Cell], list[Sample]] = field(default_factory=dict)
    wrong: dict[tuple[int, Cell], str] = field(default_factory=dict)
    left_out: dict[tuple[int, Cell], None] = field(default_factory=dict)
    first: tuple[int, Cell] | None = None


def _mib(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB"


class Session:
    """Runs a plan. `run` gives the result; what it borrowed is given back however it ends."""

    def __init__(self, plan: Plan, host: Host, progress: Progress = lambda *_: None) -> None:
        self.plan, self.host = plan, host
        self.result = Result(host, plan)
        self._progress = progress
        self._done = 0
        self._total = 1
        self.cooling = Cooling.of(plan, host)
        self.result.cold_by = "lines" if self.cooling.by_lines else "touching"
        if self.cooling.reason:
            self.result.notes.append(self.cooling.reason)
        most = host.cores
        self._threads = plan.threads or (tuple(sorted({1, most})) if plan.quick else thread_counts(most))
        self._most = max(self._threads)

    def run(self) -> Result:
        """Measure everything. MemoryShortError if there is no room for even the smallest guest on any backing."""
        start = time.monotonic()
        work = [(ram, backing) for ram in self._sizes() for backing in self._backings()]
        self._total = sum(self._steps(ram) for ram, _ in work) + (0 if self.plan.quick else 4 * self.plan.n_rounds)
        short = self.plan.quick and not self.plan.rounds
        for number, (ram_bytes, backing) in enumerate(work):
            until = None
            if short:
                now = time.monotonic()
                sharers = 1 + sum(_may_be_had(other) for _, other in work[number + 1 :])
                until = now + (start + self.plan.seconds - now) / sharers
            self._one_size(ram_bytes, backing, until)
        if not self.plan.quick:
            self._large_guests()
        self.result.seconds = time.monotonic() - start
        if not self.result.rows:
            raise MemoryShortError(
                "nothing could be measured: " + "; ".join(self.result.notes),
                needed=self.cooling.needed(RAM_MIN),
                available=bk.memory_available(),
                command="free some memory, or choose another --backing",
            )
        return self.result

    def _sizes(self) -> list[int]:
        sizes = []
        for wanted in self.plan.ram_bytes or (self.cooling.ram_bytes,):
            size = self.cooling.affordable(bk.round_up(wanted, PAGE), bk.memory_available())
            if size < wanted:
                self.result.notes.append(
                    f"guest RAM is {_mib(size)} instead of {_mib(wanted)}: "
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

    def _one_size(self, ram_bytes: int, backing: str, until: float | None) -> None:
        if until is not None and until <= time.monotonic() and self.result.rows:
            self.result.notes.append(f"no {backing}: --quick had no time left for it")
            return
        pages = 2 * bk.round_up(ram_bytes, bk.HUGE) // bk.HUGE if backing == "hugetlb" else 0
        steps = self._done + self._steps(ram_bytes)
        with contextlib.ExitStack() as stack:
            if pages:
                added = stack.enter_context(borrowed(pages))
                if added:
                    self.result.notes.append(
                        f"{added} huge pages of 2 MiB were reserved for the {_mib(ram_bytes)} guest and given back"
                    )
                if bk.huge_pages().free < pages:
                    self.result.notes.append(
                        f"no hugetlb: {pages} huge pages of 2 MiB are needed and {bk.huge_pages().free} are free; "
                        f"as root: {command_for(pages)}"
                    )
                    self._done = steps
                    return
            try:
                rig = stack.enter_context(
                    Rig(ram_bytes, backing, self.cooling.touch_bytes, by_lines=self.cooling.by_lines)
                )
            except ColocacheError as error:
                self.result.notes.append(f"no {backing}: {error}")
                self._done = steps
                return
            self._rounds(rig, until)
        self._done = max(self._done, steps)

    def _rounds(self, rig: Rig, until: float | None) -> None:
        """All rounds; of each, every thread count and every cell, in changing order.

        `until`, on the monotonic clock: each round has an equal part of the time till then, and a cell that one round
        has no time for is left out of all. So whatever is reported has all its rounds, however slow the machine is. The
        first round goes by importance, and the first cell of all is measured even if there is no time.
        """
        taken = _Taken()
        start = time.monotonic()
        for number in range(self.plan.n_rounds):
            first = until is not None and number == 0
            end = None if until is None else start + (until - start) * (number + 1) / self.plan.n_rounds
            for n_threads in sorted(self._threads, reverse=True) if first else rig.rng.permutation(self._threads):
                cells = cells_for(self.plan, rig.n_pages, int(n_threads), self._most)
                order = (
                    sorted(cells, key=importance) if first else [cells[at] for at in rig.rng.permutation(len(cells))]
                )
                with rig.threads(int(n_threads)):
                    if number == 0:
                        for _ in range(WARM_UP_PASSES):
                            peak(rig)
                    self._round(rig, int(n_threads), number, order, taken, end)
        kept = {key: samples for key, samples in taken.samples.items() if key not in {*taken.wrong, *taken.left_out}}
        for (n_threads, cell), samples in kept.items():
            self.result.rows.append(Row.of(cell, samples, backing=rig.backing, threads=n_threads))
        for (n_threads, cell), sentence in taken.wrong.items():
            row = Row.failed(cell, sentence, backing=rig.backing, threads=n_threads, ram_bytes=rig.ram_bytes)
            self.result.rows.append(row)
        if taken.left_out:
            self.result.notes.append(
                f"--quick had no time for {words.rounds(self.plan.n_rounds)} of every cell on {rig.backing}: "
                f"{len(taken.left_out)} of {len(kept) + len(taken.wrong) + len(taken.left_out)} are left out"
            )

    def _round(
        self, rig: Rig, n_threads: int, number: int, cells: Sequence[Cell], taken: _Taken, end: float | None
    ) -> None:
        for cell in cells:
            self._step(f"{rig.backing}, threads {n_threads}, round {number + 1}: {cell}")
            key = (n_threads, cell)
            taken.first = taken.first or key
            if key in taken.wrong or key in taken.left_out:
                continue
            if end is not None and time.monotonic() >= end and key != taken.first:
                taken.left_out[key] = None
                continue
            try:
                sample = measure(rig, cell, number)
            except WrongResultError as error:
                taken.wrong[key] = str(error)
                rig.settle()
                continue
            taken.samples.setdefault(key, []).append(sample)
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
