# SPDX-License-Identifier: Apache-2.0
"""A region's names: never left behind, cleaned when nobody owns them, found again, and handed over to a child."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import colocache
from colocache import (
    ArgumentError,
    BlockError,
    Cache,
    ClosedError,
    Memory,
    NoStateError,
    NotColocacheError,
)
from colocache import backing as bk

from support import BLOCKS, PAGE, child, files_of, line_of

# ---- the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_creation_that_fails_half_way_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, region_name: str, error: type[BaseException], nth: int
) -> None:
    calls = []
    real = bk.size_file

    def failing(*args: object, **kwargs: object) -> int:
        calls.append(args)
        if len(calls) == nth:
            raise error
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(bk, "size_file", failing)
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(error):
        Memory.create(region_name, BLOCKS, backing="shm")
    assert files_of(region_name) == []
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_leaving_with_removes_the_names_and_closes(region_name: str) -> None:
    with pytest.raises(ZeroDivisionError), Memory.create(region_name, BLOCKS, backing="shm") as memory:
        fds = memory.fds
        assert len(files_of(region_name)) == 5
        raise ZeroDivisionError
    assert files_of(region_name) == []
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    with pytest.raises(ClosedError, match=region_name):
        _ = memory.fds
    with pytest.raises(ClosedError), memory:
        pass
    memory.close()
    memory.unlink()


def test_close_and_unlink_are_two_things(region_name: str) -> None:
    memory = Memory.create(region_name, BLOCKS, backing="shm")
    memory.unlink()
    assert files_of(region_name) == []
    assert os.fstat(memory.control_fd).st_nlink == 0  # still ours to use
    memory.close()


def test_unlink_leaves_a_region_that_has_the_name_now(region_name: str) -> None:
    first = Memory.create(region_name, BLOCKS, backing="shm")
    for path in files_of(region_name):
        path.unlink()
    with Memory.create(region_name, BLOCKS, backing="shm"):
        first.unlink()
        first.close()
        assert len(files_of(region_name)) == 5


ENDINGS = """
import os, signal, sys
from colocache import BlockSpec, Memory
memory = Memory.create(sys.argv[1], [BlockSpec("ram", 1 << 20)], backing="shm")
print("made", flush=True)
if sys.argv[2] == "exit":
    sys.exit(3)
if sys.argv[2] == "error":
    raise RuntimeError
if sys.argv[2] == "interrupted while it removes":
    from colocache import region_files
    remove, removed = region_files.remove_file, []
    def interrupted(folder, file):
        remove(folder, file)
        removed.append(file)
        if len(removed) == 1:
            raise KeyboardInterrupt
    region_files.remove_file = interrupted
    memory.unlink()
sys.stdin.read()
"""


@pytest.mark.parametrize("ending", ["exit", "error", "interrupt", "interrupted while it removes"])
def test_a_process_that_ends_without_closing_leaves_nothing(region_name: str, ending: str) -> None:
    with child(ENDINGS, region_name, ending) as process:
        assert line_of(process) == "made"
        if ending == "interrupt":
            assert len(files_of(region_name)) == 3
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert files_of(region_name) == []


def test_a_forked_child_removes_nothing_of_its_parents(memory: Memory) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            memory.unlink()
            memory.close()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(files_of(memory.name)) == 5


# ---- clean --------------------------------------------------------------------------------------------------

OWNER = """
import sys
from colocache import BlockSpec, Cache, Memory
memory = Memory.create(sys.argv[1], [BlockSpec("boot", 13 * 4096), BlockSpec("ram", 1 << 20)], backing=sys.argv[2])
cache = Cache.create(memory)
cache.receive(1, "ram", 7, b"x" * 4096)
cache.device_state_buffer(1, 4)[:] = b"regs"
cache.seal(1); cache.flush(); cache.loaded()
if sys.argv[3] == "memory closed":
    memory.close()
print("made", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kept", ["memory", "memory closed"])
def test_clean_leaves_what_a_living_process_has_and_names_it(region_name: str, kept: str) -> None:
    with child(OWNER, region_name, "shm", kept) as process:
        assert line_of(process) == "made"
        report = colocache.clean(region_name)
        assert report.removed == ()
        assert report.busy[0][0] == region_name
        assert f"process {process.pid}" in report.busy[0][1]
        assert len(files_of(region_name)) == 5
        process.kill()
        process.communicate(timeout=60)
        # killed: nothing removed the names, and the kernel dropped its locks
        assert len(files_of(region_name)) == 5
        report = colocache.clean(region_name)
    assert report.busy == ()
    assert [one.name for one in report.removed] == [region_name]
    assert files_of(region_name) == []


def test_a_region_that_outlived_its_process_is_found_by_name(region_name: str) -> None:
    with child(OWNER, region_name, "shm", "memory") as process:
        assert line_of(process) == "made"
    with Memory.open(region_name) as memory:
        assert [one.spec.name for one in memory.images] == ["boot", "ram"]
        assert memory.persistent
        assert memory.backing == "shm"
        assert colocache.inspect(region_name).status.sealed_epoch == 1
        with Cache.attach(memory) as cache:
            assert cache.recovery is not None
            assert cache.recovery.epoch == 1
            assert bytes(cache.blocks["ram"].guest[7]) == b"x" * PAGE
            assert cache.device_state() == b"regs"
            assert colocache.clean(region_name).removed == ()
            with pytest.raises(colocache.BusyError):
                memory.unlink()
            assert len(files_of(region_name)) == 5
    assert len(files_of(region_name)) == 5  # who opens does not remove
    with Memory.open(region_name) as memory:
        memory.unlink()
    assert files_of(region_name) == []


@pytest.mark.hugepages
def test_a_region_on_hugetlbfs_is_found_and_cleaned(region_name: str, huge_pages: int) -> None:
    if bk.writable_hugetlbfs() is None:
        pytest.skip("no hugetlbfs is mounted")
    with child(OWNER, region_name, "hugetlb", "memory") as process:
        assert line_of(process) == "made"
    with Memory.open(region_name) as memory:
        assert memory.backing == "hugetlb"
    report = colocache.clean(region_name)
    assert [one.name for one in report.removed] == [region_name]
    assert len(report.removed[0].files) == 5


def test_a_region_whose_images_had_no_name_says_so_and_is_cleaned(
    region_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bk, "kinds", lambda _: [bk._shm_without_name()])
    memory = Memory.create(region_name, BLOCKS)
    Cache.create(memory).close()
    memory.close()
    with pytest.raises(NoStateError, match="went with its last process"):
        Memory.open(region_name)
    assert [one.name for one in colocache.clean(region_name).removed] == [region_name]


def test_a_control_object_that_nobody_filled_in_is_cleaned_too(region_name: str) -> None:
    Memory.create(region_name, BLOCKS, backing="shm").close()
    with pytest.raises(NotColocacheError):
        Memory.open(region_name)
    assert [one.name for one in colocache.clean(region_name).removed] == [region_name]


def test_clean_of_all_touches_nothing_of_others(memory: Memory) -> None:
    stranger = bk.SHM_DIR / f"not-colocache.{memory.name}.control"
    stranger.write_bytes(b"x")
    try:
        report = colocache.clean(memory.name)
        assert memory.name in [name for name, _ in report.busy]
        assert stranger.exists()
    finally:
        stranger.unlink()


def test_no_region_of_that_name_is_one_sentence(region_name: str) -> None:
    for call in (colocache.clean, Memory.open, colocache.inspect):
        with pytest.raises(NotColocacheError, match=region_name):
            call(region_name)


# ---- handing over -------------------------------------------------------------------------------------------

HEIR = """
import sys
from colocache import Cache, Memory
with Memory.from_manifest(sys.argv[1]) as memory, Cache.create(memory) as cache:
    cache.receive(1, "pc.ram", 999, b"y" * 4096)
    print(list(cache.blocks), memory.backing, flush=True)
"""


def test_a_child_builds_the_same_memory_from_the_manifest(memory: Memory) -> None:
    with child(HEIR, memory.manifest(), pass_fds=memory.fds) as process:
        out, errors = process.communicate(timeout=60)
    assert out.split("\n")[0] == "['boot', 'pc.ram'] shm", errors
    assert len(files_of(memory.name)) == 5  # the child's end removed nothing
    with Cache.attach(memory) as cache:
        assert bytes(cache.blocks["pc.ram"].cache[999]) == b"y" * PAGE


@pytest.mark.parametrize("change", [{"name": "../x"}, {"images": []}, {"control_fd": 9999}, {"control_fd": "x"}])
def test_a_manifest_that_is_none_is_refused(memory: Memory, change: dict[str, object]) -> None:
    text = json.dumps({**json.loads(memory.manifest()), **change})
    with pytest.raises((ArgumentError, BlockError)):
        Memory.from_manifest(text)
    for nonsense in ("", "[]", "{}", "null", "7"):
        with pytest.raises(ArgumentError, match="not a manifest"):
            Memory.from_manifest(nonsense)
