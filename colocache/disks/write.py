# SPDX-License-Identifier: Apache-2.0
"""One write to a disk: what it is, and how it travels in a DISK message.

head (16 bytes: disk u16, kind u16, length u32, offset u64, little-endian), then the data if it is a write
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from colocache.errors import PacketError

DISKS_MAX = 16
DATA_BYTES_MAX = 1 << 20  # of one write; whoever writes more at once is told to do it in parts
QUEUE = 16  # requests that a client of an export has under way at most
COST_BYTES = 64  # of room that a write takes in a log besides its data, at most
RESERVE_BYTES = QUEUE * (DATA_BYTES_MAX + COST_BYTES)  # of a log, for each disk: for a machine that stops
SECTOR = 512  # disks have a multiple of it
HEAD = struct.Struct("<HHIQ")
BODY_BYTES_MAX = HEAD.size + DATA_BYTES_MAX
TOTAL = struct.Struct("<QQ")


class Kind(IntEnum):
    """What is done to the range."""

    WRITE = 1  # it becomes the data
    ZERO = 2  # it becomes zeros
    TRIM = 3  # nobody needs what it holds


@dataclass(frozen=True)
class Write:
    """`length` bytes from `offset` of disk number `disk`; `data` only of a WRITE."""

    disk: int
    kind: Kind
    offset: int
    length: int
    data: bytes | bytearray | memoryview = b""

    def head(self) -> bytes:
        """The beginning of a body, which its data follows."""
        return HEAD.pack(self.disk, self.kind, self.length, self.offset)

    def pack(self) -> bytes:
        """As a body."""
        return self.head() + bytes(self.data)


def unpack(body: bytes | memoryview, sizes: tuple[int, ...]) -> Write:
    """The write again, inside a disk of `sizes`. PacketError: this is no such body."""
    view = memoryview(body)
    if len(view) < HEAD.size:
        raise PacketError(f"a disk write of {len(view)} bytes is shorter than its head of {HEAD.size}")
    disk, kind, length, offset = HEAD.unpack_from(view)
    if disk >= len(sizes):
        raise PacketError(f"a write to disk {disk}, and there are {len(sizes)}")
    if kind not in tuple(Kind):
        raise PacketError(f"a disk write of kind {kind}, which does not exist")
    if not length or offset + length > sizes[disk]:
        raise PacketError(f"a write of {length} bytes at {offset} of disk {disk}, which has {sizes[disk]}")
    data = view[HEAD.size :]
    if len(data) != (length if kind == Kind.WRITE else 0):
        raise PacketError(f"a disk write of {length} bytes came with {len(data)}")
    return Write(disk, Kind(kind), offset, length, data)


@dataclass(frozen=True)
class Total:
    """How many writes, and bytes of data in them, a connection has carried so far."""

    n_writes: int = 0
    n_bytes: int = 0

    def plus(self, write: Write) -> Total:
        """With one write more."""
        return Total(self.n_writes + 1, self.n_bytes + len(write.data))

    def pack(self) -> bytes:
        """As a body."""
        return TOTAL.pack(self.n_writes, self.n_bytes)

    @classmethod
    def unpack(cls, body: bytes) -> Total:
        """Again. PacketError."""
        if len(body) != TOTAL.size:
            raise PacketError(f"the count of disk writes has {TOTAL.size} bytes, not {len(body)}")
        return cls(*TOTAL.unpack(body))

    def minus(self, other: Total) -> Total:
        """Without those that came before."""
        return Total(self.n_writes - other.n_writes, self.n_bytes - other.n_bytes)

    def __str__(self) -> str:
        return f"{self.n_writes} writes of {self.n_bytes} bytes"
