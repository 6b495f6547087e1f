# SPDX-License-Identifier: Apache-2.0
"""RAM blocks that come while epochs do, in Python: the cache, its memory, and what the next process finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from colocache import BlockSpec, Cache, Memory, Sender, inspect
from colocache.errors import BlockError, SealedError, UnsupportedError
from colocache.regions import list_regions
from colocache.results import Action

from model import PAGE, page_of

RAM, DIMM = BlockSpec("ram", 3 * PAGE), BlockSpec("dimm", 2 * PAGE)


def checkpoint(cache: Cache, epoch: int) -> None:
    cache.device_state_buffer(epoch, 0)
    cache.seal(epoch)
    cache.flush()
    cache.loaded()


@pytest.mark.parametrize("memory_mode", ["mirror", "bounded"])
def test_a_block_that_comes_late_is_a_block_as_any_other(region_name: str, memory_mode: str) -> None:
    with (
        Memory.create(region_name, [RAM], backing="shm", memory_mode=memory_mode) as memory,
        Cache.create(memory, threads=1) as cache,
    ):
        cache.receive(1, "ram", 1, page_of(7))
        checkpoint(cache, 1)
        cache.receive(2, "ram", 2, page_of(8))
        dimm = cache.add_block(memory.add_block(DIMM))
        assert (dimm.index, cache.blocks["dimm"], len(cache.blocks)) == (1, dimm, 2)
        cache.receive(2, dimm, 1, page_of(9))
        checkpoint(cache, 2)
        assert bytes(dimm.guest[1]) == page_of(9)
        assert not dimm.guest[0].any()
        with pytest.raises(BlockError, match="called dimm"):
            memory.add_block(DIMM)
        cache.device_state_buffer(3, 0)
        cache.seal(3)
        late = memory.add_block(BlockSpec("late", PAGE))
        with pytest.raises(SealedError, match="flush and loaded first"):
            cache.add_block(late)
        cache.flush()
        cache.loaded()
        cache.add_block(late)
        cache.validate()


def test_a_process_that_died_between_the_files_and_the_region_leaves_no_block(region_name: str) -> None:
    memory = Memory.create(region_name, [RAM], backing="shm")
    with Cache.create(memory, threads=1) as cache:
        cache.receive(1, "ram", 1, page_of(7))
        checkpoint(cache, 1)
    memory.add_block(DIMM)  # and here it dies
    with Cache.attach(memory, threads=1) as cache:  # a parent that holds the memory hands all of it on
        assert list(cache.blocks) == ["ram"]
    memory.close()
    with Memory.open(region_name) as again, Cache.attach(again, threads=1) as cache:
        cache.add_block(again.add_block(BlockSpec("other", PAGE)))  # over the files that nobody used
        cache.receive(2, "other", 0, page_of(8))
        checkpoint(cache, 2)
    with Memory.open(region_name) as again:
        with Cache.attach(again, threads=1) as cache:
            assert cache.recovery is not None
            assert cache.recovery.action is Action.RESTART
            assert bytes(cache.blocks["other"].guest[0]) == page_of(8)
            assert [block.name for block in inspect(again).blocks] == ["ram", "other"]
        again.unlink()
    assert region_name not in [region.name for region in list_regions()]


def test_memory_from_elsewhere_takes_images_that_were_made_there(region_name: str) -> None:
    with (
        Memory.create(region_name, [RAM], backing="shm") as made,
        Memory.create(f"{region_name}-dimm", [DIMM], backing="shm") as dimm,
        Memory.from_fds(made.control_fd, made.images) as memory,
        Cache.create(memory, threads=1) as cache,
    ):
        checkpoint(cache, 1)
        with pytest.raises(UnsupportedError, match="made elsewhere"):
            memory.add_block(DIMM)
        cache.add_block(memory.add_images(dimm.images[0]))
        cache.receive(2, "dimm", 0, page_of(5))
        checkpoint(cache, 2)
        assert bytes(cache.blocks["dimm"].guest[0]) == page_of(5)


def test_a_block_that_could_not_be_made_leaves_no_file(region_name: str) -> None:
    with Memory.create(region_name, [RAM], backing="shm") as memory:
        before = memory.fds
        planted = Path(f"/dev/shm/colocache.{region_name}.cache.1")
        planted.write_bytes(b"")
        try:
            with pytest.raises(Exception, match="exists already"):
                memory.add_block(DIMM)
        finally:
            planted.unlink()
        assert memory.fds == before
        assert [image.spec for image in memory.images] == [RAM]
        memory.add_block(DIMM)
    assert region_name not in [region.name for region in list_regions()]


@pytest.mark.parametrize("memory_mode", ["mirror", "bounded"])
def test_a_block_goes_with_the_next_seal_and_its_memory_with_loaded(region_name: str, memory_mode: str) -> None:
    with (
        Memory.create(region_name, [RAM, DIMM], backing="shm", memory_mode=memory_mode) as memory,
        Cache.create(memory, threads=1) as cache,
    ):
        checkpoint(cache, 1)
        dimm = cache.blocks["dimm"]
        assert cache.block_sealed(dimm)
        view = dimm.guest
        with pytest.raises(BufferError, match="guest RAM of dimm"):
            cache.remove_block("dimm")
        del view
        cache.remove_block("dimm")
        with pytest.raises(BlockError, match="was removed"):
            _ = dimm.cache
        cache.receive(2, "dimm", 1, page_of(9))  # was on its way
        cache.abort(2, "test")
        cache.device_state_buffer(3, 0)
        cache.seal(3)
        assert list(cache.blocks) == ["ram"]
        assert "dimm" not in cache.blocks
        with pytest.raises(BlockError):
            cache.mark_dirty(dimm, 0)
        cache.flush()
        cache.loaded()
        memory.remove_block("dimm")
        assert [path.name for path in Path("/dev/shm").glob(f"colocache.{region_name}.*.1")] == []
        assert [block.name for block in inspect(memory).blocks] == ["ram"]
        again = cache.add_block(memory.add_block(DIMM))
        assert (again.index, cache.block_sealed(again)) == (2, False)
        cache.receive(4, "dimm", 0, page_of(4))
        checkpoint(cache, 4)
        cache.close()
        memory.close()
        with Memory.open(region_name) as found, Cache.attach(found, threads=1) as after:
            assert [(block.index, block.name) for block in after.blocks.values()] == [(0, "ram"), (2, "dimm")]
            assert bytes(after.blocks["dimm"].guest[0]) == page_of(4)
            after.remove_block("dimm")
            checkpoint(after, 5)
            found.remove_block("dimm")
            assert [path.name for path in Path("/dev/shm").glob(f"colocache.{region_name}.*.2")] == []


def test_after_a_death_a_parent_hands_on_what_is_left(region_name: str) -> None:
    with Memory.create(region_name, [RAM, DIMM], backing="shm") as memory:
        with Cache.create(memory, threads=1) as cache:
            checkpoint(cache, 1)
            cache.remove_block("dimm")
        with Cache.attach(memory, threads=1) as cache:  # died before the seal: nobody knows of it
            assert list(cache.blocks) == ["ram", "dimm"]
            cache.remove_block("dimm")
            cache.device_state_buffer(2, 0)
            cache.seal(2)
        with Cache.attach(memory, threads=1) as cache:  # and after it
            assert list(cache.blocks) == ["ram"]
            assert cache.recovery is not None
            assert cache.recovery.action is Action.REPLAYED


def test_a_sender_sends_all_of_a_block_that_comes_late() -> None:
    import mmap

    import numpy as np

    with mmap.mmap(-1, 2 * PAGE) as ram, mmap.mmap(-1, 3 * PAGE) as dimm, Sender() as sender:
        addresses = [int(np.frombuffer(one, np.uint8).ctypes.data) for one in (ram, dimm)]
        sender.add_block("ram", addresses[0], 2 * PAGE)
        sender.mark_all()
        assert len(sender.take()) == 1
        sender.received()
        assert sender.add_block("dimm", addresses[1], 3 * PAGE) == 1
        assert sender.count() == (3, 3)
        assert sender.blocks == (BlockSpec("ram", 2 * PAGE), BlockSpec("dimm", 3 * PAGE))
        sender.remove_block(1)
        assert sender.blocks == (BlockSpec("ram", 2 * PAGE), None)
        assert sender.count() == (0, 0)
        assert sender.take() == ()
        with pytest.raises(BlockError, match="was removed"):
            sender.mark_dirty(1, 0)
