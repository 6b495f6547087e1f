# SPDX-License-Identifier: Apache-2.0
"""Where another process maps a file, and how much of a private mapping it has written, as the kernel tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colocache.vmm.qemu.errors import QemuDiedError, QemuError


@dataclass(frozen=True)
class Area:
    """One line of /proc/PID/maps: addresses, and where in the file it begins."""

    start: int
    end: int
    offset: int
    shared: bool
    writable: bool


def areas(pid: int, file: os.stat_result) -> list[Area]:
    """The areas of process `pid` that map `file`, by rising address."""
    return [area for area, _ in _walk(pid, file, "maps")]


def find(pid: int, file: os.stat_result, len_bytes: int) -> int:
    """The address at which `pid` maps the first len_bytes of `file`, in one piece and writable."""
    mapped = [area for area in areas(pid, file) if area.writable]
    for first in mapped:
        if first.offset:
            continue
        end = first.start
        for area in mapped:  # the kernel cuts an area where its flags change
            if area.start == end and area.offset == end - first.start:
                end = area.end
        if end - first.start >= len_bytes:
            return first.start
    raise QemuError(f"process {pid} maps the {len_bytes} bytes of guest memory nowhere in one piece")


def private_bytes(pid: int, file: os.stat_result) -> int:
    """Bytes of `file` that `pid` has written in private mappings: its own copies, in memory or swapped out."""
    total = 0
    for area, fields in _walk(pid, file, "smaps"):
        if not area.shared:
            total += fields.get("Anonymous", 0) + fields.get("Swap", 0)
    return total


def _walk(pid: int, file: os.stat_result, name: str) -> Iterator[tuple[Area, dict[str, int]]]:
    """Each area that maps `file`, with its fields in bytes (smaps; none in maps)."""
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    found: tuple[Area, dict[str, int]] | None = None
    try:
        text = Path(f"/proc/{pid}/{name}").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise QemuDiedError(f"QEMU (process {pid}) has ended") from error
    except PermissionError as error:
        raise QemuError(f"the memory of process {pid} can't be looked at: {error.strerror}") from error
    for line in text.splitlines():
        words = line.split(None, 5)
        if words[0].endswith(":"):
            if found is not None and len(words) > 2 and words[2] == "kB":
                found[1][words[0][:-1]] = int(words[1]) * 1024
            continue
        if found is not None:
            yield found
        found = None
        span, flags, offset, where, inode = words[:5]
        if where == device and int(inode) == file.st_ino:
            start, _, end = span.partition("-")
            area = Area(int(start, 16), int(end, 16), int(offset, 16), flags[3] == "s", flags[1] == "w")
            found = (area, {})
    if found is not None:
        yield found
