# SPDX-License-Identifier: Apache-2.0
"""The union of the two bitmaps with its counts, and their clearing, beside QEMU's and numpy's ways."""

from __future__ import annotations

from typing import Any

import numpy as np

from colocache.measure import baseline
from colocache.measure.patterns import Pattern

CASE = "union"


def halves(rig: Any, pattern: Pattern) -> tuple[Any, Any]:
    """The pattern as two bitmaps whose union it is."""
    half = rig.rng.integers(0, 1 << 64, pattern.words.size, np.uint64)
    return pattern.words & half, pattern.words & ~half


def test_ours(bench: Any) -> None:
    rig = bench.rig
    with (
        baseline.Bitmap(rig.n_pages) as united,
        baseline.Bitmap(rig.n_pages) as pvm,
        baseline.Bitmap(rig.n_pages) as svm,
    ):

        def prepare(pattern: Pattern) -> tuple[Any, ...]:
            for bitmap, words in zip((pvm, svm), halves(rig, pattern), strict=True):
                bitmap.fill(words)
            return pvm, svm

        def check(pattern: Pattern) -> None:
            assert np.array_equal(united.words, pattern.words)
            assert not pvm.words.any()
            assert not svm.words.any()

        bench.run("ours", prepare, united.move, check, n_bytes=3 * pvm.words.nbytes)


def test_qemu(bench: Any) -> None:
    rig = bench.rig
    kept: list[Any] = []

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        kept[:] = halves(rig, pattern)
        return tuple(kept)

    def timed(bitmap: Any, log: Any) -> None:
        baseline.qemu_union(bitmap, log)
        baseline.qemu_clear(bitmap, rig.n_pages)

    def check(_: Pattern) -> None:
        assert not kept[0].any()

    bench.run("qemu", prepare, timed, check)


def test_numpy(bench: Any) -> None:
    rig = bench.rig
    out: list[Any] = []

    def timed(pvm: Any, svm: Any) -> None:
        both = pvm | svm
        out[:] = [both, int(np.unpackbits(both.view(np.uint8)).sum())]
        pvm[:] = 0
        svm[:] = 0

    def check(pattern: Pattern) -> None:
        assert np.array_equal(out[0], pattern.words)
        assert out[1] == pattern.n_dirty

    bench.run("numpy", lambda pattern: halves(rig, pattern), timed, check)
