# SPDX-License-Identifier: Apache-2.0
"""Random bytes where bytes come from outside: on the socket, and in a control region.

Nothing crashes, and what is refused has changed nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import colocache as c
from colocache import Action, BlockSpec, Cache, Memory
from colocache.errors import ColocacheError, SystemCallError

from model import PAGE, page_of, pages_of

N_PAGES = [67, 1, 130]
SPECS = tuple(BlockSpec(f"block {i}", n * PAGE) for i, n in enumerate(N_PAGES))
U64 = (1 << 64) - 1

numbers = itertools.count()
some = settings(
    max_examples=int(os.environ.get("COLOCACHE_TEST_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def checksum(data: bytes) -> int:
    """As csrc/checksum.h defines it."""
    total = len(data)
    for i in range(0, len(data), 8):
        v = int.from_bytes(data[i : i + 8], "little") ^ ((i // 8 + 1) * 0x9E3779B97F4A7C15 & U64)
        total += (v & 0xFFFFFFFF) * (v >> 32) + v
    total &= U64
    total = (total ^ total >> 31) * 0xBF58476D1CE4E5B9 & U64
    return total ^ total >> 29


def packet(epoch: int, block: int, runs: list[tuple[int, int, int]], data: bytes, body_len: int | None = None) -> bytes:
    """A PAGES packet with a right checksum, whatever it says."""
    packed = b"".join(struct.pack("<QII", first & U64, n, flags) for first, n, flags in runs)
    length = len(packed) + len(data) if body_len is None else body_len
    head = struct.pack("<4sHHQQII", b"COLO", c.WIRE_VERSION, c.MSG_PAGES, epoch, length, block, len(runs))
    total = checksum(head) ^ checksum(packed) if packed else checksum(head)
    return head + struct.pack("<Q", total) + packed + data


@pytest.fixture(scope="module")
def secondary() -> Iterator[tuple[Memory, Cache]]:
    """One for all the streams: every example leaves it with an open epoch that no example can seal."""
    memory = Memory.create(f"t{os.getpid()}-p{next(numbers)}", SPECS, backing="shm")
    memory.unlink()  # its descriptors are enough, and nothing is left between the tests of this file
    with Cache.create(memory, threads=1) as cache:
        cache.receive_zero(1, 0, 0, N_PAGES[0])
        cache.device_state_buffer(1, 0)
        cache.seal(1)
        cache.flush()
        cache.loaded()
        yield memory, cache
    memory.close()


def images(memory: Memory, which: str) -> list[bytes]:
    """The bytes of all guest or cache images."""
    return [os.pread(getattr(image, f"{which}_fd"), image.spec.len_bytes, 0) for image in memory.images]


runs = st.lists(
    st.tuples(st.integers(0, 140), st.integers(0, 6), st.sampled_from([0, 0, 0, 1, 1, 2])), min_size=0, max_size=5
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Packets of all kinds, right and wrong, some then damaged or cut, or bytes that are nothing at all."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.integers(0, 9)) == 0:
            parts.append(draw(st.binary(max_size=200)))
            continue
        chosen = draw(runs)
        n_pages = sum(n for _, n, flags in chosen if not flags & 1)
        data = b"".join(page_of(draw(st.integers(1, 1000))) for _ in range(n_pages))
        epoch, block = (
            draw(st.sampled_from([2, 2, 2, 2, 0, 1, 3, U64])),
            draw(st.sampled_from([0, 0, 1, 2, 2, 3, U64 >> 32])),
        )
        body = draw(st.sampled_from([None, None, None, 0, len(data), U64]))
        raw = bytearray(packet(epoch, block, chosen, data, body))
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
            raw[draw(st.integers(0, min(len(raw) - 1, 60)))] = draw(st.integers(0, 255))
        parts.append(bytes(raw[: draw(st.sampled_from([len(raw), len(raw), len(raw) // 2, 39]))]))
    return b"".join(parts)


@some
@given(stream=streams(), epoch=st.sampled_from([0, 2, 2, 2]))
def test_no_bytes_on_the_socket_reach_guest_ram_or_a_page_without_its_bit(
    secondary: tuple[Memory, Cache], stream: bytes, epoch: int
) -> None:
    memory, cache = secondary
    guest, cached = images(memory, "guest"), images(memory, "cache")
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        left.settimeout(10)
        left.sendall(stream)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(ColocacheError) as caught:
            for _ in range(10):  # a right header of another type ends a call, and the next goes on
                cache.receive_stream(right, timeout=10, epoch=epoch)
        assert not isinstance(caught.value, SystemCallError)
        assert str(caught.value)
    assert images(memory, "guest") == guest
    for block, before, after in zip(cache.blocks.values(), cached, images(memory, "cache"), strict=True):
        changed = {
            n for n in range(block.n_pages) if before[n * PAGE : n * PAGE + PAGE] != after[n * PAGE : n * PAGE + PAGE]
        }
        assert changed <= pages_of(block.pvm_bitmap)
    cache.validate(compare_pages=True)
    # Pages of epoch 2 alone are taken, and it can't be sealed: the next example finds the same state, with more bits.
    assert cache.status().sealed_epoch == 1


@some
@given(data=st.binary(max_size=400))
def test_the_checksum_is_its_definition(data: bytes) -> None:
    header = c.message_header(7, 1, len(data))
    assert int.from_bytes(header[32:], "little") == checksum(header[:32])
    assert c.parse_header(header).body_len == len(data)


@some
@given(header=st.binary(min_size=40, max_size=40))
def test_random_headers_are_refused(header: bytes) -> None:
    with pytest.raises(c.PacketError):
        c.parse_header(header)


# ---- control regions with damaged bytes ----


class Region:
    """A dead secondary: sealed, committed, or with pages of a newer epoch; everything of it remembered."""

    def __init__(self, kind: str) -> None:
        self.memory = Memory.create(f"t{os.getpid()}-r{next(numbers)}", SPECS, backing="shm")
        self.memory.unlink()
        with Cache.create(self.memory, threads=1, device_state_max=9000) as cache:
            for epoch in (1, 2):
                for block in range(3):
                    for pfn in range(0, N_PAGES[block], 3 * epoch):
                        cache.receive(epoch, block, pfn, page_of(1000 * epoch + pfn))
                with cache.blocks[2].writable(100, 7) as pages:
                    pages[:] = epoch
                    del pages
                cache.device_state_buffer(epoch, 5000)[:] = bytes([epoch]) * 5000
                cache.seal(epoch)
                if epoch == 1 or kind != "sealed":
                    cache.flush()
                    cache.loaded()
            if kind == "newer":
                cache.receive(3, 0, 0, page_of(3))
            with cache.blocks[0].writable(60, 2) as pages:
                pages[:] = 99
                del pages
        self.size = os.fstat(self.memory.control_fd).st_size
        self.control = os.pread(self.memory.control_fd, self.size, 0)
        self.guest, self.cache = images(self.memory, "guest"), images(self.memory, "cache")

    def restore(self) -> None:
        os.ftruncate(self.memory.control_fd, self.size)
        os.pwrite(self.memory.control_fd, self.control, 0)
        for image, guest in zip(self.memory.images, self.guest, strict=True):
            os.pwrite(image.guest_fd, guest, 0)


ACTIONS = {"sealed": Action.REPLAYED, "committed": Action.RESTART, "newer": Action.NO_RESTART}


@pytest.fixture(scope="module", params=sorted(ACTIONS))
def region(request: pytest.FixtureRequest) -> Iterator[tuple[str, Region]]:
    made = Region(request.param)
    yield request.param, made
    made.memory.close()


DEVICES = 4096 + 256 * 512  # csrc/layout.h: the head's page, then the table
#  Most damage where most meaning is: the head with its records, the entries of three blocks, the bitmaps.
offsets = st.one_of(
    st.integers(0, 640),
    st.integers(4096, 4096 + 3 * 512),
    st.integers(DEVICES, DEVICES + 6000),
    st.integers(DEVICES + 2 * 12288, DEVICES + 2 * 12288 + 18 * 4096).map(lambda n: n // 4096 * 4096 + n % 24),
    st.integers(0, DEVICES + 2 * 12288 + 18 * 4096 - 1),
)
values = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 128, 255]))


@some
@given(
    damage=st.lists(st.tuples(offsets, values), min_size=1, max_size=6),
    cut=st.sampled_from([None, None, None, 0, 4096, 100_000]),
)
def test_no_damage_to_a_region_crashes_or_lets_a_refusal_touch_guest_ram(
    region: tuple[str, Region], damage: list[tuple[int, int]], cut: int | None
) -> None:
    kind, one = region
    one.restore()
    for offset, value in damage:
        os.pwrite(one.memory.control_fd, bytes([value]), min(offset, one.size - 1))
    if cut is not None:
        os.ftruncate(one.memory.control_fd, cut)
    with contextlib.suppress(ColocacheError):
        c.inspect(one.memory)
    try:
        cache = Cache.attach(one.memory, threads=1)
    except ColocacheError:
        assert images(one.memory, "guest") == one.guest
    else:
        with cache:
            found = cache.recovery
            cache.validate()  # what validate finds, attach should have refused
        assert found is not None
        # What it copied, it copied from the cache; damage that no checksum covers can at most leave pages as they were.
        for before, cached, after in zip(one.guest, one.cache, images(one.memory, "guest"), strict=True):
            for at in range(0, len(after), PAGE):
                assert after[at : at + PAGE] in (before[at : at + PAGE], cached[at : at + PAGE])
        if found.action in (Action.NOTHING, Action.NO_RESTART):
            assert images(one.memory, "guest") == one.guest
    assert images(one.memory, "cache") == one.cache  # nobody writes the cache here
    one.restore()
    with Cache.attach(one.memory, threads=1) as cache:
        assert cache.recovery is not None
        assert cache.recovery.action == ACTIONS[kind]
        assert cache.device_state() == bytes([2]) * 5000
        cache.validate(compare_pages=True)
