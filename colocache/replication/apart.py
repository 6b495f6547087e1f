# SPDX-License-Identifier: Apache-2.0
"""Two sides on one host, as in the demo: their conversations on different cores, as two hosts would have them.

Left alone they share one. The kernel wakes whoever hears a message on the core of whoever sent it, which it expects to
sleep soon; in a virtual machine it does so also where another core idles, because that counts as taken by the host. The
sender has work to do, and until it sleeps the message waits: measured, 0.3 ms of a pause of 1.4 for each message.
"""

from __future__ import annotations

import contextlib
import os
import socket


def of_one_host(fd: int) -> bool:
    """Are both ends of this connected socket here?"""
    try:
        with socket.socket(fileno=os.dup(fd)) as end:
            return end.family == socket.AF_UNIX or end.getpeername()[0] == end.getsockname()[0]
    except OSError:
        return False


class Apart:
    """`with` it, the calling thread is on its side's half of the cores. Nothing if the peer is elsewhere, or where
    there is one core only. Threads and processes that it starts meanwhile inherit that."""

    def __init__(self, fd: int, side: str, *, wanted: bool = True, own_cores: bool = False) -> None:
        """`fd`: the connected socket; not `wanted`: nothing. `own_cores`: the whole process is apart from its peer."""
        self._all = sorted(os.sched_getaffinity(0))
        half = len(self._all) // 2
        self._half = self._all[:half] if side == "primary" else self._all[half:]
        one_host = of_one_host(fd)
        self._does = wanted and half > 0 and one_host and not own_cores
        # Whoever waits awake keeps none from the peer.
        self.own_core = own_cores or (half > 0 and (self._does or not one_host))

    def __enter__(self) -> None:
        if self._does:
            _run_on(self._half)

    def __exit__(self, *_: object) -> None:
        if self._does:
            _run_on(self._all)


def _run_on(cores: list[int]) -> None:
    with contextlib.suppress(OSError):  # a container may forbid it: then the two may meet on a core
        os.sched_setaffinity(0, cores)
