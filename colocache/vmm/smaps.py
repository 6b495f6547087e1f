# SPDX-License-Identifier: Apache-2.0
"""How this process maps an address."""

from __future__ import annotations

from pathlib import Path

from colocache.errors import ArgumentError


def kernel_page_size(addr: int) -> int:
    """The page size in bytes that the kernel uses for the mapping at addr: 4096 or that of hugetlb; 0 without /proc."""
    inside = False
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return 0
    with smaps.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            head = line.split(None, 1)[0]
            if not head.endswith(":"):
                first, _, end = head.partition("-")
                inside = int(first, 16) <= addr < int(end, 16)
            elif inside and head == "KernelPageSize:":
                return int(line.split()[1]) * 1024
    raise ArgumentError(f"nothing is mapped at {addr:#x}")
