# SPDX-License-Identifier: Apache-2.0
"""The guest's console during a demo: a file that both sides add to, read as it grows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from colocache import scratch

READ_BYTES_MAX = 1 << 16  # at a time
LINE_BYTES_MAX = 200  # shown of one


class ConsoleTail:
    """Context manager. `path` is for --console of both sides: the user's file or socket, or a file without a future;
    lines() are those that came since, of a file."""

    def __init__(self, path: str) -> None:
        self._stack = contextlib.ExitStack()
        if path in ("", "-"):
            path = str(self._stack.enter_context(scratch.folder("console")) / "console")
        self.path = path
        self.is_file = not path.startswith("unix:")
        self._at = self._start = 0
        # What is there already was said by another guest.
        with contextlib.suppress(FileNotFoundError):
            self._at = self._start = os.stat(path).st_size  # noqa: PTH116

    def lines(self) -> Iterator[str]:
        """Whole lines that were added since the last call."""
        if not self.is_file:
            return
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123
                file.seek(self._at)
                data = file.read(READ_BYTES_MAX)
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        if not end and len(data) == READ_BYTES_MAX:
            end = len(data)  # a line without an end
        self._at += end
        for line in data[:end].splitlines():
            text = "".join(char for char in line.decode(errors="replace") if char.isprintable()).strip()
            if text:
                yield text[:LINE_BYTES_MAX]

    def n_bytes(self) -> int:
        """How much this demo's guest has said."""
        try:
            return os.stat(self.path).st_size - self._start  # noqa: PTH116
        except FileNotFoundError:
            return 0

    def whole(self) -> bytes:
        """All that this demo's guest said."""
        try:
            with open(self.path, "rb") as file:  # noqa: PTH123
                file.seek(self._start)
                return file.read()
        except FileNotFoundError:
            return b""

    def __enter__(self) -> ConsoleTail:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
