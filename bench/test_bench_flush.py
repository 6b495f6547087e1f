# SPDX-License-Identifier: Apache-2.0
"""The flush, beside the peak copy, QEMU's way and a numpy loop, all onto the same guest image."""

from __future__ import annotations

from typing import Any

import pytest

from colocache.measure import baseline
from colocache.measure.host import peak_passes
from colocache.measure.patterns import Pattern
from colocache.measure.rig import PAGE

CASE = "flush"


def test_ours(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        rig.arm(pattern)
        rig.seal()
        return ()

    def check(pattern: Pattern) -> None:
        rig.cache.loaded()
        rig.check(pattern, "our flush")

    bench.run("ours", prepare, rig.cache.flush, check)


def test_qemu(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        return pattern.words.copy(), rig.n_pages, rig.guest_addr, rig.plain_addr

    bench.run("qemu", prepare, baseline.qemu_flush, lambda pattern: rig.check(pattern, "QEMU's way"))


def test_numpy(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        return pattern.words.copy(), rig.n_pages, rig.guest, rig.plain

    bench.run("numpy", prepare, baseline.numpy_flush, lambda pattern: rig.check(pattern, "the numpy loop"))


@pytest.mark.parametrize(("variant", "side_by_side"), peak_passes())
def test_peak(bench: Any, variant: str, side_by_side: bool) -> None:
    """As many bytes as the flush copies, in one sequential pass: the least time that this memory allows for them."""
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        return rig.guest_addr, rig.cache_addr, pattern.n_dirty * PAGE, variant, side_by_side

    def check(pattern: Pattern) -> None:
        assert (rig.guest[: pattern.n_dirty] == rig.cached[: pattern.n_dirty]).all()

    bench.run(f"peak {variant}{' side by side' if side_by_side else ''}", prepare, rig.pool.sequential, check)
