# SPDX-License-Identifier: Apache-2.0
"""A thread that says "I live" when nothing else was said for a while.

Each side has one, so that a side which is busy (flushing, loading, verifying) or held up by back-pressure is not taken
for dead, while one that is stopped or gone falls silent. Who listens decides what silence means: see Channel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Heartbeat:
    """Calls `beat` whenever `idle_seconds()` has reached `interval`, and `look` at least as often; until stop().

    `beat` returns False once the connection is gone; the thread then ends. It holds no lock between beats.
    """

    def __init__(
        self,
        *,
        interval: float,
        idle_seconds: Callable[[], float],
        beat: Callable[[], bool],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        if interval <= 0:
            raise ValueError(f"a heartbeat every {interval} s is no heartbeat: give a positive interval")
        self._interval = interval
        self._idle_seconds = idle_seconds
        self._beat = beat
        self._look = look
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="colocache-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait until no beat is under way."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        wait = self._interval
        while not self._stopped.wait(wait):
            self._look()
            idle = self._idle_seconds()
            if idle >= self._interval:
                if not self._beat():
                    return
                wait = self._interval
            else:
                wait = self._interval - idle
