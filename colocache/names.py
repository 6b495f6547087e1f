# SPDX-License-Identifier: Apache-2.0
"""The names of shared memory: how they are made up, and opening, holding and removing what has one. No other file makes
a name, and this is the only importer of posix_ipc.

A region NAME is the POSIX shared-memory object `/colocache.NAME.control`, and per block I the images
`colocache.NAME.guest.I` and `colocache.NAME.cache.I`: POSIX shared memory, or files on a hugetlbfs mount.
`colocache.NAME.spill` is a link to its spill file, if it has one (spill.py).

Whoever has a region's memory holds a shared flock on its control object, apart from the owner's lock that the C library
takes: while either is held, `clean` leaves the region alone. The kernel drops both at death.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import posix_ipc

from colocache import backing as bk
from colocache import spill
from colocache.errors import ArgumentError, BusyError, ExistsError, NotColocacheError, SystemCallError, reason_of

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
FILE = re.compile(
    r"colocache\.(?P<name>[A-Za-z0-9._-]{1,64})\.(?P<part>control|disks|spill|guest\.\d{1,3}|cache\.\d{1,3})"
)


def check_name(name: str) -> str:
    """The name itself; ArgumentError if a region can't be called so."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ArgumentError(f"{name!r} is not a valid name of a region: give 1 to 64 of A-Z a-z 0-9 . _ -")
    return name


def file_name(name: str, part: str) -> str:
    return f"colocache.{name}.{part}"


def open_shm(file: str, *, create: bool = False) -> int:
    """Descriptor of a POSIX shared-memory object, new and empty if `create`."""
    try:
        flags = posix_ipc.O_CREX if create else 0
        fd = int(posix_ipc.SharedMemory(f"/{file}", flags, mode=0o600, size=0).fd)
        if create:
            os.fchmod(fd, 0o600)  # whatever the umask says: another process of this user opens it by name
        return fd
    except ValueError as error:  # what posix_ipc makes of a folder
        raise SystemCallError(f"/{file} is no POSIX shared memory", errno=errno.EINVAL) from error
    except posix_ipc.ExistentialError as error:
        if create:
            raise ExistsError(f"POSIX shared memory /{file} exists already") from error
        raise NotColocacheError(f"there is no POSIX shared memory /{file}") from error
    except posix_ipc.PermissionsError as error:
        raise SystemCallError(f"no permission for POSIX shared memory /{file}", errno=errno.EACCES) from error
    except OSError as error:
        code = error.errno or errno.EIO
        raise SystemCallError(f"POSIX shared memory /{file}: {reason_of(error)}", errno=code) from error


def open_file(folder: Path, file: str, *, create: bool = False) -> int:
    """Descriptor of an image by name, in POSIX shared memory or on a hugetlbfs mount."""
    if folder == bk.SHM_DIR:
        return open_shm(file, create=create)
    try:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | ((os.O_CREAT | os.O_EXCL) if create else 0)
        fd = os.open(folder / file, flags, 0o600)
        if create:
            os.fchmod(fd, 0o600)
        return fd
    except FileExistsError as error:
        raise ExistsError(f"{folder / file} exists already") from error
    except OSError as error:
        code = error.errno or errno.EIO
        raise SystemCallError(f"{folder / file}: {reason_of(error)}", errno=code) from error


def remove_file(folder: Path, file: str) -> None:
    """Remove a name; one that is gone already is fine. With a link to a spill file that file goes first, if its disk
    lets it: one that has become read-only must not keep a region in memory."""
    try:
        target = spill.target_of(folder / file) if file.endswith(spill.SUFFIX) else None
        if target is not None:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
        if folder == bk.SHM_DIR:
            posix_ipc.unlink_shared_memory(f"/{file}")
        else:
            (folder / file).unlink(missing_ok=True)
    except posix_ipc.ExistentialError:
        pass
    except (posix_ipc.PermissionsError, OSError) as error:
        raise SystemCallError(f"{folder / file} can't be removed: {error}", errno=errno.EACCES) from error


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Ctrl-C between making a name and noting it would leave the name behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def identity(fd: int) -> tuple[int, int]:
    stat = os.fstat(fd)
    return stat.st_dev, stat.st_ino


def is_still(folder: Path, file: str, which: tuple[int, int]) -> bool:
    """False if somebody removed the name and another region has it now."""
    try:
        stat = (folder / file).lstat()
    except OSError:
        return False
    return (stat.st_dev, stat.st_ino) == which


def hold(control_fd: int, name: str) -> None:
    """Take the shared lock that tells `clean` to leave the region alone; BusyError while it is being removed."""
    try:
        fcntl.flock(control_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(f"region {name} is being removed by another process", hint="try again") from error
    if os.fstat(control_fd).st_nlink == 0:
        raise NotColocacheError(f"region {name} was removed just now")
