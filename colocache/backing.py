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

from colocache import cgroups
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
SPARE = 256 * MIB  # left for everything else
UNKNOWN = 1 << 62  # nothing is known of a limit, so the allocation itself must refuse

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


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing where there is no such file, or no /proc at all."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def huge_pages() -> HugePages:
    """2 MiB huge pages of this machine; none where the kernel has no such pages."""

    def number(name: str) -> int:
        return int(_text(HUGE_SYSFS / name) or 0)

    more = max(0, number("nr_overcommit_hugepages") - number("surplus_hugepages"))
    free = max(0, number("free_hugepages") - number("resv_hugepages"))
    return HugePages(number("nr_hugepages"), free + more)


def hugetlbfs_mounts() -> list[Path]:
    """Mount points of hugetlbfs with 2 MiB pages, writable or not."""
    found = []
    for line in _text(Path("/proc/self/mounts")).splitlines():
        _, where, kind, options = line.split()[:4]
        if kind == "hugetlbfs" and re.search(r"\bpagesize=(2M|2048k)\b", options, re.IGNORECASE):
            found.append(Path(where.encode().decode("unicode_escape")))
    return found


def writable_hugetlbfs() -> Path | None:
    """A hugetlbfs mount in which this user may make files."""
    return next((path for path in hugetlbfs_mounts() if os.access(path, os.W_OK | os.X_OK)), None)


def thp_mode() -> str:
    """The kernel's shmem_enabled: always, within_size, advise, never, deny, force; `never` where there is no THP."""
    match = re.search(r"\[(\w+)\]", _text(THP_SYSFS))
    return match[1] if match else "never"


def _machine_memory() -> int:
    text = _text(Path("/proc/meminfo"))
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    total = re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)
    if not match or not total:
        return UNKNOWN
    return max(0, int(match[1]) * 1024 - min(SPARE, int(total[1]) * 1024 // 32))


def _group_memory() -> int:
    left = cgroups.memory_left()
    return UNKNOWN if left is None else left - min(SPARE, left // 4)  # this process and its children need some too


def memory_available() -> int:
    """Bytes of 4 KiB pages that can be taken without driving the machine, or this control group, out of memory."""
    return min(_machine_memory(), _group_memory())


def shm_available() -> int:
    """Bytes that fit into /dev/shm by its size limit."""
    stat = os.statvfs(SHM_DIR)
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else UNKNOWN


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
    command = f"use a guest of at most {_mib(available // 2)}, or stop other programs"
    there = f"{_mib(available)} are available"
    if _group_memory() < _machine_memory():
        there = f"the control group of this process leaves it {_mib(available)}"
        command = f"use a guest of at most {_mib(available // 2)}, or raise the group's memory limit"
    return MemoryShortError(
        f"{_mib(needed)} of memory are needed and {there}: {_mib(needed - available)} are missing",
        needed=needed,
        available=available,
        command=command,
    )


def _short_of_group_huge(needed: int, left: int) -> MemoryShortError:
    return MemoryShortError(
        f"{needed // HUGE} huge pages of 2 MiB are needed and the control group of this process leaves it "
        f"{left // HUGE}: {(needed - left) // HUGE} are missing",
        needed=needed,
        available=left,
        command="raise the group's limit (hugetlb.2MB.max, or hugetlb.2MB.limit_in_bytes)",
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


@dataclass
class Making:
    """How a memory's images are made, and how many blocks have some: their files are numbered as the region's."""

    kind: Kind
    reserve: bool
    n_blocks: int = 0


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
        left = cgroups.huge_left()
        if left is not None and left // HUGE < needed // HUGE:
            raise _short_of_group_huge(needed, left // HUGE * HUGE)
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
        left = cgroups.huge_left() if kind.backing == "hugetlb" else None
        if left is not None and left < size:
            return _short_of_group_huge(size, left // HUGE * HUGE)
        if kind.backing == "hugetlb":
            return _short_of_huge(size, HugePages(huge_pages().total, min(huge_pages().free, size // HUGE - 1)))
        if kind.folder == SHM_DIR and code == errno.ENOSPC:
            return _short_of_shm(size, min(shm_available(), size - mmap.PAGESIZE))
        return _short_of_memory(size, min(memory_available(), size - mmap.PAGESIZE))
    if code == errno.EINVAL and kind.backing == "thp":
        return UnsupportedError("this kernel can't fill transparent huge pages of shared memory (Linux 5.14 can)")
    return SystemCallError(f"{kind.about}: {reason_of(error)} while {_mib(size)} were reserved", errno=code)
