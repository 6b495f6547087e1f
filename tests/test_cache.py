# SPDX-License-Identifier: Apache-2.0
"""The cache through its Python face: a checkpoint's life, every way to write guest RAM, and every refusal."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import colocache
from colocache import (
    Action,
    ArgumentError,
    BlockError,
    BlockSpec,
    BusyError,
    Cache,
    ClosedError,
    CorruptError,
    EpochError,
    ExistsError,
    FailedOverError,
    IncompleteError,
    LengthError,
    LoadFailedError,
    Memory,
    NoStateError,
    NotColocacheError,
    NotSealedError,
    OrderError,
    PeerLostError,
    Phase,
    RamImage,
    RangeError,
    SealedError,
    Sender,
    SystemCallError,
    TailError,
    TimedOutError,
    TooLargeError,
    VetoError,
    bitmap,
)

from support import BLOCKS, PAGE, child, line_of


def page(value: int) -> bytes:
    return bytes([value]) * PAGE


def checkpoint(cache: Cache, epoch: int, state: bytes = b"regs", **seal: object) -> colocache.SealResult:
    """Device state, seal, flush, loaded."""
    cache.device_state_buffer(epoch, len(state))[:] = state
    result = cache.seal(epoch, **seal)  # type: ignore[arg-type]
    cache.flush()
    assert cache.loaded() is False
    return result


@pytest.fixture
def ready(cache: Cache) -> Cache:
    """A cache whose epoch 1 is committed: pages 0 to 9 of pc.ram hold their number, the rest zero bytes."""
    for pfn in range(10):
        cache.receive(1, "pc.ram", pfn, page(pfn))
    checkpoint(cache, 1)
    return cache


# ---- a checkpoint -------------------------------------------------------------------------------------------


def test_what_arrives_reaches_guest_ram_only_at_the_flush(cache: Cache) -> None:
    ram = cache.blocks["pc.ram"]
    cache.receive(1, "pc.ram", 999, page(1))
    cache.receive(1, ram, 0, np.full(PAGE, 2, np.uint8))
    cache.receive_pages(1, 1, [63, 64, 65], page(3) + page(4) + page(5))
    cache.receive_zero(1, "boot", 0, 13)
    assert bitmap.to_pfns(ram.pvm_bitmap).tolist() == [0, 63, 64, 65, 999]
    assert not ram.guest.any()
    assert ram.cache[:, 0].nonzero()[0].tolist() == [0, 63, 64, 65, 999]

    cache.device_state_buffer(1, 3)[:] = b"abc"
    sealed = cache.seal(1, n_pages=18)
    assert (sealed.epoch, sealed.pvm_pages, sealed.svm_pages, sealed.both_pages, sealed.flush_pages) == (
        1,
        18,
        0,
        0,
        18,
    )
    assert not ram.guest.any()
    assert bitmap.count(ram.pvm_bitmap) == 0
    assert bitmap.runs(ram.flush_set) == [(0, 1), (63, 3), (999, 1)]

    flushed = cache.flush()
    assert (flushed.epoch, flushed.n_pages, flushed.n_bytes) == (1, 18, 18 * PAGE)
    assert flushed.n_runs == 4
    assert cache.loaded() is False
    assert cache.device_state() == b"abc"
    assert (ram.guest == ram.cache).all()
    assert ram.guest[64, 17] == 4
    cache.validate(compare_pages=True)
    status = cache.status()
    assert (status.phase, status.sealed_epoch, status.committed_epoch, status.n_blocks) == (Phase.LIVE, 1, 1, 2)
    assert "epoch 1 sealed" in str(status)


def test_pages_are_counted_by_who_wrote_them(ready: Cache) -> None:
    ready.receive(2, "pc.ram", 0, page(7))
    ready.receive(2, "pc.ram", 1, page(7))
    ready.mark_dirty("pc.ram", 1, 3)
    result = checkpoint(ready, 2)
    assert (result.pvm_pages, result.svm_pages, result.both_pages, result.flush_pages) == (1, 2, 1, 4)
    assert "4 pages to flush (PVM 1, SVM 2, both 1)" in str(result)


def test_initial_copy_can_be_flushed_before_the_first_seal(cache: Cache) -> None:
    cache.receive(1, "pc.ram", 5, page(5))
    assert cache.preflush() == 1
    assert cache.blocks["pc.ram"].guest[5, 0] == 5
    cache.receive(1, "pc.ram", 6, page(6))
    assert checkpoint(cache, 1).flush_pages == 1
    with pytest.raises(OrderError):
        cache.preflush()


def test_threads_may_receive_at_once(cache: Cache) -> None:
    def receive(part: int) -> None:
        for pfn in range(part, 1000, 4):
            cache.receive(1, 1, pfn, page(pfn % 251))

    threads = [threading.Thread(target=receive, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checkpoint(cache, 1, n_pages=1000).pvm_pages == 1000
    assert (cache.blocks["pc.ram"].guest[:, 9] == np.arange(1000) % 251).all()


def test_the_log_is_told_what_happens(memory: Memory) -> None:
    told: list[tuple[int, str]] = []
    with Cache.create(memory, log=lambda level, sentence: told.append((level, sentence))) as cache:
        cache.receive(1, 0, 0, page(1))
        cache.abort(1, "because\0of this")
    assert any("because of this" in sentence for _, sentence in told)


@pytest.mark.parametrize("copy", ["auto", "libc", "avx2", "avx512", "neon"])
def test_every_way_to_copy_copies_or_is_refused(memory: Memory, copy: str) -> None:
    try:
        cache = Cache.create(memory, copy=copy, threads=1)
    except colocache.UnsupportedError:
        assert copy not in ("auto", "libc")
        return
    with cache:
        cache.receive(1, 0, 12, page(9))
        checkpoint(cache, 1)
        assert cache.blocks[0].guest[12].tolist() == [9] * PAGE
        assert cache.status().copy == copy or copy == "auto"


# ---- who writes guest RAM is undone by the next flush -------------------------------------------------------


def test_a_page_written_through_a_view_is_restored(ready: Cache) -> None:
    ram = ready.blocks["pc.ram"]
    with ram.writable(3, 2) as view:
        assert view.shape == (2, PAGE)
        view[0] = 99
        del view
    assert ram.guest[3, 0] == 99
    assert bitmap.to_pfns(ram.svm_bitmap).tolist() == [3, 4]
    ready.receive(2, "pc.ram", 20, page(1))
    assert checkpoint(ready, 2).svm_pages == 2
    assert ram.guest[3, 0] == 3


def test_a_view_that_lives_on_counts_as_written_at_every_seal(ready: Cache) -> None:
    ram = ready.blocks["pc.ram"]
    with ram.writable(3, 1) as view:
        for epoch in (2, 3):
            view[0, 5] = 77  # written after the range was marked for the epoch before
            ready.receive_zero(epoch, "boot", 0)
            assert checkpoint(ready, epoch).svm_pages == 1
            assert ram.guest[3, 5] == 3
    part = view[0, 100:]  # what is left of it outlives the `with`
    del view
    part[0] = 55
    ready.receive_zero(4, "boot", 0)
    assert checkpoint(ready, 4).svm_pages == 1
    assert ram.guest[3, 100] == 3
    part[0] = 55
    del part
    ready.receive_zero(5, "boot", 0)
    checkpoint(ready, 5)
    assert ram.guest[3, 100] == 3
    ready.receive_zero(6, "boot", 0)
    assert checkpoint(ready, 6).svm_pages == 0  # it is gone for good


def test_words_of_any_log_count_from_any_page_on(ready: Cache) -> None:
    ram = ready.blocks["pc.ram"]
    words = bitmap.from_pfns([0, 63, 64, 99], 100)
    ready.sync_words(ram, words, first_pfn=33, n_pages=100)
    assert bitmap.to_pfns(ram.svm_bitmap).tolist() == [33, 96, 97, 132]
    ready.sync_words("pc.ram", bitmap.from_pfns([966], 967), first_pfn=33)  # to the end, which is no multiple of 64
    assert bitmap.to_pfns(ram.svm_bitmap).tolist() == [33, 96, 97, 132, 999]


def test_a_lost_log_makes_every_page_dirty(ready: Cache) -> None:
    ready.dirty_log_lost()
    ready.receive_zero(2, "boot", 0)
    assert checkpoint(ready, 2).flush_pages == 1013


@pytest.mark.parametrize(
    ("words", "first", "count", "error"),
    [
        (np.zeros(2, np.uint64), 0, 64, ArgumentError),  # too many words
        (np.zeros(1, np.uint64), 0, 65, ArgumentError),
        (np.zeros(1, np.int64), 0, 64, ArgumentError),
        (np.full(1, 1 << 63, np.uint64), 0, 63, TailError),
        (np.zeros(1, np.uint64), 990, 11, RangeError),
        (np.zeros(1, np.uint64), 1 << 63, 1, RangeError),
        (np.zeros(1, np.uint64), -1, 1, ArgumentError),
    ],
)
def test_words_that_do_not_fit_change_nothing(
    ready: Cache, words: np.ndarray, first: int, count: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        ready.sync_words("pc.ram", words, first, count)
    assert bitmap.count(ready.blocks["pc.ram"].svm_bitmap) == 0


# ---- what is refused ----------------------------------------------------------------------------------------


def test_a_page_that_does_not_fit_changes_nothing(ready: Cache) -> None:
    refused: list[tuple[type[Exception], Callable[[], None]]] = [
        (LengthError, lambda: ready.receive(2, "pc.ram", 0, b"short")),
        (LengthError, lambda: ready.receive(2, "pc.ram", 0, bytes(PAGE + 1))),
        (LengthError, lambda: ready.receive_pages(2, "pc.ram", [1, 2], page(1))),
        (RangeError, lambda: ready.receive(2, "pc.ram", 1000, page(1))),
        (RangeError, lambda: ready.receive(2, "pc.ram", (1 << 64) - 1, page(1))),
        (RangeError, lambda: ready.receive_zero(2, "pc.ram", 999, 2)),
        (RangeError, lambda: ready.receive_zero(2, "pc.ram", 1, (1 << 64) - 1)),
        (RangeError, lambda: ready.receive_pages(2, "pc.ram", [1, 1000], page(1) + page(1))),
        (ArgumentError, lambda: ready.receive_pages(2, "pc.ram", [1, -1], page(1) + page(1))),
        (ArgumentError, lambda: ready.receive_pages(2, "pc.ram", [1.0], page(1))),
        (ArgumentError, lambda: ready.receive(2, "pc.ram", -1, page(1))),
        (ArgumentError, lambda: ready.receive(2, "pc.ram", 1 << 64, page(1))),
        (ArgumentError, lambda: ready.receive(2, "pc.ram", "1", page(1))),  # type: ignore[arg-type]
        (ArgumentError, lambda: ready.receive(2, "pc.ram", 0, "x" * PAGE)),  # type: ignore[arg-type]
        (ArgumentError, lambda: ready.receive(2, "pc.ram", 0, np.zeros(2 * PAGE, np.uint8)[::2])),
        (BlockError, lambda: ready.receive(2, "vga", 0, page(1))),
        (BlockError, lambda: ready.receive(2, 2, 0, page(1))),
        (EpochError, lambda: ready.receive(1, "pc.ram", 0, page(1))),
        (RangeError, lambda: ready.mark_dirty("pc.ram", 1000)),
    ]
    before = ready.blocks["pc.ram"].cache.copy()
    for error, call in refused:
        with pytest.raises(error):
            call()
    assert (ready.blocks["pc.ram"].cache == before).all()
    assert bitmap.count(ready.blocks["pc.ram"].pvm_bitmap) == 0
    assert bitmap.count(ready.blocks["pc.ram"].svm_bitmap) == 0


def test_errors_say_the_numbers(ready: Cache) -> None:
    with pytest.raises(LengthError, match=r"5.*4096"):
        ready.receive(2, "pc.ram", 0, b"short")
    with pytest.raises(RangeError, match=r"pc\.ram.*1000|1000.*pc\.ram"):
        ready.receive(2, "pc.ram", 1000, page(1))
    with pytest.raises(BlockError, match=r"no block 'vga'; there are 0 boot, 1 pc\.ram"):
        ready.mark_dirty("vga", 0)


def test_calls_out_of_order_are_refused(cache: Cache) -> None:
    with pytest.raises(NotSealedError):
        cache.flush()
    with pytest.raises(NotSealedError):
        cache.loaded()
    with pytest.raises(NoStateError, match="first epoch"):
        cache.failover()
    with pytest.raises(NoStateError):
        cache.device_state()
    with pytest.raises(EpochError):
        cache.abort(1, "never opened")
    cache.receive(1, 0, 0, page(1))
    with pytest.raises(IncompleteError):
        cache.seal(1)  # no device state, not even an empty one
    cache.receive(2, 0, 0, page(1))
    cache.device_state_buffer(2, 0)
    with pytest.raises(IncompleteError, match=r"7.*1"):
        cache.seal(2, n_pages=7)
    cache.receive(3, 0, 0, page(1))
    cache.device_state_buffer(3, 0)
    cache.seal(3)
    with pytest.raises(SealedError):
        cache.receive(4, 0, 0, page(1))
    with pytest.raises(SealedError):
        cache.abort(3, "too late")
    with pytest.raises(SealedError):
        cache.loaded()
    cache.flush()
    cache.loaded()
    assert cache.device_state() == b""


def test_an_aborted_epoch_loses_nothing_and_its_number_is_spent(ready: Cache) -> None:
    ready.receive(2, "pc.ram", 3, page(33))
    ready.abort(2, "the primary's checkpoint failed")
    ram = ready.blocks["pc.ram"]
    assert ram.guest[3, 0] == 3
    with pytest.raises(EpochError):
        ready.receive(2, "pc.ram", 3, page(34))
    ready.receive(3, "pc.ram", 4, page(44))
    assert checkpoint(ready, 3).pvm_pages == 2
    assert (ram.guest[3, 0], ram.guest[4, 0]) == (33, 44)


def test_device_state_above_its_bound_is_refused(memory: Memory) -> None:
    with Cache.create(memory, device_state_max=8192) as cache:
        assert cache.status().device_state_max_bytes == 8192
        cache.receive(1, 0, 0, page(1))
        assert len(cache.device_state_buffer(1, 8192)) == 8192
        for length in (8193, 1 << 62):
            with pytest.raises(TooLargeError):
                cache.device_state_buffer(1, length)


def test_options_out_of_range_are_refused(memory: Memory) -> None:
    for options in ({"threads": -1}, {"threads": 1 << 20}, {"copy": "sse9"}, {"device_state_max": -1}):
        with pytest.raises(ArgumentError):
            Cache.create(memory, **options)  # type: ignore[arg-type]
    Cache.create(memory).close()  # nothing was made


# ---- the VM's veto ------------------------------------------------------------------------------------------


def test_a_veto_aborts_the_epoch_and_carries_its_reason(ready: Cache) -> None:
    seen: list[bytes] = []

    def refuse(state: memoryview) -> None:
        seen.append(bytes(state))
        assert state.readonly
        raise ValueError("3 registers, 4 expected")

    ready.receive(2, "pc.ram", 3, page(33))
    ready.device_state_buffer(2, 5)[:] = b"wrong"
    with pytest.raises(VetoError, match="refused") as caught:
        ready.seal(2, check=refuse)
    assert isinstance(caught.value.__cause__, ValueError)
    assert seen == [b"wrong"]
    assert ready.status().sealed_epoch == 1
    assert ready.blocks["pc.ram"].guest[3, 0] == 3
    assert ready.failover().now


def test_a_check_that_is_content_lets_seal_go_on(ready: Cache) -> None:
    ready.receive(2, "pc.ram", 3, page(33))
    ready.device_state_buffer(2, 5)[:] = b"right"
    assert ready.seal(2, check=lambda state: bytes(state) == b"right").epoch == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_check_is_no_veto(ready: Cache, stop: type[BaseException]) -> None:
    def interrupted(_: memoryview) -> None:
        if stop is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        raise stop

    ready.receive_zero(2, "boot", 0)
    ready.device_state_buffer(2, 0)
    with pytest.raises(stop):
        ready.seal(2, check=interrupted)
    assert ready.status().sealed_epoch == 1


# ---- taking over --------------------------------------------------------------------------------------------


def test_a_live_secondary_takes_over_at_once_and_then_takes_no_more(ready: Cache) -> None:
    ready.receive(2, "pc.ram", 3, page(33))
    answer = ready.failover()
    assert (answer.now, answer.epoch) == (True, 1)
    assert ready.blocks["pc.ram"].guest[3, 0] == 3
    with pytest.raises(FailedOverError):
        ready.receive(2, "pc.ram", 4, page(44))
    ready.device_state()
    with pytest.raises(FailedOverError):
        ready.seal(2)
    assert ready.status().phase == Phase.FAILED_OVER


def test_failover_during_a_flush_waits_for_loaded(ready: Cache) -> None:
    ready.receive(2, "pc.ram", 3, page(33))
    ready.device_state_buffer(2, 0)
    ready.seal(2)
    answer = ready.failover()
    assert (answer.now, answer.epoch) == (False, 2)
    assert ready.status().failover_pending
    ready.flush()
    assert ready.loaded() is True
    assert ready.blocks["pc.ram"].guest[3, 0] == 33


def test_a_vm_whose_load_failed_never_takes_over(ready: Cache) -> None:
    ready.receive(2, "pc.ram", 3, page(33))
    ready.device_state_buffer(2, 4)[:] = b"next"
    ready.seal(2)
    ready.flush()
    assert ready.loaded(ok=False) is False
    with pytest.raises(LoadFailedError):
        ready.failover()
    assert ready.device_state() == b"next"


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


# ---- what it has done, and sources ------------------------------------------------------------------------


def test_a_handle_tells_what_it_has_done(ready: Cache) -> None:
    ready.receive(2, 0, 0, page(1))
    ready.abort(2, "chance")
    ready.receive(3, 0, 1, page(1))
    checkpoint(ready, 3)
    stats = ready.stats()
    assert (stats.received_pages, stats.sealed_epochs, stats.aborted_epochs) == (12, 2, 1)
    assert (stats.flushed_pages, stats.flushed_bytes, stats.epoch) == (12, 12 * PAGE, 3)
    assert 0 < stats.flush_ns <= stats.flush_total_ns
    assert "2 epochs sealed, 1 aborted" in str(stats)


def test_a_dirty_log_of_something_that_is_no_vm_is_refused() -> None:
    slot = colocache.KvmSlot(slot=0, block=0, first_pfn=0, n_pages=13)
    with Path("/dev/null").open("rb") as null:
        with pytest.raises(colocache.ColocacheError), colocache.KvmDirtyLog(null, [slot], False) as log:
            log.discard()
        with pytest.raises(colocache.ColocacheError):
            colocache.KvmDirtyRing(null, [slot], [colocache.KvmRing(vcpu_fd=null.fileno())], 65536)
        for size in (-1, 1 << 32):
            with pytest.raises(ArgumentError, match=str(size)):
                colocache.KvmDirtyRing(null, [slot], [], size)
        for bad in (colocache.KvmSlot(-1, 0, 0, 1), colocache.KvmSlot(0, 0, -1, 1)):
            with pytest.raises(ArgumentError):
                colocache.KvmDirtyLog(null, [bad], False)
    with pytest.raises(ArgumentError, match="not open"):
        colocache.KvmDirtyLog(-1, [slot], False)


def test_writes_of_this_process_are_seen_by_its_own_log(ready: Cache) -> None:
    """The SVM's writes through its mapping of guest RAM, not through a view that counts by itself."""
    ram = ready.blocks["pc.ram"]
    try:
        log = colocache.UffdDirtyLog([colocache.UffdRange(1, 0, ram.n_pages, ram.guest_addr)])
    except colocache.UnsupportedError as error:
        pytest.skip(str(error))
    with log:
        log.discard()
        for pfn in (0, 5, 64, 999):
            ctypes.memset(ram.guest_addr + pfn * PAGE + 9, 0xEE, 1)
        ready.sync_dirty_log(log)
        assert bitmap.to_pfns(ram.svm_bitmap).tolist() == [0, 5, 64, 999]
        ready.receive_zero(2, "boot", 0)
        checkpoint(ready, 2)
        assert ram.guest[5].tolist() == [5] * PAGE
        log.discard()  # what the flush wrote is nobody's
        ready.sync_dirty_log(log)
        assert bitmap.count(ram.svm_bitmap) == 0
    log.close()
    with pytest.raises(ClosedError, match="dirty log of this process is closed"):
        ready.sync_dirty_log(log)


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


# ---- the stream ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_pages_travel_from_ram_to_cache_and_the_next_message_ends_them(
    cache: Cache, pair: tuple[socket.socket, socket.socket]
) -> None:
    left, right = pair
    with RamImage.create(BLOCKS[0], "shm") as boot, RamImage.create(BLOCKS[1], "shm") as ram, Sender() as sender:
        sender.add_block("boot", boot.addr, boot.spec.len_bytes)
        sender.add_block("pc.ram", ram.addr, ram.spec.len_bytes)
        ram.view[:] = np.arange(1000)[:, None] % 7
        sender.mark_all()

        def send() -> None:
            sender.send(left, epoch=1, timeout=30)
            left.sendall(colocache.message_header(7, 1, 4, 11, 12) + b"body")

        thread = threading.Thread(target=send)
        thread.start()
        header, n_pages = cache.receive_stream(right, timeout=30)
        thread.join()
        assert n_pages == 1013
        assert colocache.parse_header(header) == colocache.Header(7, 1, 4, 11, 12)
        assert right.recv(100) == b"body"
        checkpoint(cache, 1, n_pages=1013)
        assert (cache.blocks["pc.ram"].guest == ram.view).all()


def test_garbage_on_the_stream_writes_nothing(ready: Cache, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    left.sendall(os.urandom(4096))
    with pytest.raises(colocache.PacketError) as caught:
        ready.receive_stream(right, timeout=30)
    assert caught.value.n_pages == 0
    assert bitmap.count(ready.blocks["pc.ram"].pvm_bitmap) == 0


def test_a_silent_or_lost_peer_is_told_apart(ready: Cache, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    with pytest.raises(TimedOutError):
        ready.receive_stream(right, timeout=0.01)
    left.sendall(b"half a header")
    with pytest.raises(TimedOutError):
        ready.receive_stream(right, timeout=0.01)
    left.close()
    with pytest.raises(PeerLostError):
        ready.receive_stream(right, timeout=30)
    with pytest.raises(ArgumentError):
        ready.receive_stream(right, timeout=-1)
    with pytest.raises(ArgumentError):
        ready.receive_stream(-1, timeout=1)


def test_closing_under_a_waiting_thread_is_refused(memory: Memory, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    cache = Cache.create(memory)
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            cache.receive_stream(right, timeout=30)
        except colocache.ColocacheError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    left.sendall(colocache.message_header(7, 1, 0)[:20])  # now it is inside the library
    while cache._handle._running == 0:
        pass
    with pytest.raises(OrderError, match="still running"):
        cache.close()
    left.close()
    thread.join()
    assert [type(error) for error in failed] == [PeerLostError]
    cache.close()


def test_many_odd_blocks_keep_their_order(make_memory: Callable[..., Memory]) -> None:
    specs = tuple(BlockSpec(f"b{i}", (i + 1) * 2 * PAGE, 2 * PAGE) for i in range(40))
    with Cache.create(make_memory(specs)) as cache:
        assert list(cache.blocks) == [spec.name for spec in specs]
        cache.receive(1, 39, 39, bytes([1]) * 2 * PAGE)
        cache.device_state_buffer(1, 0)
        cache.seal(1)
        cache.flush()
        assert cache.blocks["b39"].guest.sum() == 2 * PAGE
