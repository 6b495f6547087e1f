# SPDX-License-Identifier: Apache-2.0
"""Where the demo's two sides meet: a socket in a folder of its own, which `clean` removes when the demo was killed.

The demo holds a lock on the folder, which the kernel drops at its death: as long as it lives, nobody removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from colocache.replication.address import UNIX_PATH_BYTES_MAX

FOLDER = re.compile(r"colocache\.demo-\d+-[0-9a-f]{6}-[A-Za-z0-9_]+")
SOCKET = "pair"


@contextlib.contextmanager
def meeting_place(name: str, transport: str) -> Iterator[str]:
    """The address for the secondary to listen on; `name` is that of the demo's region."""
    if transport == "tcp":
        yield "127.0.0.1:0"
        return
    with tempfile.TemporaryDirectory(prefix=f"colocache.{name}-", ignore_cleanup_errors=True) as folder:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            path = Path(folder) / SOCKET
            yield f"unix:{path}" if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX else "127.0.0.1:0"
        finally:
            os.close(fd)


def remove_abandoned() -> list[Path]:
    """Remove the folders of this user's demos that were killed; those removed."""
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(tempfile.gettempdir()).iterdir()):
            if FOLDER.fullmatch(path.name):
                with contextlib.suppress(OSError):  # somebody's who lives, or another user's, or not such a folder
                    _remove(path)
                    removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """OSError if it is in use, holds anything but the socket, or is not this user's."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_uid != os.geteuid() or set(os.listdir(fd)) - {SOCKET}:  # noqa: PTH208
            raise PermissionError(f"{path} is not a folder of ours")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=fd)
        path.rmdir()
    finally:
        os.close(fd)
