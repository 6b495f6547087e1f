# SPDX-License-Identifier: Apache-2.0
"""Which processes hold the lock of a control region: the kernel tells for each open descriptor."""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def lock_holders(fd: int) -> tuple[int, ...]:
    """Processes that have the description open whose OFD lock is on the file of `fd`; those that may be looked at.

    After a fork there can be several. Empty without /proc, and for processes of other users.
    """
    inode = f":{os.fstat(fd).st_ino} "
    found = []
    for process in PROC.glob("[0-9]*"):
        try:
            infos = list((process / "fdinfo").iterdir())
        except OSError:  # ended meanwhile, or somebody else's
            continue
        if any(_has_lock(info, inode) for info in infos):
            found.append(int(process.name))
    return tuple(sorted(found))


def _has_lock(fdinfo: Path, inode: str) -> bool:
    try:
        text = fdinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any("OFDLCK" in line and inode in line for line in text.splitlines() if line.startswith("lock:"))
