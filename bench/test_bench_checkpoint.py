# SPDX-License-Identifier: Apache-2.0
"""A whole checkpoint over a socket: receive, sync of the SVM's log, seal, flush, loaded; and its pause alone.

Beside it: the same bytes through the same socket into one buffer, and QEMU's union and flush.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from colocache.measure import baseline
from colocache.measure.patterns import Pattern
from colocache.measure.rig import PAGE, Rig
from colocache.measure.transfer import Transfer

CASE = "checkpoint"


@pytest.fixture
def transfer(rig_of: Rig) -> Iterator[Transfer]:
    """The primary's end, sending from the rig's plain memory."""
    with Transfer(rig_of) as made:
        yield made


def test_ours(bench: Any, transfer: Transfer) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        transfer.stamp(pattern)
        rig.note_plain()
        rig.poison(pattern)
        return (pattern,)

    bench.run("ours", prepare, transfer.checkpoint, lambda pattern: rig.check(pattern, "our checkpoint"))


def test_pause(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        rig.arm(pattern)
        rig.cache.device_state_buffer(rig.epoch + 1, 0)
        return (rig.epoch + 1,)

    def timed(epoch: int) -> None:
        rig.cache.seal(epoch)
        rig.cache.flush()
        rig.cache.loaded()

    def check(pattern: Pattern) -> None:
        rig.epoch += 1
        rig.check(pattern, "our seal and flush")

    bench.run("ours, seal to loaded", prepare, timed, check)


def test_socket(bench: Any, transfer: Transfer) -> None:
    bench.run("raw socket", lambda pattern: (pattern.n_dirty * PAGE,), transfer.raw)


def test_qemu_pause(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        half = rig.rng.integers(0, 1 << 64, pattern.words.size, np.uint64)
        return pattern.words & half, pattern.words & ~half

    def timed(bitmap: Any, log: Any) -> None:
        baseline.qemu_union(bitmap, log)
        baseline.qemu_flush(bitmap, rig.n_pages, rig.guest_addr, rig.plain_addr)

    bench.run("qemu, union and flush", prepare, timed, lambda pattern: rig.check(pattern, "QEMU's way"))
