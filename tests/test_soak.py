# SPDX-License-Identifier: Apache-2.0
"""Real kills, the amount for CI. COLOCACHE_SOAK_KILLS and COLOCACHE_SOAK_SECONDS change it; by hand: tests/soak.py.

Short of a hang, nothing here depends on how fast the machine is: the soak ends after its kills.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import soak_disk
import soak_watch
from soak_process import BROKEN_LINE, BrokenError

from colocache.choices import MEMORY_MODES
from colocache.disks.mirrored import MirroredDisks

SOAK = Path(__file__).with_name("soak.py")
KILLS = int(os.environ.get("COLOCACHE_SOAK_KILLS", "100"))
SECONDS = float(os.environ.get("COLOCACHE_SOAK_SECONDS", "0"))
NUMBER = re.compile(r"^ *([a-z][^:]*): (\d+)$", re.MULTILINE)


def soak(*args: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """One run of the program."""
    command = [sys.executable, str(SOAK), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_no_kill_of_either_side_ever_costs_a_page(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong pages, recoveries that do not fit, takeovers that do not come and leftovers all end it with status 1; so
    does a disk that is not of memory's epoch."""
    wanted = ("--seconds", str(SECONDS)) if SECONDS else ("--kills", str(KILLS))
    disk = ("--disk",) if memory == "bounded" else ()
    ran = soak(*wanted, "--memory", memory, *disk, timeout=SECONDS + 300 + 2 * KILLS)
    with capsys.disabled():
        print("\n" + ran.stdout.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = {name: int(n) for name, n in NUMBER.findall(ran.stdout)}
    done = int(re.search(r"^(\d+) kills in", ran.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert counts["wrong pages"] == counts["leftovers"] == 0
    if not SECONDS:
        assert done == KILLS
    if done >= 200:  # so many that each kind comes: by hand
        for what in ("takeovers", "replayed", "restarted", "reconnections"):
            assert counts[what], f"{done} kills and not once: {what}"
        assert memory == "bounded" or counts["could not restart"]
    assert memory == "mirror" or not counts["could not restart"], "bounded memory always restarts"
    assert counts["pages verified"] >= 16384 * done // 2


@pytest.mark.slow
def test_nor_does_it_over_tls() -> None:
    kills = max(20, KILLS // 10)
    ran = soak("--tls", "--kills", str(kills), "--backing", "shm", timeout=300 + 2 * kills)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"\n{kills} kills in" in ran.stdout


def test_a_soak_that_is_interrupted_ends_in_order_and_leaves_nothing() -> None:
    with subprocess.Popen(
        [sys.executable, str(SOAK), "--kills", "1000", "--backing", "shm", "--guest", "process", "--pairs", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        time.sleep(1.0)
        running.send_signal(signal.SIGINT)
        out, errors = running.communicate(timeout=120)
    assert running.returncode == 0, out + errors
    assert "leftovers: 0" in out
    assert not list(Path("/dev/shm").glob(f"colocache.soak-{running.pid}-*"))


def watched(folder: Path) -> soak_watch.Watched:
    """A pair of which no process was started: its events are the test's."""
    return soak_watch.Watched("none", folder, "process", "shm", 0.02, soak_watch.Counts())


def test_an_event_that_never_comes_ends_the_soak_though_others_keep_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it was in CI: a `restarted` was lost, the pair went on for ever, and so did the wait."""
    monkeypatch.setattr(soak_watch, "LATE_SECONDS_MAX", 0.3)
    pair, over = watched(tmp_path), threading.Event()

    def keep_coming() -> None:
        while not over.wait(0.01):
            pair._inbox.put({"event": "request", "side": "primary", "t": time.monotonic_ns()})

    threading.Thread(target=keep_coming, daemon=True).start()
    give_up = threading.Timer(20.0, over.set)  # so that a wait that does not end by itself fails here
    give_up.start()
    with pytest.raises(BrokenError, match="no restarted of the secondary"):
        pair._wait("secondary", "restarted", 0)
    assert not over.is_set()
    give_up.cancel()
    over.set()


def test_a_line_that_is_no_event_ends_the_soak(tmp_path: Path) -> None:
    pair = watched(tmp_path)
    pair._inbox.put(
        {"event": BROKEN_LINE, "side": "secondary", "line": '{"event": "checkpoint"}{"event": "restarted"}'}
    )
    with pytest.raises(BrokenError, match="no event"):
        pair._wait("secondary", "restarted", 0)


def test_a_disk_of_another_moment_than_memory_is_seen() -> None:
    disk = soak_disk.Disk()
    assert soak_disk.is_of(disk.data, 0)
    copies = []
    disk.mirrored = MirroredDisks(disk.sizes)
    for steps in (5, 9):
        disk.stepped(steps)
        copies.append(bytes(disk.data))
        assert soak_disk.is_of(copies[-1], steps)
    assert not soak_disk.is_of(copies[0], 9)
    assert not soak_disk.is_of(copies[1][: soak_disk.BLOCK] + copies[0][soak_disk.BLOCK :], 9), "half of an epoch"
