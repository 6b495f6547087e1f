# SPDX-License-Identifier: Apache-2.0
"""Disks that a command line names and nobody writes: both sides read their own, so they must hold the same.

They are compared at HELLO by their size and a hash of what they hold: all of it, or of a large one SAMPLES parts of it
at places that depend on its size alone. A machine is described whenever a process is started for it, before a takeover
too, and to read gigabytes then would take longer than the world should wait; what a sample finds to differ does differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PART = 1 << 20
SAMPLES = 64  # parts of a disk that are looked at; one of no more than these is looked at whole


@dataclass(frozen=True)
class ReadOnlyDisk:
    """`name` is what the command line calls it, `path` the file that holds it; "" for an empty drive."""

    name: str
    path: str

    @classmethod
    def of(cls, pairs: Mapping[str, str], index: int) -> ReadOnlyDisk:
        """By the options of a -drive or -blockdev, the `index`-th of its line."""
        name = pairs.get("id") or pairs.get("node-name") or f"drive {index}"
        return cls(name, _path(pairs))

    def fingerprint(self) -> str:
        """The same only for the same contents, as far as was looked. What can't be read counts by its name."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return f"{self.path or 'empty'}"  # a node of another -blockdev, or what QEMU reaches by a protocol
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                return self.path
            size = os.lseek(fd, 0, os.SEEK_END)
            return f"{size} bytes {_digest(fd, size)}"
        except OSError as error:
            return f"{self.path} unreadable: {error}"
        finally:
            os.close(fd)


def _path(pairs: Mapping[str, str]) -> str:
    for key in ("file.filename", "filename", "file"):
        if value := pairs.get(key):
            if not value.startswith("{"):
                return value
            try:
                inner = json.loads(value)
            except ValueError:
                return value  # a file of a strange name
            return _path({str(k): str(v) if not isinstance(v, dict) else json.dumps(v) for k, v in inner.items()})
    return ""


def _digest(fd: int, size: int) -> str:
    running = hashlib.sha256()
    for offset in _places(size):
        running.update(os.pread(fd, PART, offset))
    return running.hexdigest()[:16]


def _places(size: int) -> Iterator[int]:
    n_parts = -(-size // PART)
    if n_parts <= SAMPLES:
        yield from range(0, size, PART)
    else:  # the first, the last, and as many between them, as far from each other
        yield from (number * (size - PART) // (SAMPLES - 1) for number in range(SAMPLES))
