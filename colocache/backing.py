# SPDX-License-Identifier: Apache-2.0
"""What an image can be made of on this machine, how much of it is left, and reserving it whole.

Files come in as descriptors of full size; names are memory.py's. Five ways, best first (`auto` takes the first that
has room):

    hugetlb   2 MiB pages of a hugetlbfs file (outlives its process), or of a memfd where none is mounted
    thp       a memfd on transparent huge pages, where the system allows them for shared memory
    shm       4 KiB pages of POSIX shared memory (outlives its process), or, only for `auto`, of a memfd
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colocache.choices import BACKINGS
from colocache.errors import (
    ArgumentError,
    ColocacheError,
    MemoryShortError,
    SystemCallError,
    UnsupportedError,
    reason_of,
)

HUGE = 2 << 20
CHUNK = 128 << 20  # reserved at a time, so that Ctrl-C is heard in between
MIB = 1 << 20

SHM_DIR = Path("/dev/shm")  # noqa: S108 where glibc's shm_open keeps its objects
HUGE_SYSFS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
THP_SYSFS = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

MADV_POPULATE_WRITE = 23  # Linux 5.14
MFD_HUGE_2MB = 21 << 26


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Kind:
    """One way to make images. `folder`: where its named files are; None for memfds, which have no name."""

    backing: str
    folder: Path | None
    unit: int  # a file's size is a multiple of it
    about: str

    @property
    def persistent(self) -> bool:
        return self.folder is not None

    def size_of(self, len_bytes: int) -> int:
        """Size in bytes of the file for an image of len_bytes."""
        return round_up(len_bytes, self.unit)

    @property
    def why(self) -> str:
        return f"{self.about}; {'outlives its process' if self.persistent else 'gone with its last process'}"


# ---- what the machine has --------------------------------------------------------------------------------


@dataclass(frozen=True)
class HugePages:
    """Counts of 2 MiB pages; `free`: available now, overcommit included."""

    total: int
    free: int


def huge_pages() -> HugePages:
    """2 MiB huge pages of this machine; none where the kernel has no such pages."""

    def number(name: str) -> int:
        try:
            return int((HUGE_SYSFS / name).read_text())
        except (OSError, ValueError):
            return 0

    more = max(0, number("nr_overcommit_hugepages") - number("surplus_hugepages"))
    free = max(0, number("free_hugepages") - number("resv_hugepages"))
    return HugePages(number("nr_hugepages"), free + more)


def hugetlbfs_mounts() -> list[Path]:
    """Mount points of hugetlbfs with 2 MiB pages, writable or not."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "hugetlbfs" and re.search(r"\bpagesize=(2M|2048k)\b", options, re.IGNORECASE):
            found.append(Path(where.encode().decode("unicode_escape")))
    return found


def writable_hugetlbfs() -> Path | None:
    """A hugetlbfs mount in which this user may make files."""
    return next((path for path in hugetlbfs_mounts() if os.access(path, os.W_OK | os.X_OK)), None)


def thp_mode() -> str:
    """The kernel's shmem_enabled: always, within_size, advise, never, deny, force; `never` where there is no THP."""
    try:
        match = re.search(r"\[(\w+)\]", THP_SYSFS.read_text())
    except OSError:
        return "never"
    return match[1] if match else "never"


def _cgroup_room() -> int | None:
    """Bytes left under the tightest memory limit of this process's cgroups (v2); None without a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    group = next((line[3:] for line in lines if line.startswith("0::")), None)
    if group is None:
        return None
    room = None
    top = Path("/sys/fs/cgroup")
    path = top / group.lstrip("/")
    for folder in [path, *path.parents]:
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                left = int(limit) - int((folder / "memory.current").read_text())
                room = left if room is None else min(room, left)
        except (OSError, ValueError):
            pass
        if folder == top:
            break
    return room


def memory_available() -> int:
    """Bytes of 4 KiB pages that can be taken without driving the machine, or this cgroup, out of memory."""
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    total = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    if not match or not total:
        return 1 << 62  # a /proc without them: nothing is known, so the allocation itself must refuse
    spare = min(256 * MIB, int(total[1]) * 1024 // 32)
    room = int(match[1]) * 1024 - spare
    limit = _cgroup_room()
    return max(0, room if limit is None else min(room, limit))


def shm_available() -> int:
    """Bytes that fit into /dev/shm by its size limit."""
    stat = os.statvfs(SHM_DIR)
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else 1 << 62


# ---- what is missing, as sentences ------------------------------------------------------------------------


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:.0f} MiB" if n_bytes >= MIB else f"{n_bytes / 1024:.0f} KiB"


def _short_of_huge(needed: int, have: HugePages) -> MemoryShortError:
    pages = needed // HUGE
    return MemoryShortError(
        f"{pages} huge pages of 2 MiB are needed and {have.free} are free: {pages - have.free} are missing",
        needed=needed,
        available=have.free * HUGE,
        command=f"sysctl vm.nr_hugepages={have.total + pages - have.free}",
    )


def _short_of_shm(needed: int, available: int) -> MemoryShortError:
    stat = os.statvfs(SHM_DIR)
    size = round_up(stat.f_blocks * stat.f_frsize + needed - available, MIB) // MIB
    return MemoryShortError(
        f"{_mib(needed)} of POSIX shared memory are needed and {SHM_DIR} has room for {_mib(available)}: "
        f"{_mib(needed - available)} are missing",
        needed=needed,
        available=available,
        command=f"mount -o remount,size={size}m {SHM_DIR}",
    )


def _short_of_memory(needed: int, available: int) -> MemoryShortError:
    return MemoryShortError(
        f"{_mib(needed)} of memory are needed and {_mib(available)} are available: "
        f"{_mib(needed - available)} are missing",
        needed=needed,
        available=available,
        command=f"use a guest of at most {_mib(available // 2)}, or stop other programs",
    )


# ---- kinds, and whether they have room -----------------------------------------------------------------------


_HUGE_WITHOUT_NAME = "2 MiB huge pages without a name"


def _hugetlb() -> Kind:
    folder = writable_hugetlbfs()
    about = f"2 MiB huge pages, files on {folder}" if folder else _HUGE_WITHOUT_NAME
    return Kind("hugetlb", folder, HUGE, about)


def _thp() -> Kind:
    return Kind("thp", None, HUGE, f"transparent huge pages (shmem_enabled is {thp_mode()})")


def _shm() -> Kind:
    return Kind("shm", SHM_DIR, mmap.PAGESIZE, "4 KiB pages of POSIX shared memory")


def _shm_without_name() -> Kind:
    return Kind("shm", None, mmap.PAGESIZE, "4 KiB pages of shared memory without a name")


def nameless(kind: Kind) -> Kind:
    """The same memory as a memfd."""
    if kind.folder is None:
        return kind
    return Kind("hugetlb", None, HUGE, _HUGE_WITHOUT_NAME) if kind.backing == "hugetlb" else _shm_without_name()


def kinds(backing: str) -> list[Kind]:
    """The ways to try for a backing, best first. ArgumentError for an unknown one."""
    if backing not in BACKINGS:
        raise ArgumentError(f"backing is {backing!r}, known are {', '.join(BACKINGS)}")
    # A hugetlbfs mount may have a limit of its own; the same pages are there without it.
    ways = {"hugetlb": [_hugetlb(), nameless(_hugetlb())], "thp": [_thp()], "shm": [_shm()]}
    ways["hugetlb"] = list(dict.fromkeys(ways["hugetlb"]))
    if backing == "auto":
        return [*ways["hugetlb"], *ways["thp"], *ways["shm"], _shm_without_name()]
    return ways[backing]


def small_pages(kind: Kind) -> Kind:
    """4 KiB pages that live as long as those of `kind`."""
    return _shm() if kind.persistent else _shm_without_name()


def check_private(kind: Kind) -> None:
    """UnsupportedError if guest RAM of this kind can't be mapped privately at a price that makes sense."""
    if kind.backing == "hugetlb":
        raise UnsupportedError(
            "bounded memory does not work on hugetlb: each page that the secondary writes would take 2 MiB",
            hint="use --backing thp or shm",
        )


def check_room(kind: Kind, needed: int, *, reserve: bool = True) -> None:
    """Raise what is missing for `needed` bytes of this kind: MemoryShortError, or UnsupportedError with the reason."""
    if kind.backing == "hugetlb":
        have = huge_pages()
        if have.free * HUGE < needed:  # sparse ones too: the mappings of the engine reserve all of it
            raise _short_of_huge(needed, have)
        return
    if kind.backing == "thp" and thp_mode() in ("never", "deny"):
        raise UnsupportedError(
            f"transparent huge pages are off for shared memory (shmem_enabled is {thp_mode()})",
            hint=f"echo advise > {THP_SYSFS}",
        )
    if kind.folder == SHM_DIR and not os.access(SHM_DIR, os.W_OK | os.X_OK):
        raise UnsupportedError(f"{SHM_DIR} is missing or not writable", hint=f"mount -t tmpfs tmpfs {SHM_DIR}")
    if not reserve:
        return
    available = memory_available()
    if kind.folder == SHM_DIR and shm_available() < min(needed, available):
        raise _short_of_shm(needed, shm_available())
    if available < needed:
        raise _short_of_memory(needed, available)


def nameless_file(kind: Kind, label: str) -> int:
    """A new memfd of size 0 for images of this kind; close-on-exec."""
    flags = os.MFD_CLOEXEC | ((os.MFD_HUGETLB | MFD_HUGE_2MB) if kind.backing == "hugetlb" else 0)
    try:
        return os.memfd_create(label, flags)
    except OSError as error:
        raise SystemCallError(
            f"a memfd of {kind.about} can't be made: {reason_of(error)}", errno=error.errno or errno.EIO
        ) from error


# ---- reserving --------------------------------------------------------------------------------------------------


def _spans(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, CHUNK):
        yield start, min(CHUNK, size - start)


def _populate_huge(fd: int, size: int) -> None:
    """Fill a memfd through a mapping that asks for huge pages; fallocate would get small ones in mode `advise`."""
    with mmap.mmap(fd, size, mmap.MAP_SHARED) as mapping:
        mapping.madvise(mmap.MADV_HUGEPAGE)
        for start, length in _spans(size):
            mapping.madvise(MADV_POPULATE_WRITE, start, length)


def _fill(kind: Kind, fd: int, size: int) -> None:
    if kind.backing == "thp":
        _populate_huge(fd, size)
        return
    if kind.backing == "hugetlb":
        # A shared mapping reserves all pages or fails; the reservation then stays with the file.
        mmap.mmap(fd, size, mmap.MAP_SHARED).close()
    for start, length in _spans(size):
        os.posix_fallocate(fd, start, length)


def size_file(kind: Kind, fd: int, len_bytes: int, *, reserve: bool) -> int:
    """Give the empty file its size for an image of len_bytes, all of it reserved if asked; returns the size in bytes.

    MemoryShortError, UnsupportedError; the file is then the caller's to remove.
    """
    size = kind.size_of(len_bytes)
    try:
        os.ftruncate(fd, size)
        if reserve:
            _fill(kind, fd, size)
    except OSError as error:
        raise _failed(kind, size, error) from error
    return size


def _failed(kind: Kind, size: int, error: OSError) -> ColocacheError:
    """Somebody else took the room after it was checked, or the kernel can't do it at all."""
    code = error.errno or errno.EIO
    if code in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT):
        if kind.backing == "hugetlb":
            return _short_of_huge(size, HugePages(huge_pages().total, min(huge_pages().free, size // HUGE - 1)))
        if kind.folder == SHM_DIR and code == errno.ENOSPC:
            return _short_of_shm(size, min(shm_available(), size - mmap.PAGESIZE))
        return _short_of_memory(size, min(memory_available(), size - mmap.PAGESIZE))
    if code == errno.EINVAL and kind.backing == "thp":
        return UnsupportedError("this kernel can't fill transparent huge pages of shared memory (Linux 5.14 can)")
    return SystemCallError(f"{kind.about}: {reason_of(error)} while {_mib(size)} were reserved", errno=code)
