# SPDX-License-Identifier: Apache-2.0
"""Memory of a secondary: what may be asked for, reserved whole or refused with the numbers."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

import colocache
from colocache import (
    Action,
    ArgumentError,
    BlockError,
    BlockSpec,
    Cache,
    ClosedError,
    ExistsError,
    LengthError,
    Memory,
    MemoryShortError,
    NoMemoryError,
    RamImage,
    UnsupportedError,
)
from colocache import backing as bk

from support import BLOCKS, PAGE, files_of, ours

MIB = 1 << 20


# ---- what may be asked for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 65, "a b", "ä", "a\0b", "a\n", 7])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match="is not a valid name of a region"):
        Memory.create(name, BLOCKS, backing="shm")


@pytest.mark.parametrize(
    ("name", "len_bytes", "page_size", "error"),
    [
        ("", PAGE, PAGE, BlockError),
        ("x" * 256, PAGE, PAGE, BlockError),
        ("a\0b", PAGE, PAGE, BlockError),
        ("ram", 0, PAGE, LengthError),
        ("ram", -PAGE, PAGE, LengthError),
        ("ram", PAGE + 1, PAGE, LengthError),
        ("ram", 1 << 47, PAGE, LengthError),
        ("ram", 3 * PAGE, 2 * PAGE, LengthError),
        ("ram", 6000, 3000, LengthError),
        ("ram", 2048, 2048, LengthError),
        ("ram", 4 << 20, 4 << 20, LengthError),
    ],
)
def test_a_block_that_no_guest_can_have_is_refused(
    name: str, len_bytes: int, page_size: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        BlockSpec(name, len_bytes, page_size)


def test_none_too_many_or_twice_the_same_block_is_refused() -> None:
    for blocks in ([], [BlockSpec("ram", PAGE)] * 2, [BlockSpec(f"b{i}", PAGE) for i in range(257)]):
        with pytest.raises(BlockError):
            Memory.create(None, blocks, backing="shm")


def test_an_unknown_backing_is_refused_with_those_there_are() -> None:
    with pytest.raises(ArgumentError, match="auto, hugetlb, thp, shm"):
        Memory.create(None, BLOCKS, backing="floppy")


# ---- what is made -------------------------------------------------------------------------------------------


def check_images(memory: Memory, unit: int) -> None:
    assert [one.spec for one in memory.images] == list(BLOCKS)
    for one in memory.images:
        for fd in (one.guest_fd, one.cache_fd):
            size = os.fstat(fd).st_size
            assert size == bk.round_up(one.spec.len_bytes, unit)
            assert os.get_inheritable(fd) is False
            with mmap.mmap(fd, size) as mapping:
                assert mapping[:] == bytes(size)
    assert os.fstat(memory.control_fd).st_size == 0


def test_shm_images_are_whole_zeroed_and_named(memory: Memory) -> None:
    check_images(memory, PAGE)
    assert memory.persistent
    assert len(files_of(memory.name)) == 5
    for one in memory.images:
        assert os.fstat(one.guest_fd).st_blocks * 512 == one.spec.len_bytes  # reserved, not promised


@pytest.mark.hugepages
def test_hugetlb_images_are_there_whole(make_memory: Callable[..., Memory], huge_pages: int) -> None:
    memory = make_memory(backing="hugetlb")
    check_images(memory, bk.HUGE)
    assert memory.persistent == (bk.writable_hugetlbfs() is not None)
    for one in memory.images:
        assert os.fstat(one.guest_fd).st_blocks * 512 == bk.round_up(one.spec.len_bytes, bk.HUGE)


def test_thp_images_are_whole_or_refused_with_the_setting(make_memory: Callable[..., Memory]) -> None:
    if bk.thp_mode() in ("never", "deny"):
        with pytest.raises(UnsupportedError, match="echo advise"):
            make_memory(backing="thp")
        return
    memory = make_memory(backing="thp")
    check_images(memory, bk.HUGE)
    assert not memory.persistent
    assert [path.name.rsplit(".", 1)[1] for path in files_of(memory.name)] == ["control"]


def test_sparse_images_take_no_memory_before_they_are_used(make_memory: Callable[..., Memory]) -> None:
    memory = make_memory((BlockSpec("ram", 1 << 36),), reserve=False)
    assert memory.images[0].sparse
    assert os.fstat(memory.images[0].guest_fd).st_size == 1 << 36
    assert os.fstat(memory.images[0].guest_fd).st_blocks == 0


def test_a_bounded_region_reserves_one_image_and_stays_so(region_name: str) -> None:
    with Memory.create(region_name, [BlockSpec("ram", 1 << 20)], backing="shm", memory_mode="bounded") as memory:
        (image,) = memory.images
        assert os.fstat(image.guest_fd).st_blocks * 512 == 1 << 20
        assert os.fstat(image.cache_fd).st_blocks == 0
        assert os.fstat(image.cache_fd).st_size == 1 << 20
        with Cache.create(memory) as cache:
            assert cache.status().memory_mode == "bounded"
            cache.receive_zero(1, 0, 0, 256)
            cache.device_state_buffer(1, 0)
            cache.seal(1)
            cache.flush()
            cache.loaded()
            cache.receive(2, 0, 3, bytes([7]) * 4096)
            assert cache.status().staged_bytes == 4096
            with cache.blocks[0].writable(5, 2) as pages:
                pages[:] = 1
                del pages
            assert cache.private_bytes() == 2 * 4096
        for again in Memory.open(region_name), Memory.from_manifest(copied(memory.manifest())):
            assert again.memory_mode == "bounded"
            with Cache.attach(again) as cache:
                assert cache.recovery is not None
                assert cache.recovery.action == Action.RESTART
                assert cache.status().staged_bytes == 0
            again.close()


def test_a_limit_of_staged_pages_refuses_the_next_and_costs_the_epoch_only(region_name: str) -> None:
    with (
        Memory.create(region_name, [BlockSpec("ram", 1 << 20)], backing="shm", memory_mode="bounded") as memory,
        Cache.create(memory) as cache,
    ):
        cache.receive_zero(1, 0, 0, 256)
        cache.device_state_buffer(1, 0)
        cache.seal(1)
        cache.flush()
        cache.loaded()
        cache.limit_staged(2 * 4096)
        cache.receive(2, 0, 3, bytes([7]) * 4096)
        cache.receive(2, 0, 4, bytes([7]) * 4096)
        with pytest.raises(NoMemoryError, match="8192 bytes of pages are staged"):
            cache.receive(2, 0, 5, bytes([7]) * 4096)
        assert cache.status().staged_bytes == 2 * 4096
        cache.abort(2, "the limit")
        cache.receive(3, 0, 5, bytes([7]) * 4096)
        assert cache.status().staged_bytes == 4096


def copied(manifest: str) -> str:
    """The same for descriptors of their own, which whoever reads it closes."""
    facts = json.loads(manifest)
    facts["control_fd"] = os.dup(facts["control_fd"])
    for image in facts["images"]:
        image["guest_fd"], image["cache_fd"] = os.dup(image["guest_fd"]), os.dup(image["cache_fd"])
    return json.dumps(facts)


def test_bounded_memory_on_hugetlb_is_refused_with_the_reason(region_name: str) -> None:
    with pytest.raises(UnsupportedError, match="each page that the secondary writes would take 2 MiB"):
        Memory.create(region_name, [BlockSpec("ram", 1 << 20)], backing="hugetlb", memory_mode="bounded")


def test_an_unknown_memory_mode_is_refused_with_those_there_are(region_name: str) -> None:
    with pytest.raises(ArgumentError, match="known are mirror, bounded"):
        Memory.create(region_name, [BlockSpec("ram", 1 << 20)], memory_mode="unbounded")


def test_a_free_name_is_chosen_where_none_is_given() -> None:
    with Memory.create(None, BLOCKS, backing="shm") as one, Memory.create(None, BLOCKS, backing="shm") as other:
        assert one.name != other.name


def test_a_name_in_use_is_refused_and_left_alone(memory: Memory) -> None:
    before = files_of(memory.name)
    with pytest.raises(ExistsError, match=memory.name):
        Memory.create(memory.name, BLOCKS, backing="shm")
    assert files_of(memory.name) == before


SPARSE_ON_HUGE_PAGES = """
import sys
from colocache import BlockSpec, Cache, Memory

with Memory.create(sys.argv[1], [BlockSpec("ram", 5 << 20)], backing="hugetlb", reserve=False) as memory:
    try:
        for number in (1, 2):
            with (Cache.create if number == 1 else Cache.attach)(memory, threads=1) as cache:
                cache.receive(number, "ram", 1279, bytes([number]) * 4096)  # the last page
                cache.device_state_buffer(number, 0)
                cache.seal(number)
                cache.flush()
                cache.loaded()
                cache.validate(compare_pages=True)
                guest = cache.blocks["ram"].guest
                print(guest[1279][0], guest[:1279].any())
                del guest
        cache = Cache.attach(memory, threads=1)  # copies what is there, and touches what is not
        print(cache.recovery.action.name, cache.blocks["ram"].guest[1279][0])
        cache.close()
    finally:
        memory.unlink()
"""


@pytest.mark.hugepages
def test_sparse_images_on_huge_pages_work_and_are_no_sigbus(region_name: str, huge_pages: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPARSE_ON_HUGE_PAGES, region_name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["1 False", "2 False", "RESTART 2", ""]


def test_sparse_images_on_huge_pages_need_room_for_all_of_them(
    region_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mapping of hugetlb reserves its pages, so the room for them is asked for before."""
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(total=7, free=5))
    blocks = [BlockSpec("ram", 3 * bk.HUGE)]
    with pytest.raises(MemoryShortError, match="6 huge pages of 2 MiB are needed and 5 are free") as caught:
        Memory.create(region_name, blocks, backing="hugetlb", reserve=False)
    assert caught.value.command == "sysctl vm.nr_hugepages=8"
    with Memory.create(region_name, blocks, reserve=False) as memory:
        assert memory.backing != "hugetlb"
        assert "6 huge pages of 2 MiB are needed and 5 are free" in memory.why
        memory.unlink()


# ---- what is missing ----------------------------------------------------------------------------------------


def test_missing_huge_pages_are_counted_and_the_command_is_told(region_name: str) -> None:
    have = bk.huge_pages()
    blocks = [BlockSpec("ram", (have.free + 5) * bk.HUGE)]
    with pytest.raises(MemoryShortError) as caught:
        Memory.create(region_name, blocks, backing="hugetlb")
    wanted = 2 * (have.free + 5)
    assert caught.value.needed == wanted * bk.HUGE
    assert caught.value.available == have.free * bk.HUGE
    assert caught.value.command == f"sysctl vm.nr_hugepages={have.total + wanted - have.free}"
    assert f"{wanted - have.free} are missing" in str(caught.value)
    assert caught.value.command in str(caught.value)


def test_more_than_the_machine_has_is_refused_before_it_is_touched(region_name: str) -> None:
    blocks = [BlockSpec("ram", bk.round_up(bk.memory_available(), PAGE))]
    with pytest.raises(MemoryShortError, match="missing"):
        Memory.create(region_name, blocks)
    with pytest.raises(MemoryShortError, match="missing"):
        RamImage.create(BlockSpec("ram", 2 * blocks[0].len_bytes))
    assert files_of(region_name) == []


def test_auto_goes_on_to_the_next_backing_and_says_why(monkeypatch: pytest.MonkeyPatch, region_name: str) -> None:
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(total=7, free=3))
    monkeypatch.setattr(bk, "thp_mode", lambda: "never")
    with Memory.create(region_name, BLOCKS) as memory:
        assert memory.backing == "shm"
        assert memory.persistent
        assert "6 huge pages of 2 MiB are needed and 3 are free" in memory.why
        assert "sysctl vm.nr_hugepages=10" in memory.why
        assert "shmem_enabled is never" in memory.why


def test_with_a_small_dev_shm_auto_still_works_and_shm_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, region_name: str
) -> None:
    monkeypatch.setattr(bk, "huge_pages", lambda: bk.HugePages(total=0, free=0))
    monkeypatch.setattr(bk, "thp_mode", lambda: "never")
    monkeypatch.setattr(bk, "shm_available", lambda: MIB)
    with Memory.create(region_name, BLOCKS) as memory:
        assert memory.backing == "shm"
        assert not memory.persistent
        assert "/dev/shm has room for 1 MiB" in memory.why
    with pytest.raises(MemoryShortError, match=r"mount -o remount,size=\d+m /dev/shm"):
        Memory.create(region_name, BLOCKS, backing="shm")


SMALL_SHM = """
import colocache
from colocache import BlockSpec, Memory, MemoryShortError
blocks = [BlockSpec("ram", 48 << 20)]
try:
    Memory.create("small", blocks, backing="shm")
except MemoryShortError as error:
    print(error)
with Memory.create("small", blocks) as memory:
    print(memory.backing, memory.persistent)
print([str(path) for region in colocache.list_regions() for path in region.files])
"""


def test_a_dev_shm_of_64_mib_is_no_sigbus() -> None:
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -c "$1"'
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no right to a mount namespace")
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, SMALL_SHM],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    refused, made, left = run.stdout.splitlines()
    assert refused == (
        "96 MiB of POSIX shared memory are needed and /dev/shm has room for 64 MiB: 32 MiB are missing "
        "(mount -o remount,size=96m /dev/shm)"
    )
    assert made.split()[0] in bk.BACKINGS
    assert left == "[]"


def test_room_that_somebody_else_took_meanwhile_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, region_name: str
) -> None:
    have = bk.huge_pages()
    monkeypatch.setattr(bk, "check_room", lambda *_, **__: None)
    with pytest.raises(MemoryShortError, match=r"sysctl vm\.nr_hugepages"):
        Memory.create(region_name, [BlockSpec("ram", (have.free + 1) * bk.HUGE)], backing="hugetlb")
    assert files_of(region_name) == []


# ---- one image without a cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["auto", "shm"])
def test_a_ram_image_is_zeroed_writable_memory_at_its_address(backing: str) -> None:
    with RamImage.create(BlockSpec("ram", 13 * PAGE), backing) as ram:
        view = ram.view
        assert view.shape == (13, PAGE)
        assert not view.any()
        view[12, 4095] = 9
        assert view.ctypes.data == ram.addr
        assert ram.addr % PAGE == 0
        with pytest.raises(BufferError, match="still alive"):
            ram.close()
        assert ram.view[12, 4095] == 9
        del view
    with pytest.raises(ClosedError):
        _ = ram.view
    ram.close()
    assert not [region for region in colocache.list_regions() if ours(region.name)]


@pytest.mark.hugepages
def test_a_ram_image_on_huge_pages_begins_on_one(huge_pages: int) -> None:
    with RamImage.create(BlockSpec("ram", 3 * MIB), "hugetlb") as ram:
        assert ram.backing == "hugetlb"
        assert ram.addr % bk.HUGE == 0
        assert ram.view.shape == (768, PAGE)


def test_an_error_is_not_hidden_by_views_in_its_frames() -> None:
    with pytest.raises(ZeroDivisionError), RamImage.create(BlockSpec("ram", PAGE), "shm") as ram:
        view: np.ndarray = ram.view
        view[0, 0] = 1 // 0
