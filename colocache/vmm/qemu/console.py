# SPDX-License-Identifier: Apache-2.0
"""The guest's console, written to a file by whichever machine is the one that the world sees."""

from __future__ import annotations

import contextlib
import os
import stat

from colocache.errors import ArgumentError


class ConsoleFile:
    """Adds to a regular file. Nothing is added until show() was called: a secondary's words are its own branch's."""

    def __init__(self, path: str) -> None:
        self._shown = False
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ArgumentError(f"the console can't be written to {path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise ArgumentError(f"the console can't be written to {path}: it is no regular file")

    def show(self) -> None:
        """From now on what is said is added."""
        self._shown = True

    def __call__(self, data: bytes) -> None:
        """The guest said this. A disk that is full costs these words, never the guest."""
        if self._shown:
            with contextlib.suppress(OSError):
                os.write(self._fd, data)

    def close(self) -> None:
        os.close(self._fd)
