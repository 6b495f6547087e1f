# SPDX-License-Identifier: Apache-2.0
"""The cache through its Python face: a checkpoint's life, order and its refusals, the VM's veto, taking over."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest

import colocache
from colocache import (
    Action,
    ArgumentError,
    Attachment,
    BlockSpec,
    Cache,
    EpochError,
    FailedOverError,
    IncompleteError,
    LoadFailedError,
    Memory,
    NoStateError,
    NotSealedError,
    OrderError,
    Phase,
    SealedError,
    TooLargeError,
    VetoError,
    bitmap,
)

from support import PAGE, checkpoint, page

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


def test_what_of_an_epoch_lies_elsewhere_is_told_until_the_next_is_sealed(cache: Cache, memory: Memory) -> None:
    assert cache.status().attachment == Attachment()
    log = Attachment(1, 1 << 63, 0xFFFFFFFFFFFFFFFF)
    cache.receive(1, "pc.ram", 0, page(1))
    cache.device_state_buffer(1, 1)[:] = b"x"
    cache.seal(1, attachment=log)
    assert cache.status().attachment == colocache.inspect(memory).status.attachment == log
    cache.close()
    with Cache.attach(memory) as again:
        assert again.recovery is not None
        assert again.recovery.action is Action.REPLAYED
        assert again.status().attachment == log
        assert f"{1 << 63} bytes in disk log 1" in str(again.status())
        again.receive(2, "pc.ram", 0, page(2))
        for wrong in (Attachment(2, 0, 0), Attachment(-1, 0, 0), Attachment(0, 1 << 64, 0), Attachment(0, 0, -1)):
            with pytest.raises(ArgumentError):
                again.seal(2, attachment=wrong)
        checkpoint(again, 2)
        assert again.status().attachment == Attachment()


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


def test_many_odd_blocks_keep_their_order(make_memory: Callable[..., Memory]) -> None:
    specs = tuple(BlockSpec(f"b{i}", (i + 1) * 2 * PAGE, 2 * PAGE) for i in range(40))
    with Cache.create(make_memory(specs)) as cache:
        assert list(cache.blocks) == [spec.name for spec in specs]
        cache.receive(1, 39, 39, bytes([1]) * 2 * PAGE)
        cache.device_state_buffer(1, 0)
        cache.seal(1)
        cache.flush()
        assert cache.blocks["b39"].guest.sum() == 2 * PAGE


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


# ---- what is refused ----------------------------------------------------------------------------------------


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
