# SPDX-License-Identifier: Apache-2.0
"""Regions on this machine, and removing what a killed run left and nobody owns."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from colocache import backing as bk
from colocache import spill
from colocache.disk_files import check_free, remove_logs
from colocache.errors import BusyError, ColocacheError, NotColocacheError
from colocache.inspection import inspect
from colocache.names import FILE, check_name, file_name, open_shm, remove_file

# struct flock: type, whence, padding, start, len, pid, padding; start 0 and len 0 are the whole file, however it grows
WHOLE_FILE = struct.pack("hhxxxxqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


@dataclass(frozen=True)
class RegionName:
    """A region by its files: `files` in the order in which they may be removed (the control object last)."""

    name: str
    files: tuple[Path, ...]
    n_bytes: int  # of memory that its files hold


@dataclass(frozen=True)
class CleanReport:
    """What clean did. `busy`: region and the reason why it was left."""

    removed: tuple[RegionName, ...]
    busy: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"removed {one.name}: {len(one.files)} files, {one.n_bytes} bytes" for one in self.removed]
        lines += [f"left {name}: {reason}" for name, reason in self.busy]
        return "\n".join(lines) or "nothing to remove"


def list_regions() -> list[RegionName]:
    """Every region that has a file here, owned or not, by name."""
    found: dict[str, list[tuple[bool, Path, int]]] = {}
    for folder in [bk.SHM_DIR, *bk.hugetlbfs_mounts()]:
        try:
            entries = list(folder.iterdir())
        except OSError:
            continue
        for path in entries:
            match = FILE.fullmatch(path.name)
            if not match:
                continue
            try:
                held = path.lstat().st_blocks * 512
            except OSError:
                continue  # removed while we looked
            found.setdefault(match["name"], []).append((match["part"] == "control", path, held))
    return [
        RegionName(name, tuple(path for _, path, _ in sorted(files)), sum(held for _, _, held in files))
        for name, files in sorted(found.items())
    ]


def spill_file(name: str) -> Path | None:
    """Where the spill file of region `name` is, or was; None: it has none."""
    return spill.target_of(bk.SHM_DIR / file_name(check_name(name), spill.PART))


def clean(name: str | None = None) -> CleanReport:
    """Remove the files of region `name`, or of every region, that no process owns or holds.

    What somebody owns is left and reported. NotColocacheError if there is no region `name`.
    """
    regions = list_regions()
    if name is not None:
        check_name(name)
        regions = [one for one in regions if one.name == name]
        if not regions:
            raise NotColocacheError(f"there is no region {name} on this machine")
    removed, busy = [], []
    for region in regions:
        try:
            removed.append(remove_region(region.name))
        except ColocacheError as error:
            busy.append((region.name, str(error)))
    return CleanReport(tuple(removed), tuple(busy))


def remove_region(name: str) -> RegionName:
    """Remove one region's files, holding its locks meanwhile. BusyError with the pid of who owns it."""
    with _locked(name):
        check_free(name)
        region = next((one for one in list_regions() if one.name == name), RegionName(name, (), 0))
        logs = remove_logs(name)
        for path in region.files:
            remove_file(path.parent, path.name)
    return replace(region, files=(*logs, *region.files))


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """The locks of owner and holders, on an open file description of our own; none where there is no control object.

    Images are made after the control object and removed before it, so images without one belong to nobody. The same
    holds for what is no regular file: somebody planted it there.
    """
    with contextlib.suppress(OSError):
        if not stat.S_ISREG((bk.SHM_DIR / file_name(name, "control")).lstat().st_mode):
            yield
            return
    try:
        fd = open_shm(file_name(name, "control"))
    except NotColocacheError:
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, WHOLE_FILE)
        except (BlockingIOError, PermissionError) as error:
            fcntl.flock(fd, fcntl.LOCK_UN)  # so that we don't name ourselves
            who = owner_of(fd)
            raise BusyError(f"region {name} is in use by {who}", hint="stop it first") from error
        yield
    finally:
        os.close(fd)


def owner_of(control_fd: int) -> str:
    """Who owns or holds the region, for a sentence: `process 4711`, as far as it can be told."""
    inode = os.fstat(control_fd).st_ino
    # The owner's lock belongs to an open file, which has no pid; who holds the memory took a lock that has one.
    pids = set()
    with contextlib.suppress(OSError):  # no /proc: whoever it is stays unknown
        for line in Path("/proc/locks").read_text().splitlines():
            match = re.search(r"\bFLOCK\b.*?\s(\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ", line)
            if match and int(match[2]) == inode:
                pids.add(int(match[1]))
    with contextlib.suppress(ColocacheError):  # not filled in yet, or damaged: it is owned all the same
        pids.add(inspect(control_fd).status.owner_pid)
    alive = sorted(pid for pid in pids if pid > 0 and Path(f"/proc/{pid}").exists())
    return " and ".join(f"process {pid}" for pid in alive) or "another process"
