# SPDX-License-Identifier: Apache-2.0
"""The secondary's copy of a disk: a raw image, one byte of it for each of the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import threading

from colocache.disks.write import SECTOR, Kind, Write
from colocache.errors import ArgumentError, BusyError, SystemCallError, reason_of

KEEP_SIZE, PUNCH_HOLE = 1, 2
ZERO_BYTES = 1 << 20
NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Zeros that take no room; False where the file system has no such thing. OSError."""
    offset64, length64 = ctypes.c_int64(offset), ctypes.c_int64(length)
    if _fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset64, length64) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_HOLES:
        return False
    raise OSError(number, os.strerror(number))


class Image:
    """The raw image at `path`, held for this process alone until close(). ArgumentError, BusyError."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ArgumentError(
                f"the image {path} can't be opened: {error.strerror}",
                hint=f"`truncate -s SIZE {path}` makes one, of the size of the primary's disk",
            ) from error
        try:
            self.size = self._check()
        except BaseException as error:
            os.close(self.fd)
            if isinstance(error, OSError):
                raise ArgumentError(f"the image {path} can't be used: {reason_of(error)}") from error
            raise

    def _check(self) -> int:
        """How large it is; from now on it is this process's alone."""
        about = os.fstat(self.fd)
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISBLK(about.st_mode)):
            raise ArgumentError(f"the image {self.path} is neither a file nor a block device")
        if not size or size % SECTOR:
            raise ArgumentError(f"the image {self.path} has {size} bytes: a disk has a multiple of {SECTOR}")
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"the image {self.path} is in use by another process",
                hint="two secondaries can't share one: give this one an image of its own",
            ) from error
        return size

    def apply(self, write: Write) -> None:
        """Do one write. SystemCallError."""
        try:
            if write.kind is Kind.WRITE:
                self._write(write.offset, memoryview(write.data))
            elif not punch_hole(self.fd, write.offset, write.length) and write.kind is Kind.ZERO:
                self._zero(write.offset, write.length)
        except OSError as error:
            raise SystemCallError(
                f"{write.length} bytes at {write.offset} of the image {self.path} can't be written: {reason_of(error)}",
                errno=error.errno or 0,
            ) from error

    def _write(self, offset: int, data: memoryview) -> None:
        while data:
            n = os.pwrite(self.fd, data, offset)
            data, offset = data[n:], offset + n

    def _zero(self, offset: int, length: int) -> None:
        zeros = memoryview(bytes(min(length, ZERO_BYTES)))
        for at in range(0, length, ZERO_BYTES):
            self._write(offset + at, zeros[: length - at])

    def sync(self) -> None:
        """To the medium: all that was written before."""
        with contextlib.suppress(OSError):
            os.fsync(self.fd)

    def sync_beside(self) -> None:
        """The same beside whoever writes on, and once it is begun also after `close`. On an open file of its own: with
        ours it would hold the lock on, or after a close sync whatever has its number by then."""
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
            threading.Thread(target=_sync_and_close, args=(fd,), name="colocache-sync", daemon=True).start()

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


def _sync_and_close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)
