# SPDX-License-Identifier: Apache-2.0
"""The pages of a cache: those that come, one by one or on a stream, and those that the SVM wrote itself."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import colocache
from colocache import (
    ArgumentError,
    BlockError,
    Cache,
    ClosedError,
    EpochError,
    LengthError,
    Memory,
    OrderError,
    PeerLostError,
    RamImage,
    RangeError,
    Sender,
    TailError,
    TimedOutError,
    bitmap,
)

from support import BLOCKS, PAGE, checkpoint, page

# ---- pages that do not fit ----------------------------------------------------------------------------------


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


def test_an_error_does_not_hold_the_callers_buffer(ready: Cache) -> None:
    """Its traceback lives as long as somebody looks at it: a view released meanwhile would be another error."""
    calls: list[Callable[[memoryview], object]] = [
        lambda data: ready.receive(2, "pc.ram", 1000, data),
        lambda data: ready.receive_pages(2, "pc.ram", [1000], data),
        ready.receive_packets,
        lambda data: colocache.parse_header(data[:40]),
    ]
    for call in calls:
        with memoryview(bytearray(b"x" * PAGE)) as data, pytest.raises(colocache.ColocacheError) as caught:
            call(data)
        assert caught.tb is not None
    with Sender() as sender:
        room = bytearray(39)
        with pytest.raises(LengthError):
            sender.mark_all()
            with RamImage.create(BLOCKS[0], "shm") as boot:
                sender.add_block("boot", boot.addr, boot.spec.len_bytes)
                sender.mark_all()
                sender.pack(room, epoch=1)
        room.append(1)


def test_errors_say_the_numbers(ready: Cache) -> None:
    with pytest.raises(LengthError, match=r"5.*4096"):
        ready.receive(2, "pc.ram", 0, b"short")
    with pytest.raises(RangeError, match=r"pc\.ram.*1000|1000.*pc\.ram"):
        ready.receive(2, "pc.ram", 1000, page(1))
    with pytest.raises(BlockError, match=r"no block 'vga'; there are 0 boot, 1 pc\.ram"):
        ready.mark_dirty("vga", 0)


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


def test_an_event_loop_takes_pages_beside_its_other_work(
    cache: Cache, pair: tuple[socket.socket, socket.socket]
) -> None:
    """asyncio calls when there is something to read; nothing there is no error and costs no wait."""
    left, right = pair
    right.setblocking(False)
    assert cache.receive_ready(right, timeout=0) == (None, 0)

    async def receive() -> tuple[bytes, int, int]:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        headers: list[bytes] = []
        total = calls = 0

        def readable() -> None:
            nonlocal total, calls
            header, n_pages = cache.receive_ready(right, timeout=10, max_pages=100)
            total, calls = total + n_pages, calls + 1
            if header is not None:
                headers.append(header)
                ended.set()

        loop.add_reader(right, readable)
        await asyncio.wait_for(ended.wait(), 30)
        loop.remove_reader(right)
        return headers[0], total, calls

    with RamImage.create(BLOCKS[1], "shm") as ram, Sender() as sender:
        sender.add_block("boot", ram.addr, BLOCKS[0].len_bytes)
        sender.add_block("pc.ram", ram.addr, ram.spec.len_bytes)
        ram.view[:] = np.arange(1000)[:, None] % 7
        sender.mark_all()

        def send() -> None:
            while sender.count()[0]:
                sender.send(left, epoch=1, timeout=30, max_pages=64)
            left.sendall(colocache.message_header(7, 1, 0))

        thread = threading.Thread(target=send)
        thread.start()
        header, total, calls = asyncio.run(receive())
        thread.join()
        assert (colocache.parse_header(header).type, total) == (7, 1013)
        assert calls > 5  # it came back between
        checkpoint(cache, 1, n_pages=total)
        assert (cache.blocks["pc.ram"].guest == ram.view).all()
    left.close()
    with pytest.raises(PeerLostError):
        cache.receive_ready(right, timeout=1)


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


# ---- dirty logs ---------------------------------------------------------------------------------------------


def test_a_dirty_log_of_something_that_is_no_vm_is_refused() -> None:
    slot = colocache.KvmSlot(slot=0, block=0, first_pfn=0, n_pages=13)
    with Path("/dev/null").open("rb") as null:
        with pytest.raises(ArgumentError, match="is no VM of KVM's"):
            colocache.KvmDirtyLog(null, [slot])
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


def test_bytes_written_in_place_are_pages_when_the_with_ends(cache: Cache) -> None:
    ram = cache.blocks["pc.ram"]
    with cache.receive_in_place(1, "pc.ram", 5, 3) as pages:
        assert pages.shape == (3, PAGE)
        pages[:] = np.array([[7], [8], [9]], np.uint8)
        assert bitmap.count(ram.pvm_bitmap) == 0  # not pages yet
    assert bitmap.count(ram.pvm_bitmap) == 3
    checkpoint(cache, 1, n_pages=3)
    assert ram.guest[5:8, 4095].tolist() == [7, 8, 9]
    with pytest.raises(ZeroDivisionError), cache.receive_in_place(2, ram, 5, 2) as pages:
        pages[0, 0] = 1 // 0
    assert bitmap.count(ram.pvm_bitmap) == 2  # touched, perhaps
    cache.device_state_buffer(2, 0)
    with pytest.raises(colocache.IncompleteError):
        cache.seal(2, n_pages=2)  # and not counted
    assert ram.guest[5, 4095] == 7
    with pytest.raises(RangeError), cache.receive_in_place(3, "pc.ram", 999, 2):
        pass
    del pages
