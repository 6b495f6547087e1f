# SPDX-License-Identifier: Apache-2.0
"""Real kills, the amount for CI. COLOCACHE_SOAK_KILLS and COLOCACHE_SOAK_SECONDS change it; by hand: tests/soak.py.

Nothing here depends on how fast the machine is: the soak ends after its kills, and takes the time that takes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")
KILLS = int(os.environ.get("COLOCACHE_SOAK_KILLS", "200"))
SECONDS = float(os.environ.get("COLOCACHE_SOAK_SECONDS", "0"))
NUMBER = re.compile(r"^ *([a-z][^:]*): (\d+)$", re.MULTILINE)


def soak(*args: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """One run of the program."""
    command = [sys.executable, str(SOAK), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


@pytest.mark.slow
def test_no_kill_of_either_side_ever_costs_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong pages, recoveries that do not fit, takeovers that do not come and leftovers all end it with status 1."""
    wanted = ("--seconds", str(SECONDS)) if SECONDS else ("--kills", str(KILLS))
    ran = soak(*wanted, timeout=SECONDS + 60 + 10 * KILLS)
    with capsys.disabled():
        print("\n" + ran.stdout.strip())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = {name: int(n) for name, n in NUMBER.findall(ran.stdout)}
    done = int(re.search(r"^(\d+) kills in", ran.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert counts["wrong pages"] == counts["leftovers"] == 0
    if not SECONDS:
        assert done == KILLS
    if done >= 200:  # so many that each kind comes
        for what in ("takeovers", "replayed", "restarted", "could not restart", "reconnections"):
            assert counts[what], f"{done} kills and not once: {what}"
    assert counts["pages verified"] >= 16384 * done // 2


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
