# SPDX-License-Identifier: Apache-2.0
"""A whole checkpoint over a socket: receive, sync of the SVM's log, seal, flush, loaded.

Beside it, each with QEMU's union and flush: the same bytes through the same socket from one hot buffer into another,
and the same pages from and to where they lie. Whole calls are timed, the making of a thread included; `colocache bench`
times what is between the first byte and the end. In a group of their own: the flush's part of the pause, and QEMU's
union and flush alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from colocache.measure import baseline
from colocache.measure.patterns import Pattern
from colocache.measure.rig import Rig
from colocache.measure.transfer import Transfer

CASE = "checkpoint"
PAUSE = "the flush's part"


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

    bench.run("ours, seal to loaded", prepare, timed, check, part=PAUSE)


def halves(rig: Rig, pattern: Pattern) -> tuple[Any, Any]:
    """The pattern as the bits of received pages and those of the SVM's log."""
    half = rig.rng.integers(0, 1 << 64, pattern.words.size, np.uint64)
    return pattern.words & half, pattern.words & ~half


def test_socket_and_qemu(bench: Any, transfer: Transfer) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        return (pattern,)

    bench.run("raw socket, then qemu", prepare, transfer.hot, lambda pattern: rig.check(pattern, "QEMU's way"))


def test_in_place_and_qemu(bench: Any, transfer: Transfer) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        transfer.stamp(pattern)
        rig.note_plain()
        rig.poison(pattern)
        return (pattern,)

    bench.run("pages in place, then qemu", prepare, transfer.in_place, lambda pattern: rig.check(pattern, "QEMU's way"))


def test_qemu_pause(bench: Any) -> None:
    rig = bench.rig

    def prepare(pattern: Pattern) -> tuple[Any, ...]:
        rig.poison(pattern)
        return halves(rig, pattern)

    def timed(bitmap: Any, log: Any) -> None:
        baseline.qemu_union(bitmap, log)
        baseline.qemu_flush(bitmap, rig.n_pages, rig.guest_addr, rig.plain_addr)

    bench.run("qemu, union and flush", prepare, timed, lambda pattern: rig.check(pattern, "QEMU's way"), part=PAUSE)
