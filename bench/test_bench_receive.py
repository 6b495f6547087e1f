# SPDX-License-Identifier: Apache-2.0
"""Pages from a buffer into the cache image with their bits, beside numpy's fancy indexing."""

from __future__ import annotations

from typing import Any

import numpy as np

from colocache.measure.patterns import Pattern
from colocache.measure.rig import BLOCK

CASE = "receive"


def test_ours(bench: Any) -> None:
    rig = bench.rig
    kept: list[Any] = []

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        pfns = np.flatnonzero(pattern.bits).astype(np.uint64)
        kept[:] = [pfns, rig.incoming(pfns.size)]
        return rig.epoch + 1, BLOCK, pfns, kept[1]

    def check(pattern: Pattern) -> None:
        pfns, pages = kept
        assert np.array_equal(rig.cache.blocks[BLOCK].pvm_bitmap, pattern.words)
        assert np.array_equal(rig.cached[pfns], pages)
        rig.settle()

    bench.run("ours", prepare, rig.cache.receive_pages, check)


def test_numpy(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        pfns = np.flatnonzero(pattern.bits)
        return pfns, rig.incoming(pfns.size), np.zeros_like(pattern.words)

    def timed(pfns: Any, pages: Any, bitmap: Any) -> None:
        rig.plain[pfns] = pages
        np.bitwise_or.at(bitmap, pfns >> 6, np.uint64(1) << (pfns & 63).astype(np.uint64))

    bench.run("numpy", prepare, timed)
    rig.plain[:] = rig.cached
