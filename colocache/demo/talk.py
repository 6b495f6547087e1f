# SPDX-License-Identifier: Apache-2.0
"""A client of the demo's guest: it says a number, waits for the answer, and says the next, over the kill."""

from __future__ import annotations

import contextlib
import fcntl
import re
import select
import socket
import struct
import termios
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from colocache import scratch
from colocache.demo.tally import summary_of

PACE_SECONDS = 0.01  # between an answer and the next number
CONNECT_SECONDS = 1.0  # for one try
RETRY_SECONDS = 0.02
SLICE_SECONDS = 0.05
LOOK_SECONDS = 0.002
LINE_BYTES_MAX = 4096
SHOWN_BYTES_MAX = 200  # of a line of the console
SHOWN_LINES_MAX = 1000  # that wait to be shown


@dataclass
class Answers:
    """What came, and when; times are CLOCK_MONOTONIC in ns."""

    came: list[tuple[int, float]] = field(default_factory=list)  # when, and ms since it was asked
    wrong: int = 0
    told_again: int = 0  # the same answer once more: from a front that could not know that it was out
    asked_again: int = 0  # by a client whose connection had ended before its words were on their way
    asked_ns: int = 0  # when what has no answer yet was asked; 0: nothing
    error: str = ""  # why there is no more talking

    def report(self, in_step_ns: int, killed_ns: int, promoted_ns: int) -> dict[str, Any]:
        """The field `client` of `demo --json`. Latencies are of what was answered while the pair was in step, and of
        what was asked when the secondary's machine ran alone."""
        gaps = [(after - before) / 1e6 for (before, _), (after, _) in pairwise(self.came)]
        pair = [ms for when, ms in self.came if in_step_ns < when - ms * 1e6 and when <= killed_ns]
        alone = [ms for when, ms in self.came if when - ms * 1e6 > promoted_ns]
        return {
            "replies": len(self.came),
            "after_takeover": sum(when > promoted_ns for when, _ in self.came),
            "wrong": self.wrong,
            "missing": int(0 < self.asked_ns < promoted_ns),
            "told_again": self.told_again,
            "asked_again": self.asked_again,
            "longest_gap_ms": round(max(gaps, default=0.0), 3),
            "latency_ms": summary_of(pair),
            "latency_alone_ms": summary_of(alone),
            "error": self.error,
        }


class Client(ABC):
    """Context manager: a thread that talks until the end."""

    over = ""  # what it talks over

    def __init__(self) -> None:
        self.answers = Answers()
        self._number = 0
        self._listens = True  # the guest does
        self._on_its_way = False  # what was said last
        self._rest = b""  # of a line whose end has not come
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-client", daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(5.0)

    @abstractmethod
    def _connect(self) -> socket.socket:
        """OSError: not now."""

    @abstractmethod
    def _line(self, line: bytes) -> None:
        """A whole line came."""

    def _run(self) -> None:
        while not self._ended.is_set() and not self.answers.error:
            try:
                connection = self._connect()
            except OSError:
                self._ended.wait(RETRY_SECONDS)
                continue
            with connection:
                try:
                    self._talk(connection)
                except OSError as error:
                    self._broke(error)

    @abstractmethod
    def _broke(self, error: OSError) -> None:
        """The connection ended."""

    def _talk(self, connection: socket.socket) -> None:
        next_at = 0.0
        if self.answers.asked_ns and not self._on_its_way:
            self.answers.asked_again += 1
            self._ask(connection)
        while not self._ended.is_set():
            if not self.answers.asked_ns and time.monotonic() >= next_at and self._listens:
                self._number += 1
                self.answers.asked_ns = time.monotonic_ns()
                self._ask(connection)
            self._on_its_way = self._on_its_way or self._has_left(connection)
            waits = bool(self.answers.asked_ns) and self._on_its_way
            if not select.select([connection], [], [], SLICE_SECONDS if waits else LOOK_SECONDS)[0]:
                continue
            data = connection.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the guest's end closed the connection")
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[-LINE_BYTES_MAX:]
            for line in lines:
                self._line(line.rstrip(b"\r"))
                next_at = time.monotonic() + PACE_SECONDS

    def _ask(self, connection: socket.socket) -> None:
        self._on_its_way = False
        connection.sendall(b"%d\n" % self._number)

    def _has_left(self, connection: socket.socket) -> bool:  # noqa: ARG002 -- a subclass may know
        """Whether what was said is surely on its way."""
        return True

    def _answered(self) -> None:
        now = time.monotonic_ns()
        self.answers.came.append((now, (now - self.answers.asked_ns) / 1e6))
        self.answers.asked_ns = 0


class ConsoleClient(Client):
    """At the console of the small QEMU guest, which tells each line again with its number: ">K LINE", K in hexadecimal.

    A console's connection ends with its host: the client comes back. What had left its socket is on its way, and what
    had not it says again. It stands in for console.ConsoleTail.
    """

    over = "console"
    is_file = False
    ANSWER = re.compile(rb">([0-9a-f]{1,16}) ([0-9]{1,18})$")

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(scratch.folder("console")) / "console"
        self.path = f"unix:{self._socket}"
        self._listens = False  # until it has said something: what is typed before is lost
        self._told: dict[int, int] = {}  # the guest's numbers, and what it told
        self._show: list[str] = []

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(CONNECT_SECONDS)
            made.connect(str(self._socket))
        except BaseException:
            made.close()
            raise
        return made

    def _line(self, line: bytes) -> None:
        found = self.ANSWER.search(line)
        if found is None:
            text = "".join(char for char in line.decode(errors="replace") if char.isprintable()).strip()
            self._listens = True
            if text:
                self._show = [*self._show, text[:SHOWN_BYTES_MAX]][-SHOWN_LINES_MAX:]
            return
        order, number = int(found[1], 16), int(found[2])
        if self._told.get(order) == number:
            self.answers.told_again += 1
        elif order in self._told or order != len(self._told):
            self.answers.wrong += 1
        else:
            self._told[order] = number
            if self.answers.asked_ns and number == self._number:
                self._answered()
            elif not self.answers.asked_again:
                self.answers.wrong += 1  # nobody asked, or it was answered before

    def _has_left(self, connection: socket.socket) -> bool:
        """It was taken from the socket, by somebody who is there still: at an end it is emptied."""
        waits = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
        poll = select.poll()
        poll.register(connection, 0)
        return not waits and not poll.poll(0)

    def _broke(self, error: OSError) -> None:
        """It comes back."""

    # ---- console.ConsoleTail ----

    def lines(self) -> Iterator[str]:
        """Those that came since, but answers."""
        show, self._show = self._show, []
        yield from show

    def whole(self) -> bytes:
        """Nothing that could be checked besides."""
        return b""

    def n_bytes(self) -> int:
        """Likewise."""
        return 0


class TcpClient(Client):
    """Of a server in the guest that answers each line with one that ends in it. Its connection outlives the kill."""

    over = "tcp"

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._address = host, port

    def _connect(self) -> socket.socket:
        made = socket.create_connection(self._address, timeout=CONNECT_SECONDS)
        made.settimeout(None)
        return made

    def _broke(self, error: OSError) -> None:
        if not self._ended.is_set() and self.answers.came:  # before its server runs a guest may refuse
            self.answers.error = str(error)
        self.answers.asked_ns = 0
        self._rest = b""
        self._ended.wait(RETRY_SECONDS)

    def _line(self, line: bytes) -> None:
        if self.answers.asked_ns and line.split()[-1:] == [b"%d" % self._number]:
            self._answered()
        else:
            self.answers.wrong += 1
