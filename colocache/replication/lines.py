# SPDX-License-Identifier: Apache-2.0
"""Lines to a reader that may stop reading, or go away: saying something never waits for whoever shall hear it.

A line is written at once if there is room for it, by the thread that says it and by one write(2), so that whoever is
killed afterwards has said it, and no other process that writes to the same pipe gets into the middle of it. Where there
is no room it waits in a backlog, which a thread writes as the reader goes on. When the backlog is full, lines are lost;
how many is said as soon as there is room again.

Room can be asked for only on an open file description of our own: O_NONBLOCK on the one that was inherited would change
it for every process that has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TextIO

BACKLOG_BYTES_MAX = 256 << 10


class Lines:
    """`put` from any thread. `lost_line` makes the line that says how many were lost."""

    def __init__(self, out: TextIO | None, lost_line: Callable[[int], str]) -> None:
        self._out = out
        self._lost_line = lost_line
        self._lock = threading.Condition()
        self._backlog: deque[bytes] = deque()  # its first may be the rest of a line that was written in part
        self._n_bytes = 0
        self._lost = 0
        self._draining = False
        self._gone = out is None  # started without this output, or its reader went away
        self._write: Callable[[bytes], int] | None = None
        self._fd = -1
        if out is not None:
            with contextlib.suppress(OSError, ValueError):
                out.flush()
                self._fd = os.dup(out.fileno())
                weakref.finalize(self, os.close, self._fd).atexit = False
                self._write = self._without_waiting(self._fd)

    def _without_waiting(self, fd: int) -> Callable[[bytes], int] | None:
        """A write that raises BlockingIOError where there is no room; None if there is no such way to this file."""
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            sock = socket.socket(fileno=os.dup(fd))
            weakref.finalize(self, sock.close).atexit = False
            return lambda data: sock.send(data, socket.MSG_DONTWAIT)
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            return lambda data: os.write(fd, data)  # a file on a disk has no reader to wait for
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            packets = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
            if packets and stat.S_ISFIFO(mode):
                fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | packets)
        except OSError:  # no /proc, or a pipe of another user: the thread writes, and waits, instead
            return None
        os.dup2(own, fd, inheritable=False)
        os.close(own)
        return lambda data: os.write(fd, data)

    def put(self, line: str) -> None:
        """Say it, or keep it for later, or count it as lost. Never waits for the reader."""
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        data = (line + "\n").encode(encoding, "backslashreplace")
        with self._lock:
            if self._gone:
                return
            if self._fd < 0:  # no file behind it: a buffer in memory
                assert self._out is not None  # noqa: S101 -- for mypy: it would be gone
                try:
                    self._out.write(line + "\n")
                except (OSError, ValueError):
                    self._gone = True
                return
            if self._write is not None and not self._backlog:
                data = self._try(data)
            if data:
                self._keep(data)

    def _try(self, data: bytes) -> bytes:
        """Write what there is room for; the rest, or nothing if the reader went away. Under the lock."""
        assert self._write is not None  # noqa: S101 -- for mypy
        try:
            return data[self._write(data) :]
        except BlockingIOError:
            return data
        except OSError:
            self._leave()
            return b""

    def _leave(self) -> None:
        """The reader is gone, which is no reason to stop a virtual machine. Under the lock."""
        self._gone = True
        self._backlog.clear()
        self._n_bytes = 0
        self._lock.notify_all()

    def _keep(self, data: bytes) -> None:
        if self._n_bytes + len(data) > BACKLOG_BYTES_MAX:
            self._lost += 1
            return
        self._backlog.append(data)
        self._n_bytes += len(data)
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, name="colocache-lines", daemon=True).start()

    def _drain(self) -> None:
        while True:
            if self._write is None:
                self._write_and_wait()
            else:
                select_out(self._fd)
            with self._lock:
                while self._write is not None and self._backlog and self._backlog[0]:
                    first = self._backlog[0]
                    rest = self._try(first)
                    if self._gone:
                        break
                    self._n_bytes -= len(first) - len(rest)
                    self._backlog[0] = rest
                    if rest:
                        break
                    self._backlog.popleft()
                if not self._backlog and self._lost and not self._gone:
                    said = (self._lost_line(self._lost) + "\n").encode("ascii", "backslashreplace")
                    self._lost = 0
                    self._backlog.append(said)
                    self._n_bytes += len(said)
                if not self._backlog:
                    self._draining = False
                    self._lock.notify_all()
                    return

    def _write_and_wait(self) -> None:
        """The first of the backlog, by a write that may wait as long as it likes: only this thread does it."""
        with self._lock:
            first = self._backlog[0] if self._backlog else b""
        try:
            n_written = os.write(self._fd, first)
        except OSError:
            with self._lock:
                self._leave()
            return
        with self._lock:
            self._n_bytes -= n_written
            if n_written == len(first):
                self._backlog.popleft()
            else:
                self._backlog[0] = first[n_written:]

    def close(self, seconds: float) -> int:
        """Wait at most so long for the reader; how many lines it will never see. No line may be put afterwards."""
        until = time.monotonic() + seconds
        with self._lock:
            while self._backlog and not self._gone and (left := until - time.monotonic()) > 0:
                self._lock.wait(left)
            never = len(self._backlog) + self._lost
            self._gone = True
        return never


def select_out(fd: int) -> None:
    """Wait until there may be room, or the reader is gone."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()
