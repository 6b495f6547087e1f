# SPDX-License-Identifier: Apache-2.0
"""The oracle says what the rules in guest_program.h say, told here once more, a step at a time, in plain integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocache.errors import ArgumentError
from colocache.vmm import history as oracle
from colocache.vmm.history import History, consult, page_words, wrong_pages
from colocache.vmm.workload import GuestOptions, Workload, workload_for

M64 = (1 << 64) - 1


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def replay(entries: list[tuple[int, int]], work: Workload, n_steps: int) -> dict[int, int]:
    """First word of each page ever written, by walking forward."""
    first_words: dict[int, int] = {}
    for step in range(entries[0][0] if entries else 0, n_steps):
        salt = next(salt for first, salt in reversed(entries) if first <= step)
        h = mix(salt + (step + 1) * 0x9E3779B97F4A7C15 & M64)
        kind, at = h & 0xFFFF, (h >> 32) * work.n_pages >> 32
        if kind < work.rewrite_below:
            continue
        length = 1
        if kind < work.run_below:
            length = 2 + ((h >> 16 & 0xFFFF) * (work.run_pages - 1) >> 16)
        for page in range(at, min(at + length, work.n_pages)):
            pfn = work.first_page + page
            first_words[pfn] = mix(h ^ (pfn + 1) * 0xD6E8FEB86659FD93 & M64)
    return first_words


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Workload, int]:
    ram_pages = draw(st.integers(1, 300))
    first = draw(st.integers(0, ram_pages - 1))
    rewrite = draw(st.integers(0, 65536))
    work = Workload(
        first,
        draw(st.integers(1, ram_pages - first)),
        draw(st.integers(1, 40)),
        rewrite,
        draw(st.integers(rewrite, 65536)),
    )
    return work, ram_pages


@settings(deadline=None, max_examples=150)
@given(workloads(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, M64)), max_size=6), st.integers(0, 90))
def test_the_oracle_agrees_with_a_walk_through_every_step(
    sized: tuple[Workload, int], resumes: list[tuple[int, int]], more: int
) -> None:
    work, ram_pages = sized
    history, entries, step = History(), [], 0
    for steps, salt in resumes:
        history.append(step, salt)
        entries.append((step, salt))
        step += steps
    n_steps = step + more if entries else 0
    want = replay(entries, work, n_steps)
    seeds, written, needed = consult(history, work, n_steps, ram_pages)
    assert {int(page): int(seeds[page]) for page in np.flatnonzero(written)} == want
    history.forget_before(needed)
    assert np.array_equal(consult(history, work, n_steps, ram_pages).seeds, seeds)


def test_the_walk_back_in_small_chunks_finds_the_same_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    work, history = Workload(3, 200, 9, 3000, 9000), History()
    for first, salt in [(0, 11), (400, 12), (401, 13), (1500, 14)]:
        history.append(first, salt)
    whole = consult(history, work, 2345, 210)
    monkeypatch.setattr(oracle, "CHUNK", 7)
    pieces = consult(history, work, 2345, 210)
    assert np.array_equal(whole[0], pieces[0])
    assert np.array_equal(whole[1], pieces[1])


def test_the_walk_back_stops_when_every_page_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = oracle.stores
    monkeypatch.setattr(oracle, "stores", lambda *args: asked.append(args[2:]) or real(*args))
    history = History()
    history.append(0, 5)
    must = consult(history, Workload(0, 64, 1, 0, 0), 1 << 60, 64)
    assert must.written.all()
    assert must.needed == (1 << 60) - oracle.CHUNK
    assert len(asked) == 1


def test_a_salt_that_decided_no_step_leaves_no_trace() -> None:
    history = History()
    for first, salt in [(0, 1), (0, 2), (7, 3), (7, 4), (7, 5)]:
        history.append(first, salt)
    assert history.array.tolist() == [[0, 2], [7, 5]]


def test_a_history_does_not_go_back_nor_past_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History()
    history.append(9, 1)
    with pytest.raises(ArgumentError, match="before step 9"):
        history.append(8, 1)
    monkeypatch.setattr(oracle, "ENTRIES_MAX", 3)
    history.append(10, 1)
    history.append(11, 1)
    with pytest.raises(ArgumentError, match="3 times"):
        history.append(12, 1)


@pytest.mark.parametrize(
    ("step", "left"), [(0, [0, 5, 9]), (4, [0, 5, 9]), (5, [5, 9]), (8, [5, 9]), (9, [9]), (1000, [9])]
)
def test_forgetting_keeps_the_salt_in_force_at_that_step(step: int, left: list[int]) -> None:
    history = History()
    for first in (0, 5, 9):
        history.append(first, first + 100)
    history.forget_before(step)
    assert history.array.tolist() == [[first, first + 100] for first in left]
    history.append(2000, 7)
    assert history.array.tolist()[-1] == [2000, 7]


def test_a_history_grows_and_survives_a_copy() -> None:
    history = History()
    for step in range(1000):
        history.append(step, step ^ 0xABCD)
    again = History(history.array.copy())
    again.append(1000, 1)
    assert len(history) == 1000
    assert again.array[:1000].tolist() == history.array.tolist() == [[step, step ^ 0xABCD] for step in range(1000)]


@pytest.mark.parametrize("damage", ["one bit", "stale", "half stale", "other place", "cleared", "written"])
def test_every_kind_of_wrong_page_is_found(damage: str) -> None:
    seeds = np.arange(1000, 1300, dtype=np.uint64) * np.uint64(0x1234567)
    written = np.arange(300) % 5 != 0
    memory = page_words(seeds)
    memory[~written] = 0
    assert len(wrong_pages(memory, seeds, written)) == 0
    at = 255 if damage == "written" else 299
    memory[at] = {
        "one bit": memory[at] ^ np.where(np.arange(512) == 511, np.uint64(1 << 63), np.uint64(0)),
        "stale": page_words(np.array([77], dtype=np.uint64))[0],
        "half stale": np.concatenate([page_words(np.array([77], dtype=np.uint64))[0, :256], memory[at, 256:]]),
        "other place": memory[298],
        "cleared": np.zeros(512, dtype=np.uint64),
        "written": np.where(np.arange(512) == 100, np.uint64(1), np.uint64(0)),
    }[damage]
    assert wrong_pages(memory, seeds, written).tolist() == [at]


def test_the_default_working_set_is_an_eighth_across_the_split() -> None:
    work = workload_for(GuestOptions(), 8000, 5037)
    assert work.n_pages == 1000
    assert work.first_page < 5037 < work.first_page + work.n_pages


@pytest.mark.parametrize(("asked", "got"), [(1, 1), (4096, 1), (4097, 2), (1 << 40, 8000)])
def test_a_working_set_is_at_least_a_page_and_at_most_all_of_it(asked: int, got: int) -> None:
    work = workload_for(GuestOptions(working_set_bytes=asked), 8000, 5037)
    assert work.n_pages == got
    assert work.fits(8000)


@pytest.mark.parametrize(
    "options",
    [
        {"working_set_bytes": -1},
        {"steps_per_second": -1.0},
        {"steps_per_second": float("nan")},
        {"run_pages": 0},
        {"run_pages": 4097},
        {"run_share": 0.7, "rewrite_share": 0.4},
        {"rewrite_share": -0.1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError):
        GuestOptions(**options)  # type: ignore[arg-type]
