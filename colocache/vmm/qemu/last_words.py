# SPDX-License-Identifier: Apache-2.0
"""What a program says before it ends, and how it ended, for a sentence."""

from __future__ import annotations

import signal

KEPT = 4096  # bytes of what it wrote last


class LastWords:
    """Of one process. add() in the thread that reads it."""

    def __init__(self) -> None:
        self._said = b""

    def add(self, data: bytes) -> None:
        self._said = (self._said + data)[-KEPT:]

    def of(self, status: int | None) -> str:
        """How it ended, `status` being what Popen says, and its complaint."""
        how = f"exit status {status}"
        if status is None:
            how = "it still runs"
        elif status < 0:
            how = f"killed by {signal.Signals(-status).name}"
        lines = self._said.decode(errors="replace").strip().splitlines()
        # QEMU's complaint begins with its name; what follows may be advice.
        last = next((line for line in reversed(lines) if line.startswith("qemu")), lines[-1] if lines else "")
        return f"{how}: {last}" if last else how
