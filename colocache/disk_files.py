# SPDX-License-Identifier: Apache-2.0
"""What a region keeps on disks: the paths of its images and logs, in a file beside its memory, so that `inspect` can
name them and `clean` removes the logs of a keeper that was killed.

The keeper holds a lock on the file, which the kernel drops at its death.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from colocache import backing as bk
from colocache.errors import BusyError, ColocacheError, SystemCallError, reason_of
from colocache.names import NAME, file_name

FILE_BYTES_MAX = 1 << 20
LOG = re.compile(rf"(?P<name>{NAME.pattern})\.disk-log\.[01]")


@dataclass(frozen=True)
class DiskFiles:
    """The paths; `identity` is that of this region, whatever others were called by its name."""

    images: tuple[str, ...]
    logs: tuple[str, ...]
    identity: str


def _path(name: str) -> Path:
    return bk.SHM_DIR / file_name(name, "disks")


def _opened(name: str) -> BinaryIO:
    """OSError: there is none, or something that another user put there, which may be no file at all."""
    fd = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or os.geteuid() not in (0, about.st_uid):
        os.close(fd)
        raise PermissionError(errno.EPERM, "not a file of this user", str(_path(name)))
    return os.fdopen(fd, "r+b", buffering=0)


def disk_files(name: str) -> DiskFiles | None:
    """Those of region `name`; None: it has none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError), _opened(name) as file:
        fields = json.loads(file.read(FILE_BYTES_MAX))
        images, logs, identity = fields["images"], fields["logs"], fields["identity"]
        if all(isinstance(one, str) for one in [*images, *logs, identity]):
            return DiskFiles(tuple(images), tuple(logs), identity)
    return None


class KeptDiskFiles:
    """Written for the keeper of region `name`, and held. Leaving it removes the file and the logs. Context manager; it
    does nothing without images."""

    def __init__(self, name: str, images: Sequence[str], logs: Sequence[str]) -> None:
        self._name = name
        self._fd = -1
        if not images:
            return
        before = disk_files(name)
        files = DiskFiles(tuple(images), tuple(logs), before.identity if before else secrets.token_hex(8))
        try:
            self._write(json.dumps(files.__dict__).encode(), again=before is not None)
        except BaseException as error:
            if self._fd >= 0:
                os.close(self._fd)
            if isinstance(error, OSError):
                raise SystemCallError(
                    f"{_path(name)} can't be written: {reason_of(error)}", errno=error.errno or 0
                ) from error
            raise

    def _write(self, data: bytes, *, again: bool) -> None:
        """`again`: in the place of a keeper's that is gone, whose region this one has by now. In one write, which no
        death divides: without it nobody would know any more that the images are this region's."""
        path = _path(self._name)
        if again:
            self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            os.pwrite(self._fd, data.ljust(os.fstat(self._fd).st_size), 0)
            return
        # Without a name until it is whole and locked: nobody finds a part of it, and nothing is left by a death.
        self._fd = os.open(bk.SHM_DIR, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.write(self._fd, data)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        path.unlink(missing_ok=True)  # what nobody can read
        folder = os.open(bk.SHM_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{self._fd}", path.name, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def __enter__(self) -> KeptDiskFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            remove_logs(self._name)
            with contextlib.suppress(OSError):
                _path(self._name).unlink()
            os.close(self._fd)
            self._fd = -1


def check_free(name: str) -> None:
    """BusyError: a keeper lives that has disks for this region."""
    with contextlib.suppress(FileNotFoundError, PermissionError), _opened(name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"the disks of region {name} are in use by another process", hint="stop it first"
            ) from error


def remove_logs(name: str) -> list[Path]:
    """The logs that the region's file names; those removed."""
    files = disk_files(name)
    return [] if files is None else [path for path in map(Path, files.logs) if _remove_log(path, name)]


def remove_lost_logs(folder: str, regions: Sequence[str]) -> list[Path]:
    """Logs in `folder` of regions that are not among `regions`, those of this host, and that nobody uses: a host that
    was started anew has forgotten its regions, and not its disks."""
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(folder).iterdir()):
            found = LOG.fullmatch(path.name)
            if found and found["name"] not in regions and _remove_log(path, found["name"]):
                removed.append(path)
    return removed


def _remove_log(path: Path, name: str) -> bool:
    """It is removed if it is a log of this region, this user's, and in nobody's use."""
    found = LOG.fullmatch(path.name)
    try:
        if not found or found["name"] != name:
            return False
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                return False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(fd)
    except (OSError, ColocacheError):
        return False
    return True
