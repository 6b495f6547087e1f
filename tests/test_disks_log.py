# SPDX-License-Identifier: Apache-2.0
"""The files on the secondary's host: what a log gives back, what a damaged one does not, and what an image takes."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocache import Attachment
from colocache.disks import image as image_module
from colocache.disks.apart import ApartDisks, NoDisks, open_disks
from colocache.disks.blocks import BLOCK, RUN_BYTES_MAX, Blocks
from colocache.disks.epoch_log import HEAD_BYTES, EpochLog
from colocache.disks.image import Image
from colocache.disks.write import RESERVE_BYTES, Kind, Total, Write, unpack
from colocache.errors import ArgumentError, BusyError, CorruptError, PacketError, SystemCallError, TooLargeError

SIZES = (1 << 20, 1 << 16)
some = settings(max_examples=int(os.environ.get("COLOCACHE_TEST_EXAMPLES", "150")), deadline=None)


def log_at(path: Path) -> EpochLog:
    return EpochLog(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), str(path))


def some_writes(n: int) -> list[Write]:
    numbers = random.Random(n)
    found = []
    for _ in range(n):
        kind = numbers.choice(list(Kind))
        length = numbers.choice([512, 4096, 60_000])
        data = numbers.randbytes(length) if kind is Kind.WRITE else b""
        disk = numbers.randrange(2)
        found.append(Write(disk, kind, numbers.randrange(0, SIZES[disk] - length + 1), length, data))
    return found


def test_a_log_gives_back_what_was_put_in(tmp_path: Path) -> None:
    log = log_at(tmp_path / "log")
    writes = some_writes(50)
    for write in writes:
        log.append(write)
    assert list(log.read(log.extent, SIZES)) == writes
    assert log.n_writes == 50
    log.empty()
    assert list(log.read(log.extent, SIZES)) == []
    log.close()


def test_a_log_gives_back_the_room_that_it_does_not_need(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = log_at(path)
    write = Write(0, Kind.WRITE, 0, 1 << 20, bytes(1 << 20))
    for _ in range(20):
        log.append(write)
    log.empty()
    log.give_back()
    assert path.stat().st_size > 20 << 20, "the next epoch may need it"
    for _ in range(5):
        log.append(write)
        log.empty()
        log.append(write)
        log.give_back()
        assert log.verify(log.extent, (1 << 20,)) == 1
    assert path.stat().st_size < 6 << 20
    log.close()


def test_any_byte_that_changes_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = log_at(path)
    for write in some_writes(6):
        log.append(write)
    whole = path.read_bytes()
    at = random.Random(1)
    for _ in range(300):
        where = at.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[where] ^= 1 << at.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptError):
            log.verify(log.extent, SIZES)
    for length in (0, 1, HEAD_BYTES, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError, match="short"):
            log.verify(log.extent, SIZES)
    path.write_bytes(whole + b"torn")
    assert log.verify(log.extent, SIZES) == 6, "what stands behind the records is nothing"
    log.close()


def test_writes_in_another_order_are_another_log(tmp_path: Path) -> None:
    one, other = log_at(tmp_path / "one"), log_at(tmp_path / "other")
    writes = [Write(0, Kind.WRITE, 0, 512, b"a" * 512), Write(0, Kind.WRITE, 0, 512, b"b" * 512)]
    for write in writes:
        one.append(write)
    for write in reversed(writes):
        other.append(write)
    with pytest.raises(CorruptError, match="checksum"):
        other.verify(one.extent, SIZES)
    one.close()
    other.close()


def test_a_write_that_finds_no_room_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    log = log_at(tmp_path / "log")
    first, second = some_writes(2)
    log.append(first)
    before = log.extent
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before.n_bytes + 10, hard))
    try:
        with pytest.raises(SystemCallError, match="--disk-log"):
            log.append(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.extent == before
    log.append(second)
    assert list(log.read(log.extent, SIZES)) == [first, second]
    log.close()


@some
@given(st.binary(max_size=80))
def test_no_body_of_a_message_is_more_than_refused(body: bytes) -> None:
    try:
        write = unpack(body, SIZES)
    except PacketError:
        return
    assert write.offset + write.length <= SIZES[write.disk]
    assert write.pack() == body


@some
@given(
    st.integers(0, 2),
    st.integers(0, 4),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 9),
)
def test_a_write_outside_its_disk_is_refused(disk: int, kind: int, offset: int, length: int, n_data: int) -> None:
    body = disk.to_bytes(2, "little") + kind.to_bytes(2, "little") + length.to_bytes(4, "little")
    body += offset.to_bytes(8, "little") + bytes(n_data)
    fits = disk < 2 and 1 <= kind <= 3 and length > 0 and offset + length <= SIZES[min(disk, 1)]
    if fits and n_data == (length if kind == Kind.WRITE else 0):
        assert unpack(body, SIZES).offset == offset
    else:
        with pytest.raises(PacketError):
            unpack(body, SIZES)


@some
@given(st.binary(max_size=24))
def test_no_count_is_more_than_refused(body: bytes) -> None:
    if len(body) == 16:
        assert Total.unpack(body).pack() == body
    else:
        with pytest.raises(PacketError):
            Total.unpack(body)


@pytest.mark.parametrize("holes", [True, False])
def test_an_image_becomes_what_is_written_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: bool) -> None:
    if not holes:  # as on a file system without them
        monkeypatch.setattr(image_module, "punch_hole", lambda *_: False)
    path = tmp_path / "image"
    path.write_bytes(b"\xff" * SIZES[0])
    image = Image(str(path))
    expected = bytearray(b"\xff" * SIZES[0])
    for write in some_writes(40):
        if write.offset + write.length > SIZES[0] or (not holes and write.kind is Kind.TRIM):
            continue
        image.apply(write)
        expected[write.offset : write.offset + write.length] = bytes(write.data) or bytes(write.length)
    assert path.read_bytes() == expected
    image.sync()
    image.close()


def test_an_image_belongs_to_one_process(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    image = Image(str(path))
    with pytest.raises(BusyError, match="an image of its own"):
        Image(str(path))
    image.close()
    Image(str(path)).close()


@pytest.mark.parametrize("size", [0, 511, 513])
def test_what_is_no_disk_is_no_image(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    with pytest.raises(ArgumentError, match="multiple of 512"):
        Image(str(path))
    with pytest.raises(ArgumentError, match="truncate"):
        Image(str(tmp_path / "nothing"))
    with pytest.raises(ArgumentError):
        Image("/dev/null")


def opened(folder: Path, **more: int) -> ApartDisks:
    path = folder / "disk"
    if not path.exists():
        path.write_bytes(bytes(SIZES[0]))
    found = open_disks([str(path)], "", "region", **more)
    assert not isinstance(found, NoDisks)
    return found


def test_a_damaged_log_is_refused_before_a_byte_of_the_image_changes(tmp_path: Path) -> None:
    disks = opened(tmp_path)
    disks.told(Total())
    disks.sealing()
    disks.sealed()
    for n in range(4):
        disks.come(Write(0, Kind.WRITE, n * 4096, 4096, bytes([n + 1]) * 4096).pack())
    disks.told(Total(4, 4 * 4096))
    attachment = disks.sealing()
    path = Path(disks.open.name)
    disks.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    disks = opened(tmp_path)
    with pytest.raises(CorruptError, match="damaged"):
        disks.attach(2, attachment)
    assert not any((tmp_path / "disk").read_bytes())
    with pytest.raises(CorruptError, match="log 7 of two"):
        disks.attach(2, Attachment(7, 0, 0))
    path.write_bytes(whole)
    for _ in range(3):
        disks.attach(2, attachment)
        assert (tmp_path / "disk").read_bytes()[: 4 * 4096] == b"".join(bytes([n + 1]) * 4096 for n in range(4))
    disks.close()


def test_a_log_has_no_more_than_its_limit(tmp_path: Path) -> None:
    limit = 2 * RESERVE_BYTES
    with pytest.raises(ArgumentError, match="--disk-log-limit 33M"):
        opened(tmp_path, limit_bytes=limit - 1)
    disks = opened(tmp_path, limit_bytes=limit)
    write = Write(0, Kind.WRITE, 0, 1 << 20, bytes(1 << 20)).pack()
    for _ in range(40):
        disks.come(write)  # nothing is sealed: to the image
    disks.told(Total(40, 40 << 20))
    disks.sealing()
    disks.sealed()
    for _ in range(32):
        disks.come(write)
    with pytest.raises(TooLargeError, match=f"{limit} bytes"):
        disks.come(write)
    disks.close()


@some
@given(
    st.integers(1, 40 * BLOCK), st.lists(st.tuples(st.integers(0, 40 * BLOCK), st.integers(1, 5 * BLOCK)), max_size=8)
)
def test_blocks_cover_what_was_added_and_little_more(size: int, ranges: list[tuple[int, int]]) -> None:
    blocks = Blocks(size)
    expected = set()
    for offset, length in ranges:
        if offset + length <= size:
            blocks.add(offset, length)
            expected |= set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))
    assert len(blocks) == len(expected)
    found = list(blocks.runs())
    assert all(0 < length <= RUN_BYTES_MAX and offset + length <= size for offset, length in found)
    assert {at // BLOCK for offset, length in found for at in range(offset, offset + length, BLOCK)} == expected
    blocks.clear()
    assert not list(blocks.runs())
