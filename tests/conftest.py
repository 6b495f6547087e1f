# SPDX-License-Identifier: Apache-2.0
"""What all tests share: memory with names of this run, and the promise that nothing is left behind."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import colocache
from colocache import BlockSpec, Cache, Memory
from colocache import backing as bk

from support import BLOCKS, checkpoint, ours, page

_numbers = itertools.count()


# Run C programs or a model to their end. They share nothing with other tests (no guest, no named memory, no huge page
# taken, no measured time), so that CI runs them beside those.
PROGRAMS = {
    "test_c_fuzz", "test_c_install", "test_c_step", "test_conversation_model", "test_crash", "test_disks_laws",
    "test_disks_model", "test_failing_calls", "test_outputs_laws", "test_spill_faults",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in PROGRAMS:
            item.add_marker(pytest.mark.programs)


@pytest.fixture(autouse=True, scope="session")
def away_from_the_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Children that run `python -c` or `-m` look into their working directory first: it must not be the clone."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True, scope="session")
def children_hear_an_interrupt() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, and ignored is what children would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def region_name() -> str:
    """A name that no other run uses."""
    return f"t{os.getpid()}-{next(_numbers)}"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves /dev/shm and hugetlbfs as it found them."""
    yield
    left = [region for region in colocache.list_regions() if ours(region.name)]
    for region in left:
        for path in region.files:
            path.unlink()
    assert left == []


@pytest.fixture
def make_memory(region_name: str) -> Iterator[Callable[..., Memory]]:
    """Memory.create with a name of this run and small blocks; removed at the end."""
    made: list[Memory] = []

    def make(blocks: tuple[BlockSpec, ...] = BLOCKS, *, backing: str = "shm", **options: Any) -> Memory:
        made.append(Memory.create(f"{region_name}-{len(made)}", blocks, backing=backing, **options))
        return made[-1]

    yield make
    for memory in made:
        memory.unlink()
        memory.close()


@pytest.fixture
def memory(make_memory: Callable[..., Memory]) -> Memory:
    """A secondary's memory with the blocks boot and pc.ram, on 4 KiB pages."""
    return make_memory()


@pytest.fixture
def cache(memory: Memory) -> Iterator[Cache]:
    """A new secondary with the blocks boot and pc.ram."""
    with Cache.create(memory, threads=2) as made:
        yield made


@pytest.fixture
def ready(cache: Cache) -> Cache:
    """A cache whose epoch 1 is committed: pages 0 to 9 of pc.ram hold their number, the rest zero bytes."""
    for pfn in range(10):
        cache.receive(1, "pc.ram", pfn, page(pfn))
    checkpoint(cache, 1)
    return cache


@pytest.fixture
def huge_pages() -> int:
    """How many 2 MiB pages are free; skips where there are none."""
    free = bk.huge_pages().free
    if free < 16:
        pytest.skip(f"{free} huge pages are free, 16 are needed: sysctl vm.nr_hugepages={bk.huge_pages().total + 16}")
    return free


@pytest.fixture
def source_tree() -> Path:
    """The clone that these tests are in; skips where only the tests were copied."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "setup.py").is_file():
        pytest.skip("these tests are not in a source tree")
    return root
