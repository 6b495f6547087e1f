# SPDX-License-Identifier: Apache-2.0
"""What the machine is that a measurement was made on."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from colocache import __version__
from colocache import backing as bk
from colocache.choices import COPIES
from colocache.measure import baseline

CPU_SYSFS = Path("/sys/devices/system/cpu")
NODE_SYSFS = Path("/sys/devices/system/node")
TOUCH_MIN = 64 << 20


@dataclass(frozen=True)
class Host:
    """Facts of a machine; sizes in bytes. Fields are the `host` object of `bench --json`."""

    cpu: str
    machine: str
    cores: int  # that this process may use
    numa_nodes: int
    l3_bytes: int  # of all caches of these cores together; 0 = unknown
    hypervisor: bool
    ram_bytes: int
    available_bytes: int
    huge_pages: int  # of 2 MiB, before the run
    huge_pages_free: int
    thp_shmem: str
    kernel: str
    copy_variants: tuple[str, ...]
    python: str
    colocache: str

    @property
    def touch_bytes(self) -> int:
        """How much other memory to touch so that nothing is left in a CPU cache."""
        return max(TOUCH_MIN, 2 * self.l3_bytes)

    def __str__(self) -> str:
        nodes = f"{self.numa_nodes} NUMA node{'s' if self.numa_nodes != 1 else ''}"
        cache = f"{self.l3_bytes >> 20} MiB L3" if self.l3_bytes else "L3 unknown"
        return (
            f"{self.cpu} ({self.machine}{', virtual' if self.hypervisor else ''}), {self.cores} cores, "
            f"{nodes}, {cache}, "
            f"{self.ram_bytes / 2**30:.1f} GiB RAM ({self.available_bytes / 2**30:.1f} available), "
            f"{self.huge_pages} huge pages of 2 MiB ({self.huge_pages_free} free), shared-memory THP {self.thp_shmem}, "
            f"Linux {self.kernel}, copies with {', '.join(self.copy_variants)}"
        )


def copy_variants() -> tuple[str, ...]:
    """Every page copy that this CPU can do, memcpy included."""
    return tuple(name for name in COPIES if name != "auto" and baseline.copies_with(name))


def peak_passes() -> tuple[tuple[str, bool], ...]:
    """Each pass that may be the peak, as (variant, side by side): straight on, or as the flush copies.

    Which is faster differs from CPU to CPU; for memcpy there is one way only.
    """
    return tuple((name, way) for name in copy_variants() for way in (False, True) if not (name == "libc" and way))


def _cpuinfo() -> tuple[str, bool]:
    """The CPU's name, and whether it runs under a hypervisor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "unknown CPU", False
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    if name is None:
        part = re.search(r"^CPU part\s*: (.+)$", text, re.MULTILINE)
        maker = re.search(r"^CPU implementer\s*: (.+)$", text, re.MULTILINE)
        arm = f"implementer {maker[1]}, part {part[1]}" if part and maker else platform.processor() or "unknown CPU"
        return arm, False
    flags = re.search(r"^flags\s*: (.+)$", text, re.MULTILINE)
    return name[1].strip(), bool(flags and "hypervisor" in flags[1].split())


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0


def l3_bytes() -> int:
    """Size of the third-level caches of the cores this process may use; 0 where the kernel does not say."""
    found: dict[str, int] = {}
    for core in os.sched_getaffinity(0):
        for index in (CPU_SYSFS / f"cpu{core}" / "cache").glob("index*"):
            try:
                if (index / "level").read_text().strip() == "3":
                    shared = (index / "shared_cpu_list").read_text().strip()
                    found[shared] = _size((index / "size").read_text())
            except OSError:
                continue
    return sum(found.values())


def examine() -> Host:
    """Look at this machine."""
    cpu, hypervisor = _cpuinfo()
    huge = bk.huge_pages()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Host(
        cpu=cpu,
        machine=platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        numa_nodes=len(list(NODE_SYSFS.glob("node[0-9]*"))) or 1,
        l3_bytes=l3_bytes(),
        hypervisor=hypervisor,
        ram_bytes=total,
        available_bytes=min(bk.memory_available(), total),
        huge_pages=huge.total,
        huge_pages_free=huge.free,
        thp_shmem=bk.thp_mode(),
        kernel=platform.release(),
        copy_variants=copy_variants(),
        python=platform.python_version(),
        colocache=__version__,
    )
