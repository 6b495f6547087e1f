# SPDX-License-Identifier: Apache-2.0
"""What the disks' code asks the system for: counted, and one call fails, does a half or is the last of its process."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from typing import Any

from colocache.disks import apart, epoch_log, image

NAMES = ("pwritev", "pwrite", "pread", "ftruncate", "open", "fstat", "lseek", "fsync")
ROOMS = (apart, epoch_log, image)


class Calls:
    """Counts what the disks' code asks the system for; at call number `at`, `what` becomes of it."""

    def __init__(self, at: int = 0, what: Callable[[Callable[[], Any], Callable[[], Any]], Any] | None = None) -> None:
        self.n = 0
        self.names: list[str] = []
        self._at, self._what = at, what
        self._flock, self._punch = fcntl.flock, image.punch_hole

    def __enter__(self) -> Calls:
        for room in ROOMS:
            room.os = self  # type: ignore[attr-defined]
        fcntl.flock = lambda *given: self._passed("flock", lambda: self._flock(*given))  # type: ignore[assignment]
        image.punch_hole = lambda *given: self._passed("punch", lambda: self._punch(*given))
        return self

    def __exit__(self, *_: object) -> None:
        for room in ROOMS:
            room.os = os  # type: ignore[attr-defined]
        fcntl.flock, image.punch_hole = self._flock, self._punch

    def __getattr__(self, name: str) -> Any:
        """What the disks' code takes for the module `os`."""
        real = getattr(os, name)
        if name not in NAMES:
            return real

        def call(*given: Any, **more: Any) -> Any:
            return self._passed(name, lambda: real(*given, **more), lambda: half(name, real, *given))

        return call

    def _passed(self, name: str, whole: Callable[[], Any], part: Callable[[], Any] | None = None) -> Any:
        self.n += 1
        self.names.append(name)
        if self.n == self._at and self._what is not None:
            return self._what(whole, part or whole)
        return whole()


def half(name: str, real: Callable[..., Any], *given: Any) -> Any:
    """The first half of a call that moves bytes."""
    if name == "pwritev":
        fd, parts, at = given
        data = b"".join(bytes(part) for part in parts)
        return real(fd, [data[: max(1, len(data) // 2)]], at)
    if name == "pwrite":
        fd, data, at = given
        return real(fd, data[: max(1, len(data) // 2)], at)
    if name == "pread":
        fd, n_bytes, at = given
        return real(fd, max(1, n_bytes // 2), at)
    return real(*given)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_before(_whole: Callable[[], Any], _part: Callable[[], Any]) -> None:
    die()


def dies_half(_whole: Callable[[], Any], part: Callable[[], Any]) -> None:
    part()
    die()


def dies_after(whole: Callable[[], Any], _part: Callable[[], Any]) -> None:
    whole()
    die()


def failing(number: int) -> Callable[[Callable[[], Any], Callable[[], Any]], Any]:
    def fail(_whole: Callable[[], Any], part: Callable[[], Any]) -> Any:
        if number:
            raise OSError(number, os.strerror(number))
        return part()

    return fail
