# SPDX-License-Identifier: Apache-2.0
"""What a side reports while it works: one JSON object per line for programs, or one sentence per line for people."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from colocache.replication.lines import Lines

CLOSE_SECONDS = 2.0  # that a side which ends gives a slow reader


class Events:
    """Reports of one process. With `machine_readable` each event is a JSON line on stdout, with `event`, `side` and
    `t` (CLOCK_MONOTONIC in ns, the same for all processes of a host); otherwise its sentence goes to stderr.

    Safe from any thread, and a process killed at any moment leaves whole lines in a pipe (up to PIPE_BUF bytes, 4096).
    A reader that stops reading, or goes away, holds up nobody: events are then lost, and the event `unread` says how
    many as soon as somebody reads again.
    """

    def __init__(self, side: str, *, machine_readable: bool, quiet: bool = False, out: TextIO | None = None) -> None:
        self.side = side
        self._machine_readable = machine_readable
        self._quiet = quiet
        self._lines = Lines(out if out is not None else (sys.stdout if machine_readable else sys.stderr), self._unread)

    def emit(self, event: str, sentence: str = "", /, **fields: Any) -> None:
        """Report `event` with its fields; `sentence` is the same for people, empty if they need not hear of it."""
        line = self._line(event, sentence, fields)
        if line is not None:
            self._lines.put(line)

    def report(self, fields: dict[str, Any]) -> None:
        """The summary of --json on stdout, after the events that were said there before it."""
        lines = self._lines if self._machine_readable else Lines(sys.stdout, self._unread)
        lines.put(json.dumps(fields))
        if lines is not self._lines:
            lines.close(CLOSE_SECONDS)

    def close(self) -> None:
        """Give a slow reader a moment to take what was said last; then nothing more is said."""
        self._lines.close(CLOSE_SECONDS)

    def _line(self, event: str, sentence: str, fields: dict[str, Any]) -> str | None:
        said = {"sentence": sentence} if sentence else {}
        if self._machine_readable:
            return json.dumps({"event": event, "side": self.side, "t": time.monotonic_ns(), **fields, **said})
        return f"{self.side}: {sentence}" if sentence and not self._quiet else None

    def _unread(self, n_lost: int) -> str:
        sentence = f"{n_lost} events were lost: whoever reads them had stopped"
        return self._line("unread", sentence, {"lost": n_lost}) or ""
