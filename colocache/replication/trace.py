# SPDX-License-Identifier: Apache-2.0
"""`--trace FILE`: what a side was busy with, as trace events that chrome://tracing and ui.perfetto.dev open.

A checkpoint pays for a tuple in a list, and for nothing else: a thread makes text of it, a few at a time, and waits for
the disk. A reader's delay or a full disk costs events, which are counted, never time.

The file is a JSON array with one event a line. Its end may be missing, as that of a process that was killed is: the
viewers take that as it is, and `read_trace` does. Times are CLOCK_MONOTONIC: those of all processes of a host compare,
those of two hosts don't.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from colocache.errors import ArgumentError, reason_of
from colocache.replication.stages import Span, Stages

WAITING_MAX = 1 << 14  # events that wait for the thread: some hundred checkpoints
AT_ONCE = 16  # made into text before the interpreter lock is given away: 20 us
WAIT_SECONDS = 0.1
CLOSE_SECONDS = 2.0  # that a slow disk gets at the end
END = {"name": "end of the trace", "ph": "M", "pid": 0, "args": {}}  # after it no comma


def begin_trace(path: str) -> None:
    """Make the file, or empty it. ArgumentError."""
    try:
        Path(path).write_text("[\n", encoding="ascii")
    except OSError as error:
        raise ArgumentError(f"no trace can be written to {path}: {reason_of(error)}") from error


def end_trace(path: str) -> None:
    """Close the array, when nobody writes to the file any more. No error: without its end it can be opened too."""
    with contextlib.suppress(OSError), Path(path).open("ab") as file:
        file.write(_line(END)[:-2] + b"\n]\n")


def read_trace(path: str) -> list[dict[str, Any]]:
    """The events of a file, whoever was killed while writing it: all lines that are whole. ArgumentError."""
    events = []
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise ArgumentError(f"there is no trace to be read from {path}: {reason_of(error)}") from error
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line.rstrip(","))
            if isinstance(event, dict) and event != END:
                events.append(event)
    return events


def write_trace(path: str, events: Iterable[dict[str, Any]]) -> None:
    """A whole trace. ArgumentError."""
    begin_trace(path)
    try:
        with Path(path).open("a", encoding="ascii") as file:
            file.writelines(json.dumps(event) + ",\n" for event in events)
    except OSError as error:
        raise ArgumentError(f"no trace can be written to {path}: {reason_of(error)}") from error
    end_trace(path)


class Trace:
    """Of one process. Without a path it does nothing. `add` from any thread; context manager."""

    def __init__(
        self, path: str = "", side: str = "", *, failed: Callable[[str], None] = lambda _sentence: None
    ) -> None:
        """`path`: a file that `begin_trace` made, which this adds to. `failed` hears once why it can't be written."""
        self._path, self._side, self._failed = path, side, failed
        self._pid = os.getpid()
        self._waiting: deque[tuple[str, int, int, int]] = deque()
        self._lost = 0
        self._over = not path
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if path:
            self._thread = threading.Thread(target=self._run, name="colocache-trace", daemon=True)
            self._thread.start()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, begin: int, end: int, epoch: int = 0) -> None:
        """Something that took from `begin` to `end`, CLOCK_MONOTONIC in ns. Within another one it lies below it."""
        if self._over:
            return
        if len(self._waiting) >= WAITING_MAX:
            self._lost += 1
            return
        self._waiting.append((name, begin, end, epoch))

    def checkpoint(self, epoch: int, stages: Stages, *above: Span, below: Iterable[Span] = ()) -> None:
        """A checkpoint with its stages; `above` are spans of several of them, `below` parts of one."""
        if self._over:
            return
        self.add("checkpoint", stages.begin, stages.now, epoch)
        for span in (*above, *stages.spans(), *below):
            self.add(span.name, span.begin, span.end, epoch)

    def close(self) -> None:
        """Write what is there; a disk that takes nothing is not waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        self._over = True

    # ---- the thread ----

    def _run(self) -> None:
        try:
            with Path(self._path).open("ab", buffering=0) as file:
                of = {"ph": "M", "pid": self._pid, "tid": 1}
                file.write(_line({"name": "process_name", **of, "args": {"name": self._side}}))
                file.write(_line({"name": "thread_name", **of, "args": {"name": "checkpoints"}}))
                while not self._stop.wait(WAIT_SECONDS):
                    self._drain(file.write)
                self._drain(file.write)
        except OSError as error:
            self._over = True
            self._waiting.clear()
            self._failed(f"the trace ends here: {self._path} can't be written: {reason_of(error)}")

    def _drain(self, write: Callable[[bytes], Any]) -> None:
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            write("".join(map(self._event, some)).encode())  # whole lines by one write(2), without the interpreter lock
        lost, self._lost = self._lost, 0
        if lost:
            write(_line({"name": f"{lost} events lost", "ph": "M", "pid": self._pid, "args": {}}))

    def _event(self, one: tuple[str, int, int, int]) -> str:
        name, begin, end, epoch = one
        return (
            f'{{"name":"{name}","ph":"X","pid":{self._pid},"tid":1,"ts":{begin / 1e3:.3f},'
            f'"dur":{(end - begin) / 1e3:.3f},"args":{{"epoch":{epoch}}}}},\n'
        )


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b",\n"
