# SPDX-License-Identifier: Apache-2.0
"""Events of a QEMU on their way from the thread that reads them to whoever waits for one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from colocache.vmm.qemu.qmp import Event

KEPT = 256  # events nobody waited for; older ones are forgotten
DEATH = "COLOCACHE_DEATH"  # not QEMU's: its process has ended
ENDED = {  # after which the guest does not run any more, and why
    DEATH: "QEMU has ended",
    "GUEST_PANICKED": "the guest panicked",
    "BLOCK_IO_ERROR": "a disk of the guest reports an error",
}


class Mailbox:
    """The newest events. Each is also given to on_event, in the thread that put it."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._changed = threading.Condition()
        self._events: deque[Event] = deque(maxlen=KEPT)

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        self._on_event(event)

    def wait(self, wanted: Callable[[Event], bool], timeout: float) -> Event | None:
        """Take the first event that is wanted, or the process's death; None after `timeout` seconds."""

        def found() -> Event | None:
            return next((event for event in self._events if event["event"] == DEATH or wanted(event)), None)

        with self._changed:
            event = self._changed.wait_for(found, timeout)
            if event is not None and event["event"] != DEATH:
                self._events.remove(event)
            return event
