# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is measured beside did its work too; both ratios are told; nothing hangs if an end dies."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

import numpy as np
import pytest

from colocache.errors import ColocacheError
from colocache.measure import tables
from colocache.measure.cases import measure
from colocache.measure.cells import Cell, Sample
from colocache.measure.patterns import Pattern, synthetic
from colocache.measure.rig import BLOCK, Rig, WrongResultError
from colocache.measure.rows import Row
from colocache.measure.transfer import Transfer

RAM = 16 << 20
CELL = Cell("checkpoint", 0.1, 8)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(RAM, "shm", 1 << 20) as made, made.threads(2):
        yield made


def sample(ours_ns: int, socket_ns: int, in_place_ns: int) -> Sample:
    return Sample(ours_ns, 100, 50, 409_600, 1000, socket_ns=socket_ns, in_place_ns=in_place_ns)


def test_a_checkpoint_is_measured_beside_both_and_leaves_the_memory_as_the_next_cell_needs_it(rig: Rig) -> None:
    for number in range(4):  # in another order each
        taken = measure(rig, CELL, number)
        assert taken.socket_ns is not None
        assert taken.in_place_ns is not None
        assert min(taken.ours_ns, taken.socket_ns, taken.in_place_ns) > 0
        assert np.array_equal(rig.plain, rig.cached)
    rig.cache.validate(compare_pages=False)
    measure(rig, Cell("flush", 0.1, 8), 0)


@pytest.mark.parametrize("way", ["checkpoint", "hot", "in_place"])
def test_a_way_that_leaves_a_page_out_is_no_result(rig: Rig, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    right = getattr(Transfer, way)

    def wrong(transfer: Transfer, pattern: Pattern) -> int:
        bits = pattern.bits.copy()
        bits[np.flatnonzero(bits)[pattern.n_dirty // 2]] = False
        return int(right(transfer, Pattern.of(bits)))

    monkeypatch.setattr(Transfer, way, wrong)
    with pytest.raises(WrongResultError, match="dirty and was not copied"):
        measure(rig, CELL, 0)


def test_pages_in_place_are_stored_in_the_cache_and_nothing_else_is(rig: Rig) -> None:
    pattern = synthetic(rig.n_pages, 0.1, 8, rig.rng)
    with Transfer(rig) as transfer:
        before = rig.cached.copy()
        rig.plain[:] = ~rig.plain
        transfer.in_place(pattern)
    assert np.array_equal(rig.cached[pattern.bits], ~before[pattern.bits])
    assert np.array_equal(rig.cached[~pattern.bits], before[~pattern.bits])
    assert np.array_equal(rig.guest[pattern.bits], rig.cached[pattern.bits])


def test_our_checkpoint_seals_an_epoch_with_the_pages_of_both_machines(rig: Rig) -> None:
    pattern = synthetic(rig.n_pages, 0.1, 8, rig.rng)
    with Transfer(rig) as transfer:
        transfer.stamp(pattern)
        took = transfer.checkpoint(pattern)
        assert 0 < transfer.arrived_ns < took
    status = rig.cache.status()
    assert status.sealed_epoch == status.committed_epoch == rig.epoch
    assert np.array_equal(rig.cache.blocks[BLOCK].flush_set, pattern.words)


@pytest.mark.parametrize("way", ["checkpoint", "hot", "in_place"])
@pytest.mark.parametrize("end", ["_near", "_far"])
def test_an_end_that_is_lost_is_an_error_and_no_wait(rig: Rig, way: str, end: str) -> None:
    pattern = synthetic(rig.n_pages, 0.1, 8, rig.rng)
    with Transfer(rig) as transfer:
        getattr(transfer, end).shutdown(socket.SHUT_RDWR)
        with pytest.raises(ColocacheError):
            getattr(transfer, way)(pattern)


def test_a_row_has_the_ratio_to_each_with_its_spread_and_the_socket_is_still_the_baseline() -> None:
    rows = [Row.of(CELL, [sample(100, 50 * n, 100 * n) for n in (1, 2, 3)], backing="shm", threads=2)]
    assert (rows[0].baseline, rows[0].baseline_ratio) == ("socket", 1.0)
    told = rows[0].to_json()["ratios"]
    assert told["socket"] == pytest.approx({"p10": 0.6, "p50": 1.0, "p90": 1.4})
    assert told["in_place"] == pytest.approx({"p10": 1.2, "p50": 2.0, "p90": 2.8})
    ((_, columns, body),) = tables.tables(rows, "checkpoint")
    shown = dict(zip([(at, column.heading) for at, column in enumerate(columns)], body[0], strict=True))
    assert [value for (_, heading), value in shown.items() if "times" in heading] == ["1.00", "2.00"]
    assert [value for (_, heading), value in shown.items() if heading == "p10–p90"][1:] == ["0.60–1.40", "1.20–2.80"]


def test_other_cases_have_no_columns_for_it() -> None:
    flush = Sample(100, 100, 50, 409_600, 1000, qemu_ns=200)
    row = Row.of(dataclasses.replace(CELL, case="flush"), [flush] * 3, backing="shm", threads=2)
    assert set(row.ratios) == {"qemu"}
    ((_, columns, _),) = tables.tables([row], "flush")
    assert not any("in place" in column.heading for column in columns)
