# SPDX-License-Identifier: Apache-2.0
"""One of the demo's two sides, a process of its own: its events as they come, its last words, its end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from typing import Any

from colocache.children import python_command

END_SECONDS = 20.0  # for a process that was told to end


class Side:
    """One of the two processes; its events go into a queue, its last words are kept."""

    def __init__(
        self, name: str, args: list[str], events: queue.SimpleQueue[dict[str, Any]], cores: frozenset[int] = frozenset()
    ) -> None:
        """`cores`: all that it starts runs on these; none given: on any."""
        self.name = name
        self.ended = threading.Event()
        self._events = events
        self._said: list[str] = []
        own = ("--own-cores", ",".join(map(str, sorted(cores)))) if cores else ()
        command = python_command("colocache.cli", "main", name, "--die-with-parent", str(os.getpid()), *own, *args)
        # A session of its own: Ctrl-C reaches the demo alone, which then ends both in order.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=target, name=f"demo-{name}", daemon=True)
            for target in (self._read_events, self._read_words)
        ]
        for thread in self._threads:
            thread.start()

    def _read_events(self) -> None:
        assert self.process.stdout is not None  # noqa: S101 -- for mypy: it is a pipe
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    if event["event"] in ("error", "end"):
                        self._said = [*self._said, str(event.get("sentence", ""))][-20:]
                    self._events.put(event)
        self.ended.set()

    def _read_words(self) -> None:
        assert self.process.stderr is not None  # noqa: S101
        for line in self.process.stderr:
            self._said = [*self._said, line.rstrip()][-20:]

    def last_words(self) -> str:
        """Its last error, or what it said on stderr last, for a sentence about its failure."""
        for thread in self._threads:
            thread.join(1.0)
        last = next((line for line in reversed(self._said) if line.strip()), "it said nothing")
        return last.removeprefix("Error: ")

    def wait(self, timeout: float) -> int:
        """Its exit status; it is killed if it does not end in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        """End it, in order if it lets us, and forget its pipes."""
        if self.process.poll() is None:
            self.process.terminate()
            self.wait(END_SECONDS)
        for thread in self._threads:
            thread.join(5.0)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
