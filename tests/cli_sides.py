# SPDX-License-Identifier: Apache-2.0
"""`colocache primary` and `secondary` as real processes whose events a test waits for."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from colocache.children import python_command

RAM = ("--ram", "16M", "--guest", "process", "--backing", "shm")


class Process:
    """A side as a real process, with its events."""

    def __init__(self, side: str, *args: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        command = python_command("colocache.cli", "main", side, "--events", *RAM, *args)  # args may end with `-- words`
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(json.loads(line))
        self._queue.put(None)

    def until(self, event: str, count: int = 1, timeout: float = 30.0) -> dict[str, Any]:
        """The count-th event of this name."""
        deadline = time.monotonic() + timeout
        while True:
            found = [one for one in self.events if one["event"] == event]
            if len(found) >= count:
                return found[count - 1]
            try:
                one = self._queue.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                one = None
            if one is None:
                raise AssertionError(f"no {event} number {count}; there was {self.events}")
            self.events.append(one)

    def end(self, timeout: float = 30.0) -> tuple[int, str]:
        """Exit status and stderr, after it has ended by itself."""
        status = self.process.wait(timeout)
        self._reader.join(5)
        while not self._queue.empty():
            one = self._queue.get()
            if one is not None:
                self.events.append(one)
        assert self.process.stderr is not None
        return status, self.process.stderr.read()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def child(self) -> int:
        """Pid of the process that runs the secondary's machine."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            if children:
                assert len(children) == 1
                return int(children[0])
            time.sleep(0.01)  # the keeper has just begun to listen, or starts a new one
        raise AssertionError("the keeper has no child")


class Sides:
    """Starts sides that meet on one socket, and ends them."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder, name
        self._stack = contextlib.ExitStack()

    def _start(self, side: str, *args: str) -> Process:
        made = Process(side, *args)
        self._stack.callback(made.close)
        return made

    def secondary(self, *args: str) -> Process:
        made = self._start("secondary", "--listen", f"unix:{self._folder}/s", "--name", self.name, *args)
        made.until("listening")
        return made

    def primary(self, *args: str) -> Process:
        return self._start("primary", "--connect", f"unix:{self._folder}/s", "--interval", "0.05", *args)

    def close(self) -> None:
        self._stack.close()


def wrong_pages(*sides: Process) -> int:
    return sum(event.get("wrong_pages", 0) for side in sides for event in side.events)
