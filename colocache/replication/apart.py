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
from collections.abc import Iterator


def of_one_host(fd: int) -> bool:
    """Are both ends of this connected socket here?"""
    try:
        with socket.socket(fileno=os.dup(fd)) as end:
            return end.family == socket.AF_UNIX or end.getpeername()[0] == end.getsockname()[0]
    except OSError:
        return False


@contextlib.contextmanager
def apart(fd: int, side: str) -> Iterator[None]:
    """The calling thread on its side's half of the cores; nothing if the peer is elsewhere, or there is one core only.

    Threads and processes that it starts meanwhile inherit that.
    """
    cores = sorted(os.sched_getaffinity(0))
    half = cores[: len(cores) // 2] if side == "primary" else cores[len(cores) // 2 :]
    if len(cores) < 2 or not of_one_host(fd):
        yield
        return
    with contextlib.suppress(OSError):  # a container may forbid it: then they meet on a core
        os.sched_setaffinity(0, half)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
