# SPDX-License-Identifier: Apache-2.0
"""One epoch log: disk writes one after the other in a file, with a checksum that runs along.

record: head (24 bytes, little-endian: checksum of the other 20 u32, disk u16, kind u16, length u32, checksum of the
data u32, offset u64), then the data if it is a write

What stands behind the records (`n_bytes`) is nothing: a write that was torn by a full disk or a death.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from colocache.disks.write import DATA_BYTES_MAX, Kind, Write
from colocache.errors import CorruptError, SystemCallError, reason_of

CHECKED = struct.Struct("<HHIIQ")
HEAD_BYTES = 4 + CHECKED.size
KEPT_BYTES = 4 << 20  # of room that a log keeps, however little it needs


@dataclass(frozen=True)
class Extent:
    """How long a log is, and what its running checksum says."""

    n_bytes: int = 0
    checksum: int = 0


class EpochLog:
    """The log in the open file `fd`, which it owns. One thread."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name
        self.extent = Extent()
        self.n_writes = 0
        self._wanted = 0  # bytes that it had lately

    def append(self, write: Write) -> None:
        """One more. After SystemCallError the log is as before."""
        data = write.data
        checked = CHECKED.pack(write.disk, write.kind, write.length, zlib.crc32(data), write.offset)
        head = struct.pack("<I", zlib.crc32(checked)) + checked
        parts, at = [memoryview(head), memoryview(data)], self.extent.n_bytes
        while parts:
            try:
                n = os.pwritev(self._fd, parts, at)
            except OSError as error:
                raise SystemCallError(
                    f"a disk write of {write.length} bytes can't be kept in {self.name}: {reason_of(error)}",
                    errno=error.errno or 0,
                    hint="give its file system room, or --disk-log another folder",
                ) from error
            at += n
            while parts and n >= len(parts[0]):
                n -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][n:]
        self.extent = Extent(at, zlib.crc32(head, self.extent.checksum))
        self.n_writes += 1

    def empty(self) -> None:
        """Nothing is in it. Its room stays, which the next records use: to give it back while a machine stands would
        cost milliseconds, and to take new one twice the time of each write."""
        self._wanted = max(self.extent.n_bytes, self._wanted // 2)
        self.extent, self.n_writes = Extent(), 0

    def give_back(self) -> None:
        """Room far beyond what the log needed lately, or all of it if it needed none, goes back to the file system."""
        room = max(self._wanted, self.extent.n_bytes)
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_size > max(KEPT_BYTES if room else 0, 2 * room):
                os.ftruncate(self._fd, room)

    def read(self, extent: Extent, sizes: tuple[int, ...]) -> Iterator[Write]:
        """The writes of `extent`, in order, each inside a disk of `sizes`. CorruptError: it holds something else."""
        at, running = 0, 0
        while at < extent.n_bytes:
            head = self._bytes(at, HEAD_BYTES, extent)
            (checksum,) = struct.unpack_from("<I", head)
            disk, kind, length, data_checksum, offset = CHECKED.unpack_from(head, 4)
            n_data = length if kind == Kind.WRITE else 0
            if (
                zlib.crc32(head[4:]) != checksum
                or kind not in tuple(Kind)
                or disk >= len(sizes)
                or n_data > DATA_BYTES_MAX
                or offset + length > sizes[disk]
            ):
                raise CorruptError(f"{self.name} is damaged at byte {at}: this is no record of a write")
            data = self._bytes(at + HEAD_BYTES, n_data, extent)
            if zlib.crc32(data) != data_checksum:
                raise CorruptError(f"{self.name} is damaged: the data of the record at byte {at} has another checksum")
            running = zlib.crc32(head, running)
            at += HEAD_BYTES + n_data
            yield Write(disk, Kind(kind), offset, length, data)
        if running != extent.checksum:
            raise CorruptError(
                f"{self.name} has checksum {running:08x} over {extent.n_bytes} bytes, its epoch {extent.checksum:08x}"
            )

    def verify(self, extent: Extent, sizes: tuple[int, ...]) -> int:
        """Read it and do nothing: how many writes. CorruptError."""
        return sum(1 for _ in self.read(extent, sizes))

    def take(self, extent: Extent) -> None:
        """It holds this, as a process that is gone has left it."""
        self.extent = extent

    def _bytes(self, at: int, n_bytes: int, extent: Extent) -> bytes:
        if at + n_bytes > extent.n_bytes:
            raise CorruptError(f"{self.name} is damaged: a record at byte {at} goes beyond its {extent.n_bytes} bytes")
        found = b""
        while len(found) < n_bytes:
            try:
                more = os.pread(self._fd, n_bytes - len(found), at + len(found))
            except OSError as error:
                raise CorruptError(f"{self.name} can't be read at byte {at}: {error}") from error
            if not more:
                raise CorruptError(f"{self.name} is short: it ends at byte {at + len(found)} of {extent.n_bytes}")
            found = found + more if found else more
        return found

    def close(self) -> None:
        """Forget the file."""
        os.close(self._fd)
