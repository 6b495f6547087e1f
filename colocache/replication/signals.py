# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP as a flag that loops look at, so that no exception flies through a half-done clean-up.

A second Ctrl-C raises KeyboardInterrupt: whoever presses twice does not want to wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn


class Flag:
    """Looked at, never waited for. Set and cleared by one store each, from any thread and any signal handler."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set


class Wakeup(threading.Event):
    """An event that a signal handler may set.

    threading.Event holds a lock while it is set, cleared and looked at before a wait. A handler runs in the main thread
    between any two steps of it, also those under that lock, and would wait there for its own thread for ever. Here is
    no lock: a store, and an eventfd that wakes whoever waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._set = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._fd)

    def set(self) -> None:
        """Any thread, any signal handler."""
        self._set = True
        with contextlib.suppress(BlockingIOError):  # so often that it is full: then it wakes already
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Any thread, any signal handler. One that sets it meanwhile is not forgotten."""
        self._set = False
        self._drain()

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """False only when `timeout` seconds (None: no limit) are over."""
        until = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while not self._set:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return self._set
            if poll.poll(None if left is None else left * 1000) and not self._set:
                self._drain()  # what a set wrote whose flag was cleared before
        return True

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        if self._set:  # it was set meanwhile, and that may be what was read: others wait for it
            self.set()


class Stop(Wakeup):
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
            # Ignored since before we began (a shell's background job, nohup): whoever did so wants us to go on.
            if signum == signal.SIGTERM or signal.getsignal(signum) is not signal.SIG_IGN:
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
