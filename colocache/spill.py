# SPDX-License-Identifier: Apache-2.0
"""The spill file of a bounded secondary: in a folder on a disk that its operator named, for pages beyond its limit.

The file is DIR/colocache.NAME.spill; beside the region's other names there is a link of the same name to it, so that
`recover`, `inspect` and `clean` find it without being told the folder. The link is made first and removed last: whoever
dies in between leaves a name. A link that leads anywhere else is somebody's prank and is not followed.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from colocache.errors import ArgumentError, reason_of

PART = "spill"
SUFFIX = f".{PART}"
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
# Of memory, that spilling takes: what waits for the disk (512 KiB in csrc/spill.h), what is on its way there, what the
# file system keeps of it, and what the kernel counts ahead for each core: a limit that is spilled beyond is full.
WINDOW_BYTES = 2 << 20
MOUNTS = Path("/proc/self/mountinfo")


def file_system_of(folder: Path) -> str:
    """The kind of the file system that `folder` is on; "" if nobody tells."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == number:
            return rest.split()[0]
    return ""


def check_folder(folder: Path | str) -> Path:
    """The folder, absolute. ArgumentError: it is none that files could be made in, or it is in memory itself."""
    path = Path(folder).absolute()
    try:
        kind = file_system_of(path)
    except OSError as error:
        raise ArgumentError(f"the spill folder {path} can't be used: {reason_of(error)}") from error
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise ArgumentError(f"the spill folder {path} is no folder that this user can make files in")
    if kind in IN_MEMORY:
        raise ArgumentError(
            f"the spill folder {path} is on {kind}, which is memory: name one on a disk, or give a larger limit"
        )
    return path


def free_bytes(folder: Path | int) -> int:
    """What this user may still write there; by a folder or a descriptor in it."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def target_of(link: Path) -> Path | None:
    """Where a region's link leads to; None: it is no link of ours."""
    try:
        owner = link.lstat()
        if not stat.S_ISLNK(owner.st_mode):
            return None
        target = Path(link.readlink())
    except OSError:
        return None
    if not target.is_absolute() or target.name != link.name or not re.fullmatch(r"colocache\..+\.spill", target.name):
        return None
    try:
        there = target.lstat()
    except OSError:
        return target  # gone, which whoever needs it must say
    return target if stat.S_ISREG(there.st_mode) and there.st_uid == owner.st_uid else None
