# SPDX-License-Identifier: Apache-2.0
"""What a side reports while it works: one JSON object per line for programs, or one sentence per line for people."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, TextIO


class Events:
    """Reports of one process. With `machine_readable` each event is a JSON line on stdout, with `event`, `side` and
    `t` (CLOCK_MONOTONIC in ns, the same for all processes of a host); otherwise its sentence goes to stderr.

    Safe from any thread, and a process killed at any moment leaves whole lines in a pipe (up to PIPE_BUF bytes, 4096).
    A reader that went away is no reason to stop a virtual machine: events are then dropped.
    """

    def __init__(self, side: str, *, machine_readable: bool, quiet: bool = False, out: TextIO | None = None) -> None:
        self.side = side
        self._machine_readable = machine_readable
        self._quiet = quiet
        self._out = out if out is not None else (sys.stdout if machine_readable else sys.stderr)
        self._lock = threading.Lock()
        self._gone = self._out is None  # started without a stdout

    def emit(self, event: str, sentence: str = "", /, **fields: Any) -> None:
        """Report `event` with its fields; `sentence` is the same for people, empty if they need not hear of it."""
        said = {"sentence": sentence} if sentence else {}
        if self._machine_readable:
            line = json.dumps({"event": event, "side": self.side, "t": time.monotonic_ns(), **fields, **said})
        elif sentence and not self._quiet:
            line = f"{self.side}: {sentence}"
        else:
            return
        with self._lock:
            if self._gone:
                return
            try:
                # One write for line and end, as print() does not do on an unbuffered stream: the keeper writes to the
                # same pipe, and what it says of a child killed in between would end up in the middle of a line.
                self._out.write(line + "\n")
                self._out.flush()
            except (OSError, ValueError):
                self._gone = True
