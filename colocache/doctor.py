# SPDX-License-Identifier: Apache-2.0
"""What this machine offers to colocache: each thing is tried, not looked up, and what is missing comes with the command
that enables it. Nothing is changed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from colocache import RamImage, Sender, UffdDirtyLog, UffdRange, spill
from colocache import backing as bk
from colocache._native import ffi, lib
from colocache.errors import ArgumentError, ColocacheError
from colocache.private import private_bytes, private_forget
from colocache.results import COPY_NAMES
from colocache.spec import BlockSpec
from colocache.vmm.guests import guest_kind_available
from colocache.vmm.kvm import kvm_trouble
from colocache.vmm.qemu import availability

DEMO_BYTES = 256 << 20  # guest RAM of the demo; it needs three images of it: one of the primary, two of the secondary
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY = 1
LOG_KERNEL = (6, 7)  # asynchronous write-protection and PAGEMAP_SCAN
PROBE_PAGES = 16


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. `needed_for` says who misses it, `fix` is a command or a sentence."""

    name: str
    ok: bool
    found: str
    needed_for: str
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, the most important first."""
    return [
        kvm(),
        huge_pages(),
        hugetlbfs(),
        posix_shm(),
        transparent_huge_pages(),
        bounded_memory(),
        spill_folder(),
        memory(),
        dirty_log(),
        userfaultfd(),
        qemu(),
        cpu(),
    ]


def usable(findings: list[Finding]) -> bool:
    """Can a pair run here at all? Any guest and 4 KiB memory are enough."""
    there = {finding.name: finding.ok for finding in findings}
    return there["memory"] and (there["POSIX shm"] or there["huge pages"] or hasattr(os, "memfd_create"))


def kvm() -> Finding:
    """A KVM guest: opened and asked, as the reference machine does."""
    trouble = kvm_trouble()
    needed = "--guest kvm (else: process)"
    if trouble is None:
        return Finding("KVM", True, "/dev/kvm works", needed)
    return Finding("KVM", False, trouble[0], needed, trouble[1])


def qemu() -> Finding:
    """A stock QEMU, and what drives it."""
    trouble, needed = availability.trouble(), "--guest qemu"
    if trouble is not None:
        return Finding("QEMU", False, trouble[0], needed, trouble[1].strip("`"))
    found = availability.version()
    return Finding("QEMU", True, f"{availability.PROGRAM} {found[2] if found else ''}".strip(), needed)


def huge_pages() -> Finding:
    """2 MiB pages, all and free, against what the demo takes."""
    pages = bk.huge_pages()
    wanted = 3 * (DEMO_BYTES // bk.HUGE) + 4
    ok = pages.free >= wanted
    fix = "" if ok else f"sysctl vm.nr_hugepages={pages.total + wanted - pages.free}"
    found = f"{pages.total} of 2 MiB reserved, {pages.free} free; `colocache demo` takes {wanted}"
    return Finding("huge pages", ok, found, "--backing hugetlb, the fastest", fix)


def hugetlbfs() -> Finding:
    """A mount with names, so that huge pages outlive their process."""
    folder = bk.writable_hugetlbfs()
    needed = "huge pages that outlive the keeper"
    if folder is not None:
        return Finding("hugetlbfs", True, f"{folder}, writable", needed)
    mounts = bk.hugetlbfs_mounts()
    if mounts:
        return Finding("hugetlbfs", False, f"{mounts[0]} is not writable for you", needed, f"chmod 1777 {mounts[0]}")
    command = "mkdir -p /dev/hugepages && mount -t hugetlbfs -o pagesize=2M,mode=1777 none /dev/hugepages"
    return Finding("hugetlbfs", False, "not mounted", needed, command)


def posix_shm() -> Finding:
    """POSIX shared memory: the control region always lies there, 4 KiB images do."""
    needed = "the control region, and --backing shm"
    if not os.access(bk.SHM_DIR, os.W_OK | os.X_OK):
        return Finding("POSIX shm", False, "missing or not writable", needed, f"mount -t tmpfs tmpfs {bk.SHM_DIR}")
    free = bk.shm_available()
    total = os.statvfs(bk.SHM_DIR).f_blocks * os.statvfs(bk.SHM_DIR).f_frsize
    wanted = 2 * DEMO_BYTES + (16 << 20)
    ok = free >= wanted
    fix = "" if ok else f"mount -o remount,size={(total - free + wanted) >> 20}m {bk.SHM_DIR}"
    return Finding("POSIX shm", ok, f"{total >> 20} MiB, {free >> 20} MiB free", needed, fix)


def transparent_huge_pages() -> Finding:
    """shmem_enabled: THP for shared memory."""
    mode = bk.thp_mode()
    ok = mode not in ("never", "deny")
    fix = "" if ok else f"echo advise > {bk.THP_SYSFS}"
    return Finding("THP", ok, f"shmem_enabled is {mode}", "--backing thp", fix)


def bounded_memory() -> Finding:
    """Tried on one page: a private copy is counted, and forgotten."""

    needed = "--memory bounded"
    fd = os.memfd_create("colocache.doctor")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_PRIVATE) as page:
            addr = int(ffi.cast("uintptr_t", ffi.from_buffer(page)))
            page[0] = 1
            counted = private_bytes(0, addr, mmap.PAGESIZE)
            private_forget(addr, mmap.PAGESIZE)
            if (counted, page[0]) != (mmap.PAGESIZE, 0):
                return Finding("bounded memory", False, "private pages are not told from others", needed)
    except (ColocacheError, OSError) as error:
        return Finding("bounded memory", False, str(error), needed, "mount /proc")
    finally:
        os.close(fd)
    if bk.thp_mode() in ("never", "deny"):
        what = "works; a secondary's pause is much shorter on transparent huge pages"
        return Finding("bounded memory", True, what, needed, f"echo advise > {bk.THP_SYSFS}")
    return Finding("bounded memory", True, "works", needed)


def spill_folder() -> Finding:
    """A disk that is no memory: /var/tmp, as any other folder may be named."""
    needed = "--memory-spill DIR: checkpoints larger than --memory-limit"
    folder = Path("/var/tmp")  # noqa: S108 -- only looked at
    try:
        where = spill.check_folder(folder)
    except ArgumentError as error:
        return Finding("spill folder", False, str(error), needed, "name a folder on a disk")
    free = spill.free_bytes(where) >> 20
    return Finding("spill folder", True, f"{where} is on {spill.file_system_of(where)}, {free} MiB free", needed)


def memory() -> Finding:
    """Memory for the demo's three images."""
    available, wanted = bk.memory_available(), 3 * DEMO_BYTES
    ok = available >= wanted
    fix = (
        "" if ok else f"use a guest of at most {available // 3 >> 20} MiB: colocache demo --ram {available // 3 >> 20}M"
    )
    return Finding("memory", ok, f"{available >> 20} MiB available", "`colocache demo` with 256 MiB", fix)


def dirty_log() -> Finding:
    """userfaultfd write-protect-async and PAGEMAP_SCAN, really tried: of 16 pages one is written and must be found."""
    needed = "the kernel's dirty log of a process guest"
    name = "PAGEMAP_SCAN"
    try:
        with (
            RamImage.create(BlockSpec("probe", PROBE_PAGES * 4096, 4096), "shm") as image,
            Sender() as sender,
            UffdDirtyLog([UffdRange(0, 0, PROBE_PAGES, image.addr)]) as log,
        ):
            sender.add_block("probe", image.addr, PROBE_PAGES * 4096, 4096)
            log.discard()
            image.view[3, 0] = 1
            sender.sync_dirty_log(log)
            pages = sender.count()[0]
    except ColocacheError as error:
        return Finding(name, False, str(error), needed, error.hint or _dirty_log_fix())
    if pages != 1:
        return Finding(name, False, f"one page was written and {pages} were reported", needed, "report this, please")
    return Finding(name, True, "works: one page written, one reported; needs no privilege", needed)


def _dirty_log_fix() -> str:
    """What helps where the log does not work: permission, or a newer kernel."""
    if _userfaultfd() in (errno.EPERM, errno.EACCES):
        return "allow userfaultfd, see there"
    if _kernel() < LOG_KERNEL:
        return f"run Linux {LOG_KERNEL[0]}.{LOG_KERNEL[1]} or newer, this is {platform.release()}"
    return "run a kernel with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)


def userfaultfd() -> Finding:
    """What the kernel's log begins with. A refusal tells missing permission from a kernel that lacks it."""
    needed = "the kernel's dirty log, of a process guest and of QEMU"
    number = _userfaultfd()
    if number == 0:
        return Finding("userfaultfd", True, "works; needs no privilege", needed)
    if number in (errno.EPERM, errno.EACCES):
        found = "permission is missing: a container's seccomp filter or a security module forbids the system call"
        fix = "allow userfaultfd in the container's seccomp profile (docker and podman: --security-opt seccomp=FILE)"
    elif number == errno.EINVAL:
        found = f"Linux {platform.release()} is too old: it has no userfaultfd without privilege"
        fix = "run Linux 5.11 or newer"
    elif number == errno.ENOSYS:
        found = f"this kernel ({platform.release()}) has none, or a seccomp filter says so"
        fix = "run a kernel with CONFIG_USERFAULTFD"
    else:
        found, fix = f"failed: {os.strerror(number)}", "see the kernel's messages"
    return Finding("userfaultfd", False, found, needed, fix)


def _userfaultfd() -> int:
    """0 if a userfaultfd for faults of user code can be made, which is all that is used here; or the errno."""
    number = SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return errno.ENOSYS
    fd = ctypes.CDLL(None, use_errno=True).syscall(number, UFFD_USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def cpu() -> Finding:
    """How this CPU can copy pages past its cache."""
    found = [
        name
        for name, number in COPY_NAMES.items()
        if name not in ("auto", "libc") and lib.colocache_copy_supported(number) == 0
    ]
    cores = len(os.sched_getaffinity(0))
    text = f"{platform.machine()}, {cores} cores, copies with {', '.join(found) if found else 'memcpy only'}"
    return Finding("CPU", bool(found), text, "a flush that spares the CPU cache")


def versions() -> dict[str, str]:
    """What runs here."""
    from colocache._native import version

    return {
        "colocache": version(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "page_size": str(mmap.PAGESIZE),
        "executable": sys.executable,
    }


def default_guest() -> str:
    """What `--guest auto` takes here."""
    return guest_kind_available("auto")[0]
