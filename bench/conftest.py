# SPDX-License-Identifier: Apache-2.0
"""What the suites share: a rig per backing and thread count, the cells, and the rounds.

    pytest bench               a short set, under two minutes
    pytest bench --full        every share, run length, thread count; --ram 1G, --rounds 9 as you like
    pytest bench --warm        without touching other memory before each timed call

Each benchmark's group holds our way and its baselines on the same memory: compare inside a group.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from colocache import backing as bk
from colocache.commands.options import parse_size
from colocache.errors import ColocacheError
from colocache.measure.cells import RUNS, SHARES, Cell, fits
from colocache.measure.host import Host, examine
from colocache.measure.huge import borrowed
from colocache.measure.patterns import Pattern
from colocache.measure.rig import PAGE, Rig
from colocache.measure.session import thread_counts

SHORT_SHARES, SHORT_RUNS = (0.01, 0.5), (1, 64)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("colocache")
    group.addoption("--full", action="store_true", help="every share, run length and thread count")
    group.addoption("--warm", action="store_true", help="do not touch other memory before each timed call")
    group.addoption("--ram", type=parse_size, default=128 << 20, help="guest RAM (default 128M)")
    group.addoption("--rounds", type=int, default=5, help="rounds of each benchmark (default 5)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "cell" in metafunc.fixturenames:
        case = metafunc.module.CASE
        n_pages = metafunc.config.getoption("--ram") // PAGE
        warm = metafunc.config.getoption("--warm")
        shares, runs = (SHARES, RUNS) if full else (SHORT_SHARES, SHORT_RUNS)
        cells = [Cell(case, share, run, warm=warm) for share in shares for run in runs]
        if case == "flush":
            cells.append(Cell(case, 0.0, 0, "sqlite", warm))
        metafunc.parametrize("cell", [cell for cell in cells if fits(cell, n_pages)], ids=str)
    if "rig_of" in metafunc.fixturenames:
        most = examine().cores
        counts = thread_counts(most) if full else (most,)
        thp = () if bk.thp_mode() in ("never", "deny") else ("thp",)
        kinds = [(backing, n) for backing in ("hugetlb", *thp, "shm") for n in counts]
        metafunc.parametrize(
            "rig_of", kinds, ids=lambda kind: f"{kind[0]}-{kind[1]}thr", indirect=True, scope="session"
        )


@pytest.fixture(scope="session")
def host() -> Host:
    """This machine."""
    return examine()


@pytest.fixture(scope="session")
def rig_of(request: pytest.FixtureRequest, host: Host) -> Iterator[Rig]:
    """A rig on one backing, with its threads; huge pages are borrowed for it. Skips what the machine has not."""
    backing, n_threads = request.param
    ram = request.config.getoption("--ram")
    with contextlib.ExitStack() as stack:
        if backing == "hugetlb":
            stack.enter_context(borrowed(2 * bk.round_up(ram, bk.HUGE) // bk.HUGE))
        try:
            rig = stack.enter_context(Rig(ram, backing, host.touch_bytes))
        except ColocacheError as error:
            pytest.skip(str(error))
        with rig.threads(n_threads):
            yield rig


class Bench:
    """One benchmark of a group: its rounds, each with a new dirty set, a cold cache and a check afterwards."""

    def __init__(self, benchmark: Any, rig: Rig, cell: Cell, rounds: int) -> None:
        self.benchmark, self.rig, self.cell, self.rounds = benchmark, rig, cell, rounds

    def run(
        self,
        way: str,
        prepare: Callable[[Pattern], tuple[Any, ...]],
        timed: Callable[..., object],
        check: Callable[[Pattern], object] | None = None,
        *,
        n_bytes: int | None = None,
        part: str = "",
    ) -> None:
        """`prepare` gives the arguments of `timed`; only that is timed. `check` sees each round's result.

        `part`: what the group compares, if that is not the whole cell.
        """
        rig, cell = self.rig, self.cell
        patterns: list[Pattern] = []

        def finish() -> None:
            if patterns and check is not None:
                check(patterns[-1])

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            finish()
            patterns.append(cell.draw(rig.n_pages, len(patterns), rig.rng))
            arguments = prepare(patterns[-1])
            if not cell.warm:
                rig.cool()
            return arguments, {}

        title = f"{part}, {cell}" if part else str(cell)
        self.benchmark.group = f"{title} on {rig.backing}, {rig.ram_bytes >> 20} MiB, threads {rig.pool.n_threads}"
        gc.collect()
        self.benchmark.pedantic(timed, setup=setup, rounds=self.rounds)
        finish()
        pattern = patterns[-1]
        self.benchmark.extra_info.update(
            way=way,
            bytes=pattern.n_dirty * PAGE if n_bytes is None else n_bytes,
            share=pattern.share,
            run_pages=pattern.mean_run,
            pattern=cell.pattern,
            backing=rig.backing,
            pages=rig.n_pages,
            dirty_pages=pattern.n_dirty,
            threads=rig.pool.n_threads,
            warm=cell.warm,
        )


@pytest.fixture
def bench(benchmark: Any, rig_of: Rig, cell: Cell, request: pytest.FixtureRequest) -> Bench:
    """The benchmark of this cell on this rig."""
    return Bench(benchmark, rig_of, cell, request.config.getoption("--rounds"))
