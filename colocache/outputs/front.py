# SPDX-License-Identifier: Apache-2.0
"""Fronts: the ends that the world is connected to. What is let out of a queue is shown here, at once and in order."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from colocache.errors import ArgumentError
from colocache.outputs.piece import CONSOLE
from colocache.outputs.travel import Origin
from colocache.outputs.typed import TypedInput

HOST_IDS = (Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id"))  # the second where /proc is not mounted


def _host() -> bytes:
    """What both sides on this host have in common. Where nothing tells, no file is known again: a line may come twice,
    but none is lost."""
    for file in HOST_IDS:
        with contextlib.suppress(OSError):
            return file.read_bytes()
    return os.urandom(16)


class Front(Protocol):
    """Shows output. Calls come one at a time, from any thread."""

    def show(self) -> None:
        """This side's machine is the one that the world sees: before the first `emit`."""

    def listen(self, on_packet: Callable[[bytes], None]) -> None:
        """Once `show` was called, packets from the world go there."""

    def hear(self, typed: TypedInput | None) -> None:
        """Once `show` was called, what the world types on the console goes there; None: the guest does not hear."""

    def emit(self, channel: int, data: bytes) -> None:
        """The world may see this. What it does not take is lost, never the guest."""

    def origin(self) -> Origin:
        """What a front of the same host needs to know where this one has come to."""

    def seen(self, origin: Origin, channel: int) -> int:
        """Up to which offset of `channel` the front with this origin has come; 0: that can't be told here."""

    def close(self) -> None:
        """Once."""


class NoFront:
    """Nobody looks."""

    def show(self) -> None:
        """See Front."""

    def listen(self, on_packet: Callable[[bytes], None]) -> None:
        """See Front."""

    def hear(self, typed: TypedInput | None) -> None:
        """See Front."""

    def emit(self, channel: int, data: bytes) -> None:
        """See Front."""

    def origin(self) -> Origin:
        """See Front."""
        return Origin()

    def seen(self, origin: Origin, channel: int) -> int:  # noqa: ARG002 -- see Front
        """See Front."""
        return 0

    def close(self) -> None:
        """See Front."""


class FileFront(NoFront):
    """The console is added to a file, or to this process's standard output.

    On one host both sides add to the same file, and nothing else may. Its length tells the second how far the first
    had come when it died, so that each byte is there once.
    """

    def __init__(self, path: str) -> None:
        self._given = self._written = 0
        if path == "-":
            self._fd = os.dup(1)
            self._size = -1
            return
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ArgumentError(f"the console can't be written to {path}: {error.strerror}") from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            raise ArgumentError(f"the console can't be written to {path}: it is no regular file")
        self._size = found.st_size
        self._identity = hashlib.sha256(b"%s %d %d" % (_host(), found.st_dev, found.st_ino)).digest()[:16]

    def emit(self, channel: int, data: bytes) -> None:
        """See Front. A disk that is full costs these words, never the guest."""
        if channel != CONSOLE:
            return
        self._given += len(data)
        rest = memoryview(data)
        with contextlib.suppress(OSError):
            while rest:
                n_bytes = os.write(self._fd, rest)
                self._written += n_bytes
                rest = rest[n_bytes:]

    def origin(self) -> Origin:
        """See Front."""
        return Origin() if self._size < 0 else Origin(self._identity, self._size + self._written - self._given)

    def seen(self, origin: Origin, channel: int) -> int:
        """See Front."""
        if channel != CONSOLE or self._size < 0 or origin.identity != self._identity:
            return 0
        return os.fstat(self._fd).st_size - origin.base

    def close(self) -> None:
        """See Front."""
        os.close(self._fd)
