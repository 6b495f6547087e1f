# SPDX-License-Identifier: Apache-2.0
"""Where another process maps a file, as the kernel tells."""

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
    writable: bool


def find(pid: int, file: os.stat_result, len_bytes: int) -> int:
    """The address at which `pid` maps the first len_bytes of `file`, in one piece and writable."""
    mapped = [area for area in _areas(pid, file) if area.writable]
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


def _areas(pid: int, file: os.stat_result) -> Iterator[Area]:
    """Each area that maps `file`."""
    device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
    try:
        text = Path(f"/proc/{pid}/maps").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise QemuDiedError(f"QEMU (process {pid}) has ended") from error
    except PermissionError as error:
        raise QemuError(f"the memory of process {pid} can't be looked at: {error.strerror}") from error
    for line in text.splitlines():
        span, flags, offset, where, inode = line.split(None, 5)[:5]
        if where == device and int(inode) == file.st_ino:
            start, _, end = span.partition("-")
            yield Area(int(start, 16), int(end, 16), int(offset, 16), flags[1] == "w")
