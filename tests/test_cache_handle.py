# SPDX-License-Identifier: Apache-2.0
"""A cache's handle: attach after a kill, what inspect sees, views, and the end."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import colocache
from colocache import (
    Action,
    ArgumentError,
    BlockError,
    BusyError,
    Cache,
    ClosedError,
    CorruptError,
    ExistsError,
    Memory,
    NoStateError,
    NotColocacheError,
    SystemCallError,
)

from support import PAGE, checkpoint, child, line_of, page

# ---- attach -------------------------------------------------------------------------------------------------

VICTIM = """
import os, sys
from colocache import Cache, Memory
memory = Memory.from_manifest(sys.argv[1])
cache = Cache.create(memory)
page = lambda value: bytes([value]) * 4096
for pfn in range(10):
    cache.receive(1, "pc.ram", pfn, page(pfn))
cache.device_state_buffer(1, 3)[:] = b"one"
cache.seal(1); cache.flush(); cache.loaded()
if "arriving" in sys.argv[2]:
    cache.receive(2, "pc.ram", 3, page(33))
if "sealed" in sys.argv[2]:
    with cache.blocks["pc.ram"].writable(8, 1) as view:
        view[:] = 88
    del view
    cache.device_state_buffer(2, 3)[:] = b"two"
    cache.seal(2)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("when", "action", "epoch", "state", "third", "eighth"),
    [
        ("committed", Action.RESTART, 1, b"one", 3, 8),
        ("arriving", Action.NO_RESTART, 0, None, 3, 8),
        ("arriving, sealed", Action.REPLAYED, 2, b"two", 33, 8),
    ],
)
def test_attach_after_a_kill_finds_the_newest_whole_state(
    memory: Memory, when: str, action: Action, epoch: int, state: bytes | None, third: int, eighth: int
) -> None:
    with child(VICTIM, memory.manifest(), when, pass_fds=memory.fds) as process:
        pid = int(line_of(process))
        with pytest.raises(BusyError, match=str(pid)):
            Cache.attach(memory)
        process.kill()
        process.wait()
        with Cache.attach(memory) as cache:
            assert cache.recovery is not None
            assert cache.recovery.action == action
            assert cache.recovery.sentence
            ram = cache.blocks["pc.ram"]
            assert (ram.guest[3, 0], ram.guest[8, 0]) == (third, eighth)
            cache.validate()
            if state is None:
                with pytest.raises(NoStateError):
                    cache.failover()
            else:
                assert cache.recovery.epoch == epoch
                assert cache.device_state() == state
                cache.receive(5, "pc.ram", 8, page(5))
                checkpoint(cache, 5)
                assert ram.guest[8, 0] == 5
            del ram


def test_a_region_is_created_once(memory: Memory) -> None:
    with Cache.create(memory), pytest.raises((BusyError, ExistsError)):
        Cache.create(memory)
    with pytest.raises(ExistsError):
        Cache.create(memory)


def test_attach_needs_a_region_and_its_own_images(memory: Memory, make_memory: Callable[..., Memory]) -> None:
    with pytest.raises(NotColocacheError):
        Cache.attach(memory)
    Cache.create(memory).close()
    other = make_memory()
    mixed = Memory.from_manifest(memory.manifest())
    mixed.images = other.images
    with pytest.raises(colocache.ForeignImageError, match="boot"):
        Cache.attach(mixed)
    mixed.images = memory.images[:1]
    with pytest.raises(BlockError):
        Cache.attach(mixed)
    mixed._fds = []  # they belong to the fixture's memory
    Cache.attach(memory).close()


# ---- inspect ------------------------------------------------------------------------------------------------


def test_inspect_sees_the_bits_without_lock_or_write(ready: Cache, memory: Memory) -> None:
    ready.receive(2, "pc.ram", 3, page(33))
    ready.mark_dirty("boot", 0, 2)
    path = Path(f"/proc/self/fd/{memory.control_fd}")
    before = path.read_bytes()
    for region in (memory, memory.name, memory.control_fd):
        found = colocache.inspect(region)
        assert [(block.name, block.pvm_pages, block.svm_pages) for block in found.blocks] == [
            ("boot", 0, 2),
            ("pc.ram", 1, 0),
        ]
        assert found.status.owner_pid == os.getpid()
        assert found.status.receiving_epoch == 2
        assert "pc.ram" in str(found)
    assert path.read_bytes() == before


def test_inspect_of_garbage_is_an_error(memory: Memory) -> None:
    for garbage in (b"", b"x", bytes(1 << 20), os.urandom(1 << 20)):
        os.ftruncate(memory.control_fd, 0)
        os.pwrite(memory.control_fd, garbage, 0)
        with pytest.raises((NotColocacheError, CorruptError, colocache.LayoutError)):
            colocache.inspect(memory)
        with pytest.raises((NotColocacheError, CorruptError, colocache.LayoutError)):
            Cache.attach(memory)
    with pytest.raises((SystemCallError, ArgumentError)):
        colocache.inspect(9999)


# ---- views and the end --------------------------------------------------------------------------------------


def test_views_can_not_be_made_writable(ready: Cache) -> None:
    for view in (ready.blocks["pc.ram"].guest, ready.blocks["pc.ram"].cache):
        assert view.shape == (1000, PAGE)
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True


def test_guest_views_are_the_memory_itself(ready: Cache) -> None:
    ram = ready.blocks["pc.ram"]
    assert ram.guest.ctypes.data == ram.guest_addr
    assert (ram.n_pages, ram.page_size, ram.len_bytes, ram.index, ram.name) == (1000, PAGE, 1000 * PAGE, 1, "pc.ram")


def test_closing_with_a_living_view_is_refused(memory: Memory) -> None:
    cache = Cache.create(memory)
    views = [cache.blocks[0].guest[3:5, 7], memoryview(cache.blocks[1].cache), cache.device_state_buffer(1, 9)]
    while views:
        with pytest.raises(BufferError, match=f"{len(views)} views"):
            cache.close()
        cache.status()  # it still works
        views.pop()
    cache.close()


def test_after_close_everything_says_closed(memory: Memory) -> None:
    cache = Cache.create(memory)
    ram = cache.blocks["pc.ram"]
    cache.close()
    cache.close()
    calls: list[Callable[[], object]] = [
        cache.status,
        cache.flush,
        cache.device_state,
        cache.failover,
        lambda: cache.receive(1, 0, 0, page(1)),
        lambda: cache.mark_dirty(0, 0),
        lambda: cache.seal(1),
        lambda: ram.guest,
        lambda: ram.pvm_bitmap,
        lambda: ram.writable(0, 1).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="cache is closed"):
            call()
    assert repr(cache) == "<Cache: closed>"


def test_a_closed_memory_is_no_memory(make_memory: Callable[..., Memory]) -> None:
    memory = make_memory()
    memory.unlink()
    memory.close()
    for call in (Cache.create, Cache.attach, colocache.inspect):
        with pytest.raises(ClosedError):
            call(memory)


def test_an_error_is_not_hidden_by_views_in_its_frames(memory: Memory) -> None:
    with pytest.raises(ZeroDivisionError), Cache.create(memory) as cache:
        view = cache.blocks[0].guest
        _ = 1 // int(view[0, 0])
    del view
    gc.collect()
    Cache.attach(memory).close()  # its lock went with the last view


def test_a_cache_that_nobody_closed_is_closed_with_a_warning(memory: Memory) -> None:
    cache = Cache.create(memory)
    with pytest.warns(ResourceWarning, match="never closed"):
        del cache
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cache.attach(memory).close()


def test_a_forked_child_can_not_use_or_close_it(ready: Cache) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ready.status()
        except ClosedError as error:
            os.write(write, str(error).encode())
        finally:
            ready.close()
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    assert f"belongs to process {os.getpid()}" in os.read(read, 1000).decode()
    os.close(read)
    assert ready.status().sealed_epoch == 1


# ---- leaving a `with` -----------------------------------------------------------------------------------------


def test_leaving_with_a_living_view_lets_go_of_the_lock_and_keeps_the_memory(memory: Memory) -> None:
    """A newcomer's `guest = ram.guest` in a `with` is no mistake; after it the view still shows guest RAM."""
    with Cache.create(memory) as cache:
        cache.receive(1, "pc.ram", 7, page(65))
        checkpoint(cache, 1)
        guest = cache.blocks["pc.ram"].guest
    with pytest.raises(ClosedError):
        cache.status()
    cache.close()  # said already
    assert guest[7, 0] == 65
    with Cache.attach(memory) as second:  # nobody owns it
        assert second.recovery is not None
        assert second.recovery.action is Action.RESTART
        assert guest[7, 0] == 65
    del guest
    gc.collect()
    assert not colocache._handle._leaving  # the last view took the rest with it


def test_a_view_that_keeps_a_cache_open_is_named(ready: Cache) -> None:
    guest, state = ready.blocks["pc.ram"].guest, ready.device_state_buffer(2, 9)
    with pytest.raises(BufferError, match=r"2 views .*device state of epoch 2, guest RAM of pc\.ram"):
        ready.close()
    del guest, state


@pytest.mark.parametrize("wrong", [3.5, None, "3", object()])
def test_what_is_no_descriptor_is_an_argument_error(ready: Cache, wrong: object) -> None:
    with pytest.raises(ArgumentError, match="descriptor"):
        ready.receive_stream(wrong, timeout=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        ready.receive_stream(0, timeout="soon")  # type: ignore[arg-type]


# ---- who holds the lock ---------------------------------------------------------------------------------------


def test_a_region_that_this_process_owns_says_so(ready: Cache, memory: Memory) -> None:
    with pytest.raises(BusyError, match=f"this process .{os.getpid()}.*other handle"):
        Cache.attach(memory)


def test_a_lock_that_a_forked_child_inherited_is_told_with_its_holder(memory: Memory) -> None:
    """The owner that the region names is gone; the one to end is another."""
    read, write = os.pipe()
    owner = os.fork()
    if owner == 0:
        Cache.create(memory, threads=1)
        holder = os.fork()
        if holder == 0:
            signal.pause()
        os.write(write, f"{holder}\n".encode())
        os._exit(0)
    os.close(write)
    os.waitpid(owner, 0)
    with os.fdopen(read) as said:
        holder = int(said.readline())
    try:
        with pytest.raises(BusyError, match=f"{owner}.* held by process {holder}"):
            Cache.attach(memory)
    finally:
        os.kill(holder, signal.SIGKILL)


# ---- files of the caller's own --------------------------------------------------------------------------------


def test_two_blocks_in_one_file_of_the_callers() -> None:
    control, ram, cache_fd = (os.memfd_create(name) for name in ("control", "ram", "cache"))
    try:
        for fd in (ram, cache_fd):
            os.posix_fallocate(fd, 0, 24 * PAGE)
        specs = colocache.BlockSpec("low", 16 * PAGE), colocache.BlockSpec("high", 8 * PAGE)
        images = [
            colocache.Images(specs[0], ram, 0, cache_fd, 0, False),
            colocache.Images(specs[1], ram, 16 * PAGE, cache_fd, 16 * PAGE, False),
        ]
        with Memory.from_fds(control, images) as memory, Cache.create(memory) as cache:
            cache.receive(1, "high", 2, page(9))
            checkpoint(cache, 1)
        assert os.pread(ram, 1, 18 * PAGE) == bytes([9])  # its descriptors are still the caller's
        with Memory.from_fds(control, images) as memory, Cache.attach(memory) as cache:
            assert cache.recovery is not None
            assert cache.recovery.epoch == 1
        with pytest.raises(ArgumentError, match="9999"):
            Memory.from_fds(9999, images)
    finally:
        for fd in (control, ram, cache_fd):
            os.close(fd)
