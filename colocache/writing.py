# SPDX-License-Identifier: Apache-2.0
"""Writing the files that a user asked for: a lesson, a plot, a recording, rows of a measurement."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path

from colocache.errors import SystemCallError, reason_of


def write_file(path: Path, content: bytes) -> None:
    """A regular file, also one behind a symbolic link, is replaced whole or not at all; a FIFO, a terminal or another
    character device is written to; anything else is refused. SystemCallError.
    """
    try:
        _write(path, content)
    except OSError as error:
        code = error.errno or errno.EIO
        raise SystemCallError(f"{path} can't be written: {reason_of(error)}", errno=code) from error


def _write(path: Path, content: bytes) -> None:
    try:
        there = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise OSError(errno.ENOENT, f"it is a symbolic link to {path.readlink()}, which does not exist") from None
        _replace(path, content, 0o666 & ~_umask())
        return
    if stat.S_ISFIFO(there.st_mode) or stat.S_ISCHR(there.st_mode):
        _write_to(path, content, 0)
    elif not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file, FIFO or character device")
    elif path.resolve().is_relative_to("/proc"):  # a descriptor of ours, as /dev/stdout: others have it too
        _write_to(path, content, os.O_TRUNC)
    else:
        # Asked of the kernel first, which knows who may write it, and which links of others may be followed.
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        target = path.resolve()
        if not path.is_symlink() or target.stat().st_ino == there.st_ino:
            _replace(target, content, stat.S_IMODE(there.st_mode), there)


def _write_to(path: Path, content: bytes, flags: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | flags)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def _replace(path: Path, content: bytes, mode: int, before: os.stat_result | None = None) -> None:
    fd, name = tempfile.mkstemp(prefix=".colocache-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            if before is not None:
                with contextlib.suppress(OSError):  # only root may give a file away
                    os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, mode)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
