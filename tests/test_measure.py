# SPDX-License-Identifier: Apache-2.0
"""Measuring measures what it says: patterns, percentiles, checks that can fail, rows that can't be true."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from colocache import backing as bk
from colocache.errors import ArgumentError
from colocache.measure import baseline, bitmaps, cases, huge, report, words
from colocache.measure.cases import measure
from colocache.measure.cells import CASES, Cell, Sample, fits
from colocache.measure.clock import Spread, quantile
from colocache.measure.host import examine, peak_passes
from colocache.measure.patterns import WORKLOADS, Pattern, n_intervals, recorded, synthetic
from colocache.measure.rig import Rig, WrongResultError
from colocache.measure.rows import Row
from colocache.measure.session import Cooling, Plan, Result, Session, cells_for, thread_counts

RAM = 16 << 20
N_PAGES = RAM // 4096
TOUCH = 1 << 20


def run_lengths(bits: np.ndarray) -> list[int]:
    """Lengths of the runs, found in the plainest way."""
    lengths, now = [], 0
    for bit in [*bits.tolist(), False]:
        if bit:
            now += 1
        elif now:
            lengths.append(now)
            now = 0
    return lengths


# ---- patterns ----


@pytest.mark.parametrize("run", [1, 8, 64, 512])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5])
def test_a_pattern_has_the_share_and_the_run_length_that_were_asked_for(share: float, run: int) -> None:
    rng = np.random.default_rng(7)
    n_pages = 65536 - 13
    if not fits(Cell("flush", share, run), n_pages):
        pytest.skip("no such pattern in a guest of this size")
    pattern = synthetic(n_pages, share, run, rng)
    lengths = run_lengths(pattern.bits)
    assert set(lengths) == {run}
    assert pattern.n_runs == len(lengths)
    assert pattern.n_dirty == sum(lengths)
    assert pattern.share == pytest.approx(share, rel=0.25)
    other = synthetic(n_pages, share, run, rng)
    if (share, run) != (0.5, 1):  # where single pages leave no choice: every other page
        assert not np.array_equal(pattern.words, other.words), "each draw is a new one"
    assert pattern.words.size == 1024
    assert int(pattern.words[-1]) >> 51 == 0, "bits past the last page are zero"


def test_all_dirty_is_one_run_and_nothing_dirty_is_none() -> None:
    rng = np.random.default_rng(7)
    assert (synthetic(1000, 1.0, 8, rng).n_dirty, synthetic(1000, 1.0, 8, rng).n_runs) == (1000, 1)
    nothing = synthetic(1000, 0.0, 1, rng)
    assert (nothing.n_dirty, nothing.n_runs, nothing.mean_run) == (0, 0, 0.0)
    with pytest.raises(ArgumentError):
        synthetic(1000, 1.5, 8, rng)
    with pytest.raises(ArgumentError):
        synthetic(10, 0.5, 11, rng)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_recorded_patterns_are_as_dense_as_they_were_recorded_in_a_guest_of_any_size(workload: str) -> None:
    assert n_intervals(workload) >= 20
    once, larger = recorded(workload, 3, 131072), recorded(workload, 3, 300_001)
    assert 20 <= once.n_dirty <= 9000
    assert larger.n_pages == 300_001
    assert np.array_equal(larger.bits[:131072], once.bits)
    assert np.array_equal(larger.bits[131072:262144], once.bits)
    assert recorded(workload, 3, 4096).n_dirty > 0
    assert np.array_equal(recorded(workload, 3 + n_intervals(workload), 131072).words, once.words)


def test_an_unknown_workload_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="recorded are sqlite"):
        recorded("excel", 0, 1000)


# ---- clocks ----


def test_quantiles_lie_between_the_values() -> None:
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert quantile([5.0], 0.9) == 5.0
    assert Spread.of([9.0, 10.0, 11.0]).width == pytest.approx(0.16)
    few = Spread.of([9.0, 11.0])
    assert not few.known, "two rounds have a median and no spread"
    assert few.to_json() == {"p10": None, "p50": 10.0, "p90": None}
    with pytest.raises(ArgumentError):
        quantile([], 0.5)


# ---- baselines and cells ----


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(RAM, "shm", TOUCH) as made, made.threads(2):
        yield made


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_measured_and_its_result_is_right(rig: Rig, case: str) -> None:
    for number, (share, run) in enumerate([(0.1, 1), (0.5, 64), (1.0, 512)]):
        sample = measure(rig, Cell(case, share, run), number)
        assert sample.ours_ns > 0
        assert sample.guest_pages == N_PAGES
        assert sample.n_pages == pytest.approx(share * N_PAGES, rel=0.25)
        assert (sample.qemu_ns or sample.socket_ns or sample.numpy_ns or 0) > 0
    rig.cache.validate()


def test_recorded_and_warm_cells_are_measured(rig: Rig) -> None:
    sample = measure(rig, Cell("flush", 0.0, 0, "compile", True), 4)
    assert sample.n_pages == recorded("compile", 4, N_PAGES).n_dirty


def skip_a_page(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush after which one dirty page is as it was before."""
    right = cases.flush_ns

    def wrong(rig: Rig, pattern: Pattern) -> int:
        pfn = int(np.flatnonzero(pattern.bits)[pattern.n_dirty // 2])
        before = rig.guest[pfn].copy()
        took = right(rig, pattern)
        rig.guest[pfn] = before
        return took

    monkeypatch.setattr(cases, "flush_ns", wrong)


def write_a_page_too_many(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that also copies a clean page."""
    right = cases.flush_ns

    def wrong(rig: Rig, pattern: Pattern) -> int:
        took = right(rig, pattern)
        pfn = int(np.flatnonzero(~pattern.bits)[5])
        rig.guest[pfn] = rig.cached[pfn]
        return took

    monkeypatch.setattr(cases, "flush_ns", wrong)


@pytest.mark.parametrize("case", ["flush", "pause"])
@pytest.mark.parametrize(
    ("spoil", "sentence"), [(skip_a_page, "dirty and was not copied"), (write_a_page_too_many, "clean and was written")]
)
def test_a_wrong_copy_fails_its_cell(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, case: str, spoil: object, sentence: str
) -> None:
    assert callable(spoil)
    spoil(rig, monkeypatch)
    with pytest.raises(WrongResultError, match=sentence):
        measure(rig, Cell(case, 0.1, 8), 0)


def test_a_page_that_is_wrong_in_one_word_only_is_found_among_the_sampled_ones(rig: Rig) -> None:
    pattern = synthetic(N_PAGES, 0.001, 1, rig.rng)  # few enough that all are sampled
    rig.poison(pattern)
    dirty = np.flatnonzero(pattern.bits)
    rig.guest[dirty] = rig.plain[dirty]
    rig.check(pattern, "by hand")
    rig.guest[dirty[1], 1000] ^= 1
    with pytest.raises(WrongResultError, match=f"the first is {dirty[1]}"):
        rig.check(pattern, "by hand")


def test_the_baselines_copy_what_the_bitmap_says_and_empty_it(rig: Rig) -> None:
    for copy in (
        lambda words: baseline.qemu_flush(words, N_PAGES, rig.guest_addr, rig.plain_addr),
        lambda words: baseline.numpy_flush(words, N_PAGES, rig.guest, rig.plain),
    ):
        pattern = synthetic(N_PAGES, 0.1, 8, rig.rng)
        words = pattern.words.copy()
        rig.poison(pattern)
        assert copy(words) == pattern.n_dirty
        rig.check(pattern, "the baseline")
        assert not words.any()


@pytest.mark.parametrize(("variant", "side_by_side"), peak_passes())
def test_a_peak_pass_copies_every_page_and_not_a_byte_more(variant: str, side_by_side: bool) -> None:
    n_pages = 512 + 512 + 37  # two stretches, and a part of one
    rng = np.random.default_rng(7)
    source = np.frombuffer(mmap.mmap(-1, (n_pages + 1) * 4096), np.uint8)
    to = np.frombuffer(mmap.mmap(-1, (n_pages + 1) * 4096), np.uint8)
    for n_threads in (1, 3):
        source[:] = rng.integers(0, 256, source.size, np.uint8)
        to[:] = rng.integers(0, 256, to.size, np.uint8)
        after = to[-4096:].copy()
        with baseline.Pool(n_threads) as pool:
            pool.sequential(to.ctypes.data, source.ctypes.data, n_pages * 4096, variant, side_by_side)
        assert np.array_equal(to[:-4096], source[:-4096])
        assert np.array_equal(to[-4096:], after)


def test_a_session_goes_on_after_a_wrong_cell_and_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.MEASURES["pause"]

    def wrong(rig: Rig, cell: Cell, pattern: Pattern) -> Sample:
        right(rig, cell, pattern)
        raise WrongResultError("two pages are wrong")

    monkeypatch.setitem(cases.MEASURES, "pause", wrong)
    found = Session(Plan((RAM,), ("shm",), (1,), 2, quick=True), small_host()).run()
    assert {row.case for row in found.rows if row.wrong} == {"pause"}
    assert {row.case for row in found.rows if not row.wrong} >= {"flush", "checkpoint", "receive", "union"}
    assert any("WRONG RESULT" in line and "two pages are wrong" in line for line in report.verdicts(found))


# ---- rows ----


def sample(ours_ns: int, *, qemu_ns: int = 4000, peak_ns: int = 10_000) -> Sample:
    """100 pages of a guest of 1,000 in 50 runs."""
    return Sample(ours_ns, 100, 50, 409_600, 1000, qemu_ns=qemu_ns, peak_ns=peak_ns, peak_bytes=4_096_000)


def row_of(*samples: Sample) -> Row:
    return Row.of(Cell("flush", 0.1, 2), samples, backing="shm", threads=2)


def test_a_row_is_the_median_of_its_rounds() -> None:
    row = row_of(sample(2000), sample(1000), sample(4000))
    assert (row.seconds.p50, row.dirty_ratio, row.run_pages, row.rounds) == (2e-6, 0.1, 2.0, 3)
    assert row.gb_per_s == pytest.approx(204.8)
    assert row.of_peak == pytest.approx(0.5)
    assert row.baseline_ratio == pytest.approx(2.0)
    assert row.error is None


def test_more_than_peak_is_a_measuring_error_and_up_to_three_percent_more_is_not() -> None:
    assert row_of(sample(1000, peak_ns=10_290)).error is None
    row = row_of(sample(1000, peak_ns=10_310))
    assert row.error is not None
    assert "measuring error" in row.error
    result = Result(examine(), Plan(), rows=[row], peaks={("shm", 2): [1.0, 1.0]})
    assert any("Not to be believed" in line for line in report.verdicts(result))


def test_slower_than_qemu_counts_only_beyond_the_spread_of_the_rounds() -> None:
    assert row_of(sample(5000), sample(5100), sample(5200)).slower
    assert not row_of(sample(3000), sample(5100), sample(6200)).slower
    assert not row_of(sample(3000), sample(3100), sample(3200)).slower
    assert not row_of(sample(5000), sample(5100)).slower, "two rounds are no verdict"


def test_noise_is_the_spread_of_the_peak_and_has_its_word() -> None:
    peaks = {("shm", 1): [10.0, 10.0, 10.0], ("shm", 2): [10.0, 15.0, 20.0]}
    result = Result(examine(), Plan(), peaks=peaks, rows=[row_of(sample(2000), sample(1000), sample(4000))])
    assert result.noise == pytest.approx(8 / 15)
    assert "very noisy" in words.noise(result.noise)
    assert "was quiet" in words.noise(0.05)


def test_fewer_than_three_rounds_give_neither_a_spread_nor_a_verdict() -> None:
    result = Result(examine(), Plan(), peaks={("shm", 2): [10.0] * 40}, rows=[row_of(sample(9000), sample(9000))])
    assert result.noise is None
    said = " ".join(report.verdicts(result))
    assert "2 rounds: no spread and no verdict from fewer than 3." in said
    assert "can't be told from fewer than 3 rounds" in said
    assert "Slower" not in said


def test_a_cell_above_the_peak_is_drawn_as_an_error_and_run_lengths_keep_their_colours(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from colocache.measure import plots

    rows = [
        dataclasses.replace(row_of(sample(2000), sample(1000), sample(4000)), run_pages=float(run), case=case)
        for run in (1, 64)
        for case in ("flush", "pause")
    ]
    peaks = {("shm", 2): [1.0, 1.1, 1.2]}
    texts = []
    for number, bad in enumerate((None, "measuring error: 1.3 of the peak")):
        folder = tmp_path / str(number)
        result = Result(examine(), Plan(), rows=[*rows[:-1], dataclasses.replace(rows[-1], error=bad)], peaks=peaks)
        plots.draw(result, folder)
        texts.append([(folder / f"{name}.svg").read_text() for name in ("throughput", "pause")])
    for text in texts[0] + texts[1]:
        assert all(plots.LOOKS[run][0] in text for run in (1, 64))
    assert ["measuring error" in text for text in texts[0]] == [False, False]
    assert ["measuring error" in text for text in texts[1]] == [False, True]


# ---- plans ----


def small_host() -> object:
    """This machine with little to touch, so that tests are short."""

    @dataclasses.dataclass(frozen=True)
    class Small(type(examine())):  # type: ignore[misc]
        @property
        def touch_bytes(self) -> int:
            return TOUCH

    return Small(**dataclasses.asdict(examine()))


def test_threads_go_from_one_to_all_by_doubling() -> None:
    assert thread_counts(1) == (1,)
    assert thread_counts(2) == (1, 2)
    assert thread_counts(12) == (1, 2, 4, 8, 12)


def test_the_plan_covers_every_share_and_run_length_once() -> None:
    planned = cells_for(Plan(), 65536, 2, 2)
    assert len(planned) == len(set(planned))
    assert {cell.case for cell in planned} == set(CASES)
    flushes = [cell for cell in planned if cell.case == "flush" and cell.pattern == "synthetic"]
    assert {cell.share for cell in flushes} == {0.001, 0.01, 0.1, 0.5, 1.0}
    assert {cell.run_pages for cell in flushes} == {1, 8, 64, 512}
    assert {cell.pattern for cell in planned} == {"synthetic", *WORKLOADS}
    assert not any(cell.warm for cell in planned)
    assert len(cells_for(Plan(warm=True), 65536, 2, 2)) == 2 * len(planned)


def test_too_little_memory_means_a_smaller_guest_never_none() -> None:
    cooling = Cooling.of(Plan(), examine())
    assert cooling.affordable(1 << 30, 1 << 40) == 1 << 30
    assert 16 << 20 <= cooling.affordable(1 << 40, 1 << 30) < 1 << 30
    assert cooling.affordable(1 << 30, 0) == 16 << 20
    assert cooling.affordable(1 << 30, 1 << 40, (2 << 30) - 1) == 512 << 20, "two images go into the backing's room"


@pytest.mark.parametrize("lines", [True, False])
def test_a_quick_run_does_the_same_work_however_large_the_l3_is_and_says_why(
    monkeypatch: pytest.MonkeyPatch, lines: bool
) -> None:
    monkeypatch.setattr("colocache.measure.session.can_evict", lambda: lines)
    small, large = (dataclasses.replace(examine(), l3_bytes=size << 20) for size in (16, 480))
    for host, reason in ((small, ""), (large, "the L3 has 480 MiB")):
        cooling = Cooling.of(Plan(quick=True), host)
        assert cooling.ram_bytes == 64 << 20
        assert cooling.touch_bytes <= 256 << 20
        assert reason in cooling.reason
        assert bool(reason) == bool(cooling.reason)
        assert cooling.by_lines is lines
    whole = Cooling.of(Plan(), large)
    assert (whole.ram_bytes, whole.touch_bytes, whole.reason) == (1920 << 20, 960 << 20, "")
    if lines and not baseline.can_evict():
        pytest.skip("this CPU can't push single lines out of its caches")
    found = Session(Plan((RAM,), ("shm",), (1,), quick=True), large).run()
    assert found.cold_by == ("lines" if lines else "touching")
    assert any("the L3 has 480 MiB" in note for note in found.notes)


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_quick_run_gives_three_rounds_and_a_verdict_however_slow_the_machine_is_and_says_what_it_left_out(
    seconds: float,
) -> None:
    large = dataclasses.replace(examine(), l3_bytes=480 << 20)
    found = Session(Plan((RAM,), ("shm",), (1, 2), quick=True, seconds=seconds), large).run()
    assert {row.rounds for row in found.rows} == {3}
    assert found.noise is not None
    assert not any("fewer than 3" in line for line in report.verdicts(found))
    assert any(row.case == "pause" and row.threads == 2 for row in found.rows), "the answer is measured in any case"
    n_cells = sum(len(cells_for(found.plan, N_PAGES, n, 2)) for n in (1, 2))
    left_out = [note for note in found.notes if "are left out" in note]
    if seconds:
        assert (len(found.rows), left_out) == (n_cells, [])
    else:
        assert len(found.rows) == 1
        assert left_out == [
            f"--quick had no time for 3 rounds of every cell on shm: {n_cells - 1} of {n_cells} are left out"
        ]


def test_a_quick_run_without_time_for_another_backing_says_so() -> None:
    found = Session(Plan((RAM,), ("shm", "shm"), (1,), quick=True, seconds=0.0), small_host()).run()
    assert "no shm: --quick had no time left for it" in found.notes
    assert len(found.rows) == 1


def test_lines_that_are_pushed_out_keep_their_bytes() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
    memory[:] = np.random.default_rng(7).integers(0, 256, memory.size, np.uint8)
    before = memory.copy()
    baseline.evict(int(memory.ctypes.data), memory.size)
    assert np.array_equal(memory, before)


def test_a_machine_that_lacks_huge_pages_is_told_how_many_were_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def lend(pages: int) -> Iterator[int]:
        yield pages

    monkeypatch.setattr("colocache.measure.session.borrowed", lend)
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(1000, 1000))
    found = Session(Plan((RAM,), ("hugetlb", "shm"), (1,), 1, quick=True), small_host()).run()
    assert "16 huge pages of 2 MiB were reserved for the 16 MiB guest and given back" in found.notes


# ---- large guests ----


def test_large_guests_are_measured_with_the_right_number_of_pages() -> None:
    steps: list[str] = []
    touch = baseline.Eviction(TOUCH)
    dense = bitmaps.dense(1, touch, warm=False, step=steps.append)
    assert (dense.n_pages, dense.ram_bytes) == (3_190_000, 16 << 30)
    assert dense.more["ns_per_run"] > 0
    sparse = bitmaps.sparse(1, touch, warm=True, step=steps.append)
    assert (sparse.n_pages, sparse.n_runs, sparse.ram_bytes) == (1000, 1000, 1 << 40)
    idle = bitmaps.idle(1 << 30, 1, touch, warm=True, step=steps.append)
    assert (idle.n_pages, idle.n_bytes) == (0, 0)
    assert len(steps) == 3


# ---- huge pages ----


@pytest.fixture
def knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 10 huge pages, none free, that gives as many as are asked for."""
    path = tmp_path / "nr_hugepages"
    path.write_text("10\n")
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(10, 0))
    return path


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit, ValueError])
def test_borrowed_huge_pages_are_given_back_however_it_ends(knob: Path, error: type[BaseException] | None) -> None:
    def body() -> None:
        with huge.borrowed(7, path=knob) as added:
            assert added == 7
            assert knob.read_text().strip() == "17"
            if error:
                raise error

    if error:
        with pytest.raises(error):
            body()
    else:
        body()
    assert knob.read_text().strip() == "10"


def test_what_others_reserved_meanwhile_stays_theirs(knob: Path) -> None:
    with huge.borrowed(7, path=knob):
        knob.write_text("117\n")
    assert knob.read_text().strip() == "110"


def test_without_the_right_to_reserve_nothing_changes(knob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge, "_write", lambda *_: False)
    with huge.borrowed(7, path=knob) as added:
        assert added == 0
    assert huge.command_for(7) == "sysctl vm.nr_hugepages=17"
