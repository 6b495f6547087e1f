# SPDX-License-Identifier: Apache-2.0
"""Folders of a process, most in the temporary directory, for what must have a name. `clean` removes those of the dead.

The process holds a lock on its folder, which the kernel drops at its death: as long as it lives, nobody removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

FOLDER = re.compile(r"colocache\.(demo-\d+-[0-9a-f]{6}|console|disk|images|trace)-[A-Za-z0-9_]+")


@contextlib.contextmanager
def folder(kind: str, where: Path | None = None) -> Iterator[Path]:
    """One of this user's alone, in `where` or the temporary directory, with what is put into it until exit. `kind` is
    one that FOLDER knows."""
    fd, path = _make(kind, where)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _make(kind: str, where: Path | None) -> tuple[int, Path]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"colocache.{kind}-", dir=where))  # 0700
        if not FOLDER.fullmatch(path.name):
            raise AssertionError(f"clean would not know {path}")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # somebody cleaned before it was ours
        fcntl.flock(fd, fcntl.LOCK_SH)
        if path.exists():
            return fd, path
        os.close(fd)


def remove_abandoned(where: Path | None = None) -> list[Path]:
    """Remove the folders of this user's processes that were killed from `where` or the temporary directory: those
    removed."""
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted((where or Path(tempfile.gettempdir())).iterdir()):
            if FOLDER.fullmatch(path.name):
                with contextlib.suppress(OSError):  # somebody's who lives, or another user's, or not such a folder
                    _remove(path)
                    removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """OSError if it is in use, is not this user's, or holds what none of ours does: folders, links."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(f"{path} is not this user's")
        names = os.listdir(fd)  # noqa: PTH208
        for name in names:
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
                raise PermissionError(f"{path} is not a folder of ours")
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
        path.rmdir()
    finally:
        os.close(fd)
