# SPDX-License-Identifier: Apache-2.0
"""One round of one cell: our way and its baselines on the same memory, in changing order, each result checked.

All are timed alike: perf_counter_ns around C calls, with no garbage collection; arming, poisoning, touching other
memory and checking are outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter_ns

import numpy as np

from colocache._native import check, lib, struct
from colocache.measure import baseline
from colocache.measure.baseline import Pool
from colocache.measure.clock import undisturbed
from colocache.measure.host import peak_passes
from colocache.measure.patterns import Pattern, recorded, synthetic
from colocache.measure.rig import BLOCK, PAGE, Rig, WrongResultError
from colocache.measure.transfer import Transfer

CASES = ("union", "receive", "flush", "pause", "checkpoint")
SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)
RUNS = (1, 8, 64, 512)
RECEIVE_BYTES = 64 << 20  # of the buffer that pages are received from
RECEIVE_CALL = 4096  # pages at a time


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


def measure(rig: Rig, cell: Cell, number: int) -> Sample:
    """Round `number` of a cell. WrongResultError if what was timed did not do its work."""
    pattern = cell.draw(rig.n_pages, number, rig.rng)
    with undisturbed():
        return MEASURES[cell.case](rig, cell, pattern)


def peak(rig: Rig, pool: Pool | None = None) -> int:
    """Nanoseconds of the best sequential pass over the two images: memcpy and each page copy, all threads."""
    pool = pool or rig.pool
    took = []
    for variant, side_by_side in peak_passes():
        start = perf_counter_ns()
        pool.sequential(rig.guest_addr, rig.cache_addr, rig.ram_bytes, variant, side_by_side)
        took.append(perf_counter_ns() - start)
    return min(took)


def _interleaved(rig: Rig, ways: dict[str, Callable[[], int]]) -> dict[str, int]:
    """Each way once, in an order that changes."""
    return {name: ways[name]() for name in rig.rng.permutation(sorted(ways)).tolist()}


def _cold(rig: Rig, cell: Cell) -> None:
    if not cell.warm:
        rig.eviction.touch()


def _sample(rig: Rig, pattern: Pattern, ns: dict[str, int], **more: float) -> Sample:
    return Sample(
        ours_ns=ns["ours"],
        n_pages=pattern.n_dirty,
        n_runs=pattern.n_runs,
        n_bytes=pattern.n_dirty * PAGE,
        guest_pages=rig.n_pages,
        qemu_ns=ns.get("qemu"),
        numpy_ns=ns.get("numpy"),
        socket_ns=ns.get("socket"),
        peak_ns=ns.get("peak"),
        peak_bytes=rig.ram_bytes if "peak" in ns else 0,
        more=more,
    )


# ---- the flush, and the pause that it is most of ------------------------------------------------------------


def _seal(rig: Rig) -> tuple[int, int]:
    """Seal the open epoch by one C call: its nanoseconds, and those of union and clear in it."""
    args, result = struct("colocache_seal_args", epoch=rig.epoch + 1), struct("colocache_seal_result")
    args.n_pages = lib.COLOCACHE_ANY_COUNT
    rig.cache.device_state_buffer(rig.epoch + 1, 0)
    with rig.cache._handle as cc:
        start = perf_counter_ns()
        code = lib.colocache_seal(cc, args, result)
        took = perf_counter_ns() - start
    check(code)
    rig.epoch += 1
    return took, int(result.union_ns + result.clear_ns)


def _flush(rig: Rig, pattern: Pattern) -> int:
    """Flush the sealed epoch by one C call: its nanoseconds."""
    result = struct("colocache_flush_result")
    with rig.cache._handle as cc:
        start = perf_counter_ns()
        code = lib.colocache_flush(cc, result)
        took = perf_counter_ns() - start
    check(code)
    rig.cache.loaded()
    if result.n_pages != pattern.n_dirty:
        raise WrongResultError(f"the flush copied {result.n_pages} pages of {pattern.n_dirty} dirty ones")
    return took


def measure_flush(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
    """The flush call alone, with its bitmap cold: everything from the flush set to committed."""

    def ours() -> int:
        rig.poison(pattern)
        rig.arm(pattern)
        _seal(rig)
        _cold(rig, cell)
        took = _flush(rig, pattern)
        rig.check(pattern, f"our flush ({cell})")
        return took

    def qemu() -> int:
        rig.poison(pattern)
        bitmap = pattern.words.copy()
        _cold(rig, cell)
        start = perf_counter_ns()
        baseline.qemu_flush(bitmap, rig.n_pages, rig.guest_addr, rig.plain_addr)
        took = perf_counter_ns() - start
        rig.check(pattern, f"QEMU's way ({cell})")
        return took

    def in_numpy() -> int:
        rig.poison(pattern)
        bitmap = pattern.words.copy()
        _cold(rig, cell)
        start = perf_counter_ns()
        baseline.numpy_flush(bitmap, rig.n_pages, rig.guest, rig.plain)
        took = perf_counter_ns() - start
        rig.check(pattern, f"the numpy loop ({cell})")
        return took

    ways = {"ours": ours, "qemu": qemu, "numpy": in_numpy, "peak": lambda: peak(rig)}
    return _sample(rig, pattern, _interleaved(rig, ways))


def measure_pause(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
    """Seal and flush: what the vCPUs wait for, besides the guest's own log and device state."""

    def ours() -> int:
        rig.poison(pattern)
        rig.arm(pattern)
        _cold(rig, cell)
        sealed, _ = _seal(rig)
        took = sealed + _flush(rig, pattern)
        rig.check(pattern, f"our seal and flush ({cell})")
        return took

    def qemu() -> int:
        rig.poison(pattern)
        received = np.bitwise_and(pattern.words, rig.rng.integers(0, 1 << 64, pattern.words.size, np.uint64))
        log = pattern.words & ~received
        _cold(rig, cell)
        start = perf_counter_ns()
        baseline.qemu_union(received, log)
        baseline.qemu_flush(received, rig.n_pages, rig.guest_addr, rig.plain_addr)
        took = perf_counter_ns() - start
        rig.check(pattern, f"QEMU's way ({cell})")
        return took

    return _sample(rig, pattern, _interleaved(rig, {"ours": ours, "qemu": qemu, "peak": lambda: peak(rig)}))


def measure_union(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
    """Union with its counts, and the clearing of both bitmaps: in the seal call, as it says itself."""
    seal_ns = 0

    def ours() -> int:
        nonlocal seal_ns
        rig.poison(pattern)
        rig.arm(pattern)
        _cold(rig, cell)
        seal_ns, took = _seal(rig)
        flush_set = rig.cache.blocks[BLOCK].flush_set
        _flush(rig, pattern)
        if not np.array_equal(flush_set, pattern.words):
            raise WrongResultError(f"the flush set is not the union ({cell})")
        return took

    def qemu() -> int:
        bitmap, log = np.zeros_like(pattern.words), pattern.words.copy()
        _cold(rig, cell)
        start = perf_counter_ns()
        baseline.qemu_union(bitmap, log)
        cleared = baseline.qemu_clear(bitmap, rig.n_pages)
        took = perf_counter_ns() - start
        if cleared != pattern.n_dirty:
            raise WrongResultError(f"QEMU's way cleared {cleared} bits of {pattern.n_dirty}")
        return took

    made = _sample(rig, pattern, _interleaved(rig, {"ours": ours, "qemu": qemu}), seal_ns=seal_ns)
    return replace(made, n_bytes=3 * pattern.words.nbytes)


# ---- pages that arrive -----------------------------------------------------------------------------------------


def measure_receive(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
    """Pages from a buffer into the cache image with their bits, one thread; beside it numpy's fancy indexing."""
    dirty = np.flatnonzero(pattern.bits).astype(np.uint64)
    data = rig.incoming(min(dirty.size, RECEIVE_BYTES // PAGE))
    calls = [
        (dirty[at : at + RECEIVE_CALL], data[at % len(data) :][: len(dirty[at : at + RECEIVE_CALL])])
        for at in range(0, dirty.size, RECEIVE_CALL)
    ]

    def ours() -> int:
        epoch = rig.epoch + 1
        prepared = [
            (baseline.words_pointer(pfns), len(pfns), baseline.pointer(pages.ctypes.data), pages.nbytes)
            for pfns, pages in calls
        ]
        _cold(rig, cell)
        with rig.cache._handle as cc:
            start = perf_counter_ns()
            for pfns, count, pages, n_bytes in prepared:
                if lib.colocache_receive_pages(cc, epoch, 0, pfns, count, pages, n_bytes) != 0:
                    break
            took = perf_counter_ns() - start
        for pfns, pages in calls:
            if not np.array_equal(rig.cached[pfns], pages):
                raise WrongResultError(f"received pages are not in the cache ({cell})")
        if not np.array_equal(rig.cache.blocks[BLOCK].pvm_bitmap, pattern.words):
            raise WrongResultError(f"the PVM bitmap is not what was received ({cell})")
        return took

    def in_numpy() -> int:
        bitmap = np.zeros_like(pattern.words)
        _cold(rig, cell)
        start = perf_counter_ns()
        for pfns, pages in calls:
            rig.plain[pfns] = pages
            np.bitwise_or.at(bitmap, pfns >> np.uint64(6), np.uint64(1) << (pfns & np.uint64(63)))
        return perf_counter_ns() - start

    ns = _interleaved(rig, {"ours": ours, "numpy": in_numpy, "peak": lambda: peak(rig, rig.single)})
    rig.finish_epoch()
    rig.note_cache()
    return _sample(rig, pattern, ns)


def measure_checkpoint(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
    """A whole checkpoint over a socket: receive, sync of the SVM's log (the same pages), seal, flush, loaded.

    Beside it: the same bytes through the same socket into one buffer, then QEMU's union and flush.
    """
    with Transfer(rig) as transfer:

        def ours() -> int:
            transfer.stamp(pattern)
            rig.note_plain()
            rig.poison(pattern)
            _cold(rig, cell)
            took = transfer.checkpoint(pattern)
            rig.check(pattern, f"our checkpoint ({cell})")
            return took

        def socket() -> int:
            received, log = np.zeros_like(pattern.words), pattern.words.copy()
            _cold(rig, cell)
            took = transfer.raw(pattern.n_dirty * PAGE)
            start = perf_counter_ns()
            baseline.qemu_union(received, log)
            baseline.qemu_flush(received, rig.n_pages, rig.guest_addr, rig.plain_addr)
            return took + perf_counter_ns() - start

        return _sample(rig, pattern, _interleaved(rig, {"ours": ours, "socket": socket}))


MEASURES: dict[str, Callable[[Rig, Cell, Pattern], Sample]] = {
    "flush": measure_flush,
    "pause": measure_pause,
    "union": measure_union,
    "receive": measure_receive,
    "checkpoint": measure_checkpoint,
}
