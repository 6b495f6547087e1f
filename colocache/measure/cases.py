# SPDX-License-Identifier: Apache-2.0
"""One round of one cell: our way and its baselines on the same memory, in changing order, each result checked.

Our calls are timed by the clock inside the engine, what they are compared with by perf_counter_ns around one C call:
Python's part is in neither. Arming, poisoning, cooling and checking are outside, and no garbage is collected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter_ns

import numpy as np

from colocache import SealResult
from colocache.measure import baseline
from colocache.measure.baseline import Pool
from colocache.measure.cells import Cell, Sample
from colocache.measure.clock import undisturbed
from colocache.measure.host import peak_passes
from colocache.measure.patterns import Pattern
from colocache.measure.rig import BLOCK, PAGE, Rig, WrongResultError
from colocache.measure.transfer import Transfer

RECEIVE_BYTES = 64 << 20  # of the buffer that pages are received from
RECEIVE_CALL = 4096  # pages at a time


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
        if rig.by_lines:  # then the images may be smaller than the caches, and the pass before has filled these
            rig.cool_images()
        start = perf_counter_ns()
        pool.sequential(rig.guest_addr, rig.cache_addr, rig.ram_bytes, variant, side_by_side)
        took.append(perf_counter_ns() - start)
    return min(took)


def _interleaved(rig: Rig, ways: dict[str, Callable[[], int]]) -> dict[str, int]:
    """Each way once, in an order that changes."""
    return {name: ways[name]() for name in rig.rng.permutation(sorted(ways)).tolist()}


def _cold(rig: Rig, cell: Cell) -> None:
    if not cell.warm:
        rig.cool()


def _sample(rig: Rig, pattern: Pattern, ns: dict[str, int]) -> Sample:
    return Sample(
        ours_ns=ns["ours"],
        n_pages=pattern.n_dirty,
        n_runs=pattern.n_runs,
        n_bytes=pattern.n_dirty * PAGE,
        guest_pages=rig.n_pages,
        qemu_ns=ns.get("qemu"),
        numpy_ns=ns.get("numpy"),
        socket_ns=ns.get("socket"),
        in_place_ns=ns.get("in_place"),
        peak_ns=ns.get("peak"),
        peak_bytes=rig.ram_bytes if "peak" in ns else 0,
    )


# ---- the flush, and its part of a pause ----------------------------------------------------------------------


def seal_ns(sealed: SealResult) -> int:
    """The whole call, as the engine timed it."""
    return sealed.check_ns + sealed.union_ns + sealed.commit_ns + sealed.clear_ns


def flush_ns(rig: Rig, pattern: Pattern) -> int:
    """Flush the sealed epoch; nanoseconds of the call."""
    flushed = rig.cache.flush()
    rig.cache.loaded()
    if flushed.n_pages != pattern.n_dirty:
        raise WrongResultError(f"the flush copied {flushed.n_pages} pages of {pattern.n_dirty} dirty ones")
    return flushed.copy_ns + flushed.commit_ns


def measure_flush(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
    """The flush call alone, with its bitmap cold: everything from the flush set to committed."""

    def ours() -> int:
        rig.poison(pattern)
        rig.arm(pattern)
        rig.seal()
        _cold(rig, cell)
        took = flush_ns(rig, pattern)
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
    """The flush's part of a pause, seal and flush: without the log's sync, the transfer and the device state's load."""

    def ours() -> int:
        rig.poison(pattern)
        rig.arm(pattern)
        _cold(rig, cell)
        took = seal_ns(rig.seal()) + flush_ns(rig, pattern)
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
    """Union with its counts, and the clearing of both bitmaps, inside the seal."""

    def ours() -> int:
        rig.poison(pattern)
        rig.arm(pattern)
        _cold(rig, cell)
        sealed = rig.seal()
        flush_set = rig.cache.blocks[BLOCK].flush_set
        flush_ns(rig, pattern)
        if not np.array_equal(flush_set, pattern.words):
            raise WrongResultError(f"the flush set is not the union ({cell})")
        return sealed.union_ns + sealed.clear_ns

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

    made = _sample(rig, pattern, _interleaved(rig, {"ours": ours, "qemu": qemu}))
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
        _cold(rig, cell)
        start = perf_counter_ns()
        for pfns, pages in calls:
            rig.cache.receive_pages(epoch, BLOCK, pfns, pages)
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

    Beside it, each with QEMU's union and flush: the same bytes through the same socket from one hot buffer into
    another, which no checkpoint could do; and the same pages from and to where they lie, the least that one must do.
    """
    with Transfer(rig) as transfer:

        def new_pages() -> None:
            transfer.stamp(pattern)
            rig.note_plain()
            rig.poison(pattern)
            _cold(rig, cell)

        def ours() -> int:
            new_pages()
            took = transfer.checkpoint(pattern)
            rig.check(pattern, f"our checkpoint ({cell})")
            return took

        def socket() -> int:
            rig.poison(pattern)
            _cold(rig, cell)
            took = transfer.hot(pattern)
            rig.check(pattern, f"QEMU's way after the raw socket ({cell})")
            return took

        def in_place() -> int:
            new_pages()
            took = transfer.in_place(pattern)
            rig.check(pattern, f"QEMU's way after pages in place ({cell})")
            return took

        return _sample(rig, pattern, _interleaved(rig, {"ours": ours, "socket": socket, "in_place": in_place}))


MEASURES: dict[str, Callable[[Rig, Cell, Pattern], Sample]] = {
    "flush": measure_flush,
    "pause": measure_pause,
    "union": measure_union,
    "receive": measure_receive,
    "checkpoint": measure_checkpoint,
}
