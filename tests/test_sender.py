# SPDX-License-Identifier: Apache-2.0
"""The primary's half: nothing that was taken from a dirty log is forgotten before it is acknowledged."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import colocache
from colocache import (
    ArgumentError,
    BlockError,
    BlockSpec,
    Cache,
    ClosedError,
    EpochError,
    LengthError,
    PacketError,
    PeerLostError,
    RamImage,
    RangeError,
    Sender,
    TailError,
    TimedOutError,
    bitmap,
    message_header,
    parse_header,
)

from support import BLOCKS, PAGE


@pytest.fixture
def ram() -> Iterator[RamImage]:
    """A primary's pc.ram; page n holds n % 251 + 1 in every byte, so that none is a zero page."""
    with RamImage.create(BLOCKS[1], "shm") as made:
        made.view[:] = (np.arange(1000) % 251 + 1).astype(np.uint8)[:, None]
        yield made


@pytest.fixture
def sender(ram: RamImage) -> Iterator[Sender]:
    """A sender that knows boot, whose memory is ram's first pages, and pc.ram."""
    with Sender() as made:
        assert made.add_block("boot", ram.addr, 13 * PAGE) == 0
        assert made.add_block("pc.ram", ram.addr, ram.spec.len_bytes) == 1
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def transfer(
    sender: Sender, cache: Cache, pair: tuple[socket.socket, socket.socket], epoch: int, **options: int
) -> colocache.SendResult:
    """Send what is pending into the cache and end it with a message of type 7."""
    results: list[colocache.SendResult] = []

    def send() -> None:
        results.append(sender.send(pair[0], epoch=epoch, timeout=60, **options))
        pair[0].sendall(colocache.message_header(7, epoch, 0))

    thread = threading.Thread(target=send)
    thread.start()
    header, n_pages = cache.receive_stream(pair[1], timeout=60)
    thread.join()
    assert colocache.parse_header(header).type == 7
    assert n_pages == results[0].n_pages
    return results[0]


def seal(cache: Cache, epoch: int) -> None:
    cache.device_state_buffer(epoch, 0)
    cache.seal(epoch)
    cache.flush()
    cache.loaded()


# ---- what is owed ------------------------------------------------------------------------------------------


def test_a_page_is_owed_until_it_is_acknowledged(
    sender: Sender, ram: RamImage, cache: Cache, pair: tuple[socket.socket, socket.socket]
) -> None:
    sender.mark_dirty(1, 5, 3)
    sender.sync_words(1, bitmap.from_pfns([0, 66], 67), first_pfn=933)
    assert sender.count() == (5, 5)
    assert transfer(sender, cache, pair, 1).n_pages == 5
    assert sender.count() == (0, 5)
    sender.mark_dirty(1, 6)
    cache.abort(1, "the link broke")
    sender.resend()
    assert sender.count() == (5, 5)
    result = transfer(sender, cache, pair, 2)
    assert (result.n_pages, result.n_zero) == (5, 0)
    assert result.n_bytes > 5 * PAGE
    sender.received()
    assert sender.count() == (0, 0)
    seal(cache, 2)
    guest = cache.blocks["pc.ram"].guest
    assert guest.any(axis=1).nonzero()[0].tolist() == [5, 6, 7, 933, 999]
    assert (guest[[5, 6, 7, 933, 999]] == ram.view[[5, 6, 7, 933, 999]]).all()
    del guest


def test_zero_pages_travel_as_flags(
    sender: Sender, ram: RamImage, cache: Cache, pair: tuple[socket.socket, socket.socket]
) -> None:
    sender.mark_all()
    assert transfer(sender, cache, pair, 1).n_zero == 0
    ram.view[100:900] = 0
    sender.mark_dirty(1, 100, 800)
    result = transfer(sender, cache, pair, 1)
    assert (result.n_pages, result.n_zero) == (800, 800)
    assert result.n_bytes < 800 * 64
    seal(cache, 1)
    assert (cache.blocks["pc.ram"].guest == ram.view).all()


def test_a_limit_and_stripes_send_every_page_once(
    sender: Sender, cache: Cache, pair: tuple[socket.socket, socket.socket]
) -> None:
    sender.mark_all()
    assert transfer(sender, cache, pair, 1, max_pages=10).n_pages <= 10
    before = sender.count()[0]
    assert before >= 1003
    parts = [transfer(sender, cache, pair, 1, stripe=stripe, n_stripes=3).n_pages for stripe in range(3)]
    assert sum(parts) == before
    assert sender.count()[0] == 0
    assert bitmap.count(cache.blocks["pc.ram"].pvm_bitmap) == 1000


@pytest.mark.parametrize("seed", range(5))
def test_secondary_equals_primary_after_every_epoch(
    ram: RamImage, sender: Sender, cache: Cache, pair: tuple[socket.socket, socket.socket], seed: int
) -> None:
    random_ = random.Random(seed)
    guest = cache.blocks["pc.ram"]
    sender.mark_all()
    for epoch in range(1, 12):
        for _ in range(random_.randrange(40)):
            pfn = random_.randrange(1000)
            ram.view[pfn] = random_.randrange(256)
            # page n of boot is page n of pc.ram here
            sender.mark_dirty(1, pfn)
            if pfn < 13:
                sender.mark_dirty(0, pfn)
        if epoch > 1:
            with guest.writable(random_.randrange(1000), 1) as view:  # the SVM's own branch
                view[:] = random_.randrange(256)
                del view
        transfer(sender, cache, pair, epoch)
        if random_.random() < 0.3:
            cache.abort(epoch, "chance")
            sender.resend()
            continue
        sender.received()
        seal(cache, epoch)
        assert (guest.guest == ram.view).all()
        cache.validate(compare_pages=True)


def test_a_lost_peer_leaves_everything_owed(sender: Sender, pair: tuple[socket.socket, socket.socket]) -> None:
    sender.mark_all()
    pair[1].close()
    with pytest.raises(PeerLostError):
        sender.send(pair[0], epoch=1, timeout=60)
    assert sender.count()[1] == 1013
    sender.resend()
    assert sender.count() == (1013, 1013)


def test_a_peer_that_does_not_read_is_given_up(sender: Sender, pair: tuple[socket.socket, socket.socket]) -> None:
    sender.mark_all()
    with pytest.raises(TimedOutError):
        sender.send(pair[0], epoch=1, timeout=0.01)
    sender.resend()
    assert sender.count() == (1013, 1013)


def test_packets_of_another_epoch_write_nothing(
    sender: Sender, cache: Cache, pair: tuple[socket.socket, socket.socket]
) -> None:
    sender.mark_dirty(1, 5)
    sender.send(pair[0], epoch=3, timeout=60)
    with pytest.raises(EpochError):
        cache.receive_stream(pair[1], timeout=60, epoch=4)
    assert not cache.blocks["pc.ram"].cache.any()


# ---- what is refused ---------------------------------------------------------------------------------------


def test_what_does_not_fit_changes_nothing(sender: Sender, ram: RamImage, pair: tuple[socket.socket, ...]) -> None:
    refused: list[tuple[type[Exception], Callable[[], object]]] = [
        (BlockError, lambda: sender.add_block("boot", ram.addr, PAGE)),
        (ArgumentError, lambda: sender.add_block("", ram.addr, PAGE)),
        (LengthError, lambda: sender.add_block("more", ram.addr, PAGE + 1)),
        (LengthError, lambda: sender.add_block("more", ram.addr, 0)),
        (LengthError, lambda: sender.add_block("more", ram.addr, 6000, 3000)),
        (LengthError, lambda: sender.add_block("more", ram.addr, 6000, 0)),
        (LengthError, lambda: sender.add_block("more", ram.addr, 1 << 40, 1 << 33)),
        (ArgumentError, lambda: sender.add_block("more", -1, PAGE)),
        (ArgumentError, lambda: sender.add_block("more", 0, PAGE)),
        (RangeError, lambda: sender.mark_dirty(1, 1000)),
        (RangeError, lambda: sender.mark_dirty(1, 999, (1 << 64) - 1)),
        (BlockError, lambda: sender.mark_dirty(2, 0)),
        (BlockError, lambda: sender.sync_words(2, np.zeros(1, np.uint64))),
        (RangeError, lambda: sender.sync_words(1, np.zeros(1, np.uint64), 990, 11)),
        (TailError, lambda: sender.sync_words(1, np.full(1, 1 << 63, np.uint64), 0, 63)),
        (ArgumentError, lambda: sender.sync_words(1, np.zeros(3, np.uint64))),
        (ArgumentError, lambda: sender.send(pair[0], epoch=1, timeout=1, stripe=2, n_stripes=2)),
        (ArgumentError, lambda: sender.send(pair[0], epoch=1, timeout=1, n_stripes=0)),
        (ArgumentError, lambda: sender.send(pair[0], epoch=-1, timeout=1)),
        (ArgumentError, lambda: sender.send(pair[0], epoch=1, timeout=float("nan"))),
    ]
    for number, (error, call) in enumerate(refused):
        try:
            call()
        except error:
            continue
        raise AssertionError(f"number {number} was taken")
    assert sender.count() == (0, 0)


def test_after_close_everything_says_closed() -> None:
    sender = Sender()
    sender.close()
    sender.close()
    for call in (sender.mark_all, sender.received, sender.resend, sender.count):
        with pytest.raises(ClosedError, match="sender is closed"):
            call()


# ---- headers -----------------------------------------------------------------------------------------------


def test_a_header_comes_back_as_it_was_made() -> None:
    most = ((1 << 16) - 1, (1 << 48) - 1, (1 << 64) - 1, (1 << 32) - 1, 0)
    for fields in ((0, 0, 0, 0, 0), (7, 8, 9, 10, 11), most):
        header = colocache.message_header(*fields)
        assert len(header) == colocache.HEADER_BYTES == 40
        assert colocache.parse_header(header) == colocache.Header(*fields)
        assert colocache.parse_header(bytearray(header)) == colocache.Header(*fields)


def test_every_flipped_bit_of_a_header_is_noticed() -> None:
    header = colocache.message_header(7, 8, 9, 10, 11)
    for bit in range(320):
        damaged = bytearray(header)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PacketError):
            colocache.parse_header(damaged)


def test_a_header_out_of_range_is_refused() -> None:
    for fields in (
        (1 << 16, 0, 0),
        (1 << 32, 0, 0),
        (-1, 0, 0),
        (0, 1 << 64, 0),
        (0, 0, -1),
        (0, 0, 0, 1 << 32),
        (0, 0, 0, 0, -1),
    ):
        with pytest.raises(ArgumentError):
            colocache.message_header(*fields)
    for length in (0, 39, 41):
        with pytest.raises(LengthError, match=str(length)):
            colocache.parse_header(bytes(length))


def test_a_block_with_pages_of_64_kib_is_sent_in_those() -> None:
    spec = BlockSpec("ram", 5 << 16, 1 << 16)
    with RamImage.create(spec, "shm") as ram, Sender() as sender:
        sender.add_block("ram", ram.addr, spec.len_bytes, spec.page_size)
        sender.mark_all()
        assert sender.count() == (5, 5)
        with pytest.raises(RangeError):
            sender.mark_dirty(0, 5)


def test_a_transport_of_ones_own_takes_each_pending_page_once(sender: Sender, ram: RamImage) -> None:
    """What it could not deliver it marks, and it comes again; zero pages are said to be such."""
    ram.view[500:503] = 0
    sender.mark_dirty(1, 498, 6)
    runs = sender.take()
    assert [(run.block, run.first_pfn, run.n_pages, run.zero) for run in runs] == [
        (1, 498, 2, False),
        (1, 500, 3, True),
        (1, 503, 1, False),
    ]
    assert sender.count() == (0, 6)
    assert sender.take() == ()
    sender.mark_dirty(runs[1].block, runs[1].first_pfn, runs[1].n_pages)
    assert sender.take(max_pages=2) == (colocache.PageRun(1, 500, 2, True),)
    assert sender.count() == (1, 6)
    with pytest.raises(ArgumentError):
        sender.take(max_runs=0)


def test_a_send_that_failed_leaves_what_it_did_not_send_pending(sender: Sender) -> None:
    left, right = socket.socketpair()
    right.close()
    sender.mark_all()
    with left, pytest.raises(PeerLostError):
        sender.send(left, epoch=1, timeout=5)
    assert sender.count() == (1013, 1013)


# ---- packets through memory, as a transport that is no socket carries them ----


@pytest.mark.parametrize("room", [5000, 40_000, 1 << 20])
@pytest.mark.parametrize("cut", [1, 17, 4096, 16384])
def test_what_is_packed_arrives_whole_however_it_is_cut(
    sender: Sender, ram: RamImage, make_memory: Callable[..., object], room: int, cut: int
) -> None:
    """Packets into memory, cut anywhere, and taken from memory: every page once, none before its packet is whole."""
    with Cache.create(make_memory(), threads=1) as cache:  # type: ignore[arg-type]
        sender.mark_all()
        ram.view[100:200] = 0
        buffer, stream, packed = bytearray(room), bytearray(), 0
        while (result := sender.pack(buffer, epoch=1)).n_bytes:
            assert result.n_bytes <= room
            stream += buffer[: result.n_bytes]
            packed += result.n_pages
        assert packed == 1013
        assert sender.count() == (0, 1013)
        stream += message_header(77, 1, 3) + b"xyz"
        kept, taken, header = bytearray(), 0, None
        for at in range(0, len(stream), cut if cut > 1 else 997):
            kept += stream[at : at + (cut if cut > 1 else 997)]
            used, header, n_pages = cache.receive_packets(kept, epoch=1)
            del kept[:used]
            taken += n_pages
            if header is not None:
                break
        assert taken == packed
        assert header is not None
        assert parse_header(header).type == 77
        assert np.array_equal(cache.blocks["pc.ram"].cache, ram.view)


def test_room_for_no_page_is_refused_and_nothing_is_taken(sender: Sender) -> None:
    sender.mark_all()
    with pytest.raises(LengthError, match="takes no packet with a page of block boot, which has 4096"):
        sender.pack(bytearray(4096), epoch=1)
    assert sender.count() == (1013, 1013)
    with pytest.raises(EpochError):
        sender.pack(bytearray(8192), epoch=0)
    assert sender.pack(bytearray(8192), epoch=1, max_pages=1).n_pages == 1
