# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP as a flag that loops look at, so that no exception flies through a half-done clean-up.

A second Ctrl-C raises KeyboardInterrupt: whoever presses twice does not want to wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG = 1


class Stop(threading.Event):
    """Set by SIGINT, SIGTERM or SIGHUP; `signum` says by which, 0 = none."""

    def __init__(self) -> None:
        super().__init__()
        self.signum = 0


@contextlib.contextmanager
def stop_on_signals(actions: dict[int, Callable[[], object]] | None = None) -> Iterator[Stop]:
    """A Stop that the signals set, and further signals with what they do. Main thread only; undone at the end."""
    stop = Stop()

    def on_stop(signum: int, _frame: FrameType | None) -> None:
        if stop.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signum = signum
        stop.set()

    def on_action(signum: int, _frame: FrameType | None) -> None:
        (actions or {})[signum]()

    before = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[signum] = signal.signal(signum, on_stop)
        for number in actions or {}:
            before[signal.Signals(number)] = signal.signal(number, on_action)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(actions or {}))  # those that a keeper had us born with
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_as_by(signum: int) -> NoReturn:
    """End this process the way the signal would have, so that a shell or a script sees the usual status."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # only if somebody blocks the signal


def die_with_parent(parent_pid: int, signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent dies. `parent_pid`: who that must be."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before we asked
        os.kill(os.getpid(), signum)
