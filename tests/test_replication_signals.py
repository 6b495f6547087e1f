# SPDX-License-Identifier: Apache-2.0
"""Signals by the thousand while the main thread waits on, sets and clears what their handlers set: nothing hangs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from colocache.replication.signals import Stop, Wakeup

STRESS = """
import signal, sys, time
from colocache.replication.primary import Primary
from colocache.replication.signals import Flag, Wakeup, stop_on_signals

wakeup, counted = Wakeup(), 0
primary = Primary.__new__(Primary)
primary._checkpoint_wanted = Flag()

def on_wakeup():
    global counted
    counted += 1
    wakeup.set()

actions = {signal.SIGUSR1: primary.request_checkpoint, signal.SIGUSR2: on_wakeup}
with stop_on_signals(actions) as stop:
    print("ready", flush=True)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        stop.wait(0)
        stop.set()
        wakeup.wait(0)
        wakeup.set()
        wakeup.clear()
        primary._checkpoint_wanted.is_set()
        primary._checkpoint_wanted.clear()
        primary.request_checkpoint()
    print("alive", flush=True)
    sys.stdin.read()  # no signal after the handlers are gone
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_without_end_stop_nobody_for_ever(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STRESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            until, sent = time.monotonic() + 5, 0
            while not select.select([process.stdout], [], [], 0)[0] and time.monotonic() < until:
                process.send_signal(number)
                sent += 1
                time.sleep(0.0001)
            assert select.select([process.stdout], [], [], 0)[0], f"it hangs after {sent} signals"
            assert process.stdout.readline() == "alive\n"
            process.stdin.close()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_stop_wakes_every_thread_that_waits_for_it() -> None:
    stop, woken = Stop(), []
    threads = [threading.Thread(target=lambda: woken.append(stop.wait(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert not stop.wait(0.05)
    begin = time.monotonic()
    stop.set()
    for thread in threads:
        thread.join(10)
    assert woken == [True] * 4
    assert time.monotonic() - begin < 5
    assert stop.wait()


def test_a_wakeup_that_comes_after_it_was_cleared_wakes_again() -> None:
    wakeup = Wakeup()
    for _ in range(3):
        wakeup.set()
        wakeup.set()
        assert wakeup.wait(0)
        wakeup.clear()
        assert not wakeup.wait(0)
    n_before = len(list(Path("/proc/self/fd").iterdir()))
    del wakeup
    assert len(list(Path("/proc/self/fd").iterdir())) == n_before - 1


def test_a_wakeup_that_was_cleared_before_it_was_written_wakes_nobody() -> None:
    """A handler stores the flag, is interrupted, and writes the descriptor when another thread has cleared both."""
    wakeup = Wakeup()
    os.eventfd_write(wakeup._fd, 1)
    assert not wakeup.wait(0.05)
    os.eventfd_write(wakeup._fd, 1)
    later = threading.Timer(0.1, wakeup.set)
    later.start()
    assert wakeup.wait()
    later.join()
