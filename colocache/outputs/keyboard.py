# SPDX-License-Identifier: Apache-2.0
"""Console input from this process's standard input, if that is a terminal or a pipe."""

from __future__ import annotations

import os
import select
import stat
import threading

from colocache.outputs.front import NoFront
from colocache.outputs.typed import TypedInput

TYPED_BYTES = 4096  # at a time
LOOK_SECONDS = 0.05  # between two looks whether there is room, or whether a terminal is ours


def _tells_keys(fd: int) -> bool:
    """A terminal, a pipe, a socket; not a file, and not /dev/null, which would be read to its end at once."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return os.isatty(fd) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class Keyboard(NoFront):
    """Reads only while this side is the one that the world sees; `fd` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd if fd >= 0 and _tells_keys(fd) else -1
        self._shown = threading.Event()
        self._typed: TypedInput | None = None
        self._stop, self._stopping = os.pipe2(os.O_CLOEXEC)
        self._thread: threading.Thread | None = None

    def show(self) -> None:
        """See Front."""
        self._shown.set()
        self._begin()

    def hear(self, typed: TypedInput | None) -> None:
        """See Front. A guest that does not hear leaves what is typed to whoever reads it next."""
        self._typed = typed
        self._begin()

    def _begin(self) -> None:
        if self._fd >= 0 and self._thread is None and self._typed is not None and self._shown.is_set():
            self._thread = threading.Thread(target=self._read, args=(self._typed,), name="colocache-keys", daemon=True)
            self._thread.start()

    def _read(self, typed: TypedInput) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLHUP)
        while not poll.poll(0):
            room = min(TYPED_BYTES, typed.room)
            if not room or not self._is_ours():
                poll.poll(LOOK_SECONDS * 1000)
                continue
            both = select.poll()
            both.register(self._stop, select.POLLHUP)
            both.register(self._fd, select.POLLIN)
            ready = dict(both.poll(LOOK_SECONDS * 1000))
            if self._stop in ready or self._fd not in ready:
                continue
            try:
                data = os.read(self._fd, room)
            except OSError:
                poll.poll(LOOK_SECONDS * 1000)
                continue
            if not data:
                return
            typed.put(data)

    def _is_ours(self) -> bool:
        """A terminal that another job has would stop us."""
        try:
            return not os.isatty(self._fd) or os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return False

    def close(self) -> None:
        """See Front."""
        os.close(self._stopping)
        if self._thread is not None:
            self._thread.join()
        os.close(self._stop)
