# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of large guests: a checkpoint costs what is dirty, not what the guest has.

16 GiB with 3.19 million dirty pages (the published figure of QEMU for it is 8.3 ms) on the engine's own bitmap code;
1 TiB and 1 GiB of sparse images through the whole engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from colocache import BlockSpec, Cache, Memory
from colocache.measure import baseline
from colocache.measure.cases import seal_ns
from colocache.measure.cells import Cell, Sample
from colocache.measure.clock import undisturbed
from colocache.measure.patterns import Pattern
from colocache.measure.rig import PAGE, WrongResultError
from colocache.measure.rows import Row

DENSE_BYTES, DENSE_PAGES = 16 << 30, 3_190_000
SPARSE_BYTES, SPARSE_PAGES = 1 << 40, 1000
IDLE_BYTES = (1 << 30, 1 << 40)
BLOCK = "pc.ram"


def dense(rounds: int, touch: baseline.Eviction, *, warm: bool, step: Callable[[str], None]) -> Row:
    """Union with counts, and clear, of 3.19 million bits in a 16 GiB guest; `more`: ns per run found."""
    n_pages, rng = DENSE_BYTES // PAGE, np.random.default_rng(2)
    cell = Cell("union", DENSE_PAGES / n_pages, 1, "scattered", warm)
    samples = []
    with baseline.Bitmap(n_pages) as flush_set, baseline.Bitmap(n_pages) as pvm, baseline.Bitmap(n_pages) as svm:
        for _ in range(rounds):
            bits = np.zeros(n_pages, np.bool_)
            bits[rng.permutation(n_pages)[:DENSE_PAGES]] = True
            pattern = Pattern.of(bits)
            half = rng.integers(0, 1 << 64, pattern.words.size, np.uint64)

            def cool() -> None:
                if not warm:
                    touch.touch()

            with undisturbed():
                pvm.fill(pattern.words & half)
                svm.fill(pattern.words & ~half)
                cool()
                start = perf_counter_ns()
                united = flush_set.move(pvm, svm)
                ours = perf_counter_ns() - start
                cool()
                start = perf_counter_ns()
                runs = flush_set.find_runs()
                scan = perf_counter_ns() - start
                one, log = pattern.words & half, pattern.words & ~half
                cool()
                start = perf_counter_ns()
                baseline.qemu_union(one, log)
                baseline.qemu_clear(one, n_pages)
                qemu = perf_counter_ns() - start
            if (united, runs, flush_set.found_pages) != (DENSE_PAGES, pattern.n_runs, DENSE_PAGES) or pvm.words.any():
                raise WrongResultError(
                    f"the union of {DENSE_PAGES} pages in {pattern.n_runs} runs has {united} in {runs}"
                )
            n_bytes = 3 * pattern.words.nbytes
            more = {"ns_per_run": scan / runs, "scan_ns": float(scan)}
            samples.append(Sample(ours, DENSE_PAGES, runs, n_bytes, n_pages, qemu_ns=qemu, more=more))
            step(str(cell))
    return Row.of(cell, samples, backing="none", threads=1)


@contextmanager
def _sparse(ram_bytes: int) -> Iterator[Cache]:
    with (
        Memory.create(blocks=[BlockSpec(BLOCK, ram_bytes)], backing="shm", reserve=False) as memory,
        Cache.create(memory) as cache,
    ):
        yield cache


@dataclass(frozen=True)
class Times:
    """Of one checkpoint, in nanoseconds: inside the seal, and of seal and flush together."""

    union_ns: int
    clear_ns: int
    whole_ns: int
    flush_pages: int


def _checkpoint(cache: Cache, epoch: int) -> Times:
    """Seal, flush and loaded, timed by the engine's own clock."""
    cache.device_state_buffer(epoch, 0)
    sealed = cache.seal(epoch)
    flushed = cache.flush()
    cache.loaded()
    whole = seal_ns(sealed) + flushed.copy_ns + flushed.commit_ns
    return Times(sealed.union_ns, sealed.clear_ns, whole, flushed.n_pages)


def sparse(rounds: int, touch: baseline.Eviction, *, warm: bool, step: Callable[[str], None]) -> Row:
    """1,000 dirty pages of a 1 TiB guest, by receive and by single marks: union, clear; `more`: scan, whole calls.

    The scan is timed as the flush meets it: right after a union whose bitmaps were cold (or not, if `warm`).
    """
    n_pages, rng = SPARSE_BYTES // PAGE, np.random.default_rng(3)
    cell = Cell("union", SPARSE_PAGES / n_pages, 1, "scattered", warm)
    pfns = np.sort(rng.choice(n_pages // 2, SPARSE_PAGES, replace=False)) * 2
    data = rng.integers(0, 256, (SPARSE_PAGES // 2, PAGE), np.uint8)
    received, marked = pfns[::2], pfns[1::2]
    times, samples = [], []

    def cool() -> None:
        if not warm:
            touch.touch()

    with (
        _sparse(SPARSE_BYTES) as cache,
        baseline.Bitmap(n_pages) as flush_set,
        baseline.Bitmap(n_pages) as pvm,
        baseline.Bitmap(n_pages) as svm,
    ):
        for epoch in range(1, rounds + 2):
            cache.receive_pages(epoch, BLOCK, received, data)
            for pfn in marked.tolist():
                cache.mark_dirty(BLOCK, pfn)
            cool()
            with undisturbed():
                times.append(_checkpoint(cache, epoch))
        words = cache.blocks[BLOCK].flush_set
        del times[0]  # it allocated the pages
        for one in times:
            pvm.fill(words)
            svm.fill(words)
            cool()
            with undisturbed():
                flush_set.move(pvm, svm)
                start = perf_counter_ns()
                runs = flush_set.find_runs()
                scan = perf_counter_ns() - start
                bitmap, log = np.zeros_like(words), words.copy()
                start = perf_counter_ns()
                baseline.qemu_union(bitmap, log)
                baseline.qemu_clear(bitmap, n_pages)
                qemu = perf_counter_ns() - start
            if (runs, flush_set.found_pages, one.flush_pages) != (SPARSE_PAGES,) * 3:
                raise WrongResultError(
                    f"of {SPARSE_PAGES} pages of a 1 TiB guest {one.flush_pages} were flushed, {runs} runs found"
                )
            more = {
                "union_ns": float(one.union_ns),
                "clear_ns": float(one.clear_ns),
                "scan_ns": float(scan),
                "checkpoint_ns": float(one.whole_ns),
            }
            ours = one.union_ns + one.clear_ns
            samples.append(Sample(ours, SPARSE_PAGES, runs, SPARSE_PAGES * 24, n_pages, qemu_ns=qemu, more=more))
            step(str(cell))
    return Row.of(cell, samples, backing="shm", threads=1)


def idle(ram_bytes: int, rounds: int, touch: baseline.Eviction, *, warm: bool, step: Callable[[str], None]) -> Row:
    """A checkpoint in which nothing is dirty: seal, flush and loaded."""
    n_pages = ram_bytes // PAGE
    cell = Cell("checkpoint", 0.0, 0, "nothing dirty", warm)
    samples = []
    with _sparse(ram_bytes) as cache:
        for epoch in range(1, 5 * rounds + 2):
            if not warm:
                touch.touch()
            with undisturbed():
                whole = _checkpoint(cache, epoch).whole_ns
            if epoch > 1:
                samples.append(Sample(whole, 0, 0, 0, n_pages))
        step(str(cell))
    return Row.of(cell, samples, backing="shm", threads=len(os.sched_getaffinity(0)))
