# SPDX-License-Identifier: Apache-2.0
"""A QEMU pair over a real connection: whoever dies, a process or a QEMU, the other side goes on with no wrong page."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import linux_guest
import pytest
from cli_sides import Process, Sides, wrong_pages
from qemu_support import needs_qemu, wait_until

pytestmark = needs_qemu
GUEST = ("--guest", "qemu", "--accel", "tcg", "--ram", "24M", "--backing", "shm", "--steps-per-second", "3000")
CHECKPOINTS = 3  # before anything happens


@pytest.fixture
def sides(tmp_path: Path, region_name: str) -> Iterator[Sides]:
    made = Sides(tmp_path, region_name)
    yield made
    made.close()


def paired(sides: Sides, *more: str) -> tuple[Process, Process]:
    """Secondary and primary after some checkpoints."""
    secondary = sides.secondary(*GUEST, "--run-on", "0.5", "--reconnect-limit", "8", *more)
    primary = sides.primary(*GUEST, "--interval", "0.2", "--reconnect-limit", "20", "--run-on", "0.5")
    secondary.until("checkpoint", CHECKPOINTS, timeout=90)
    return secondary, primary


def qemus_of(pid: int) -> list[int]:
    """QEMUs that are children of this process, oldest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"qemu-system" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return sorted(found)


def test_a_killed_primary_process_takes_its_qemu_with_it_and_the_secondary_goes_on(sides: Sides) -> None:
    secondary, primary = paired(sides)
    qemus = qemus_of(primary.process.pid)
    assert len(qemus) == 1
    primary.process.kill()
    wait_until(lambda: not Path(f"/proc/{qemus[0]}").exists())
    assert secondary.until("ran_on", timeout=60)["steps"] > 0
    assert secondary.end()[0] == 0
    assert wrong_pages(secondary) == 0


def test_a_killed_qemu_of_the_primary_is_told_and_the_secondary_takes_over(sides: Sides) -> None:
    secondary, primary = paired(sides)
    os.kill(qemus_of(primary.process.pid)[0], signal.SIGKILL)
    status, errors = primary.end(60)
    assert status != 0
    assert "QEMU" in errors
    assert "Traceback" not in errors
    assert secondary.until("ran_on", timeout=60)["steps"] > 0
    assert secondary.end()[0] == 0
    assert wrong_pages(secondary) == 0


def test_a_killed_qemu_of_the_secondary_costs_nothing(sides: Sides) -> None:
    """Whichever it is: the machine's own, or the one that waits for the next checkpoint."""
    secondary, primary = paired(sides)
    child = secondary.child()
    for kill in (0, -1):
        done = len([event for event in secondary.events if event["event"] == "checkpoint"])
        os.kill(qemus_of(child)[kill], signal.SIGKILL)
        secondary.until("checkpoint", done + 4, timeout=60)
    assert secondary.child() == child  # its process went on
    primary.process.kill()
    assert secondary.until("ran_on", timeout=60)["steps"] > 0
    assert secondary.end()[0] == 0
    assert wrong_pages(secondary) == 0


def test_a_killed_secondary_process_restarts_from_the_newest_epoch_and_the_pair_goes_on(sides: Sides) -> None:
    secondary, primary = paired(sides)
    child = secondary.child()
    qemus = qemus_of(child)
    os.kill(child, signal.SIGKILL)
    secondary.until("restarted", timeout=30)
    assert not any(Path(f"/proc/{pid}").exists() for pid in qemus)
    done = len([event for event in secondary.events if event["event"] == "checkpoint"])
    secondary.until("checkpoint", done + 2, timeout=60)
    primary.process.kill()
    assert secondary.until("ran_on", timeout=60)["steps"] > 0
    assert secondary.end()[0] == 0
    assert wrong_pages(secondary) == 0


def test_a_guest_that_powers_off_ends_both_sides_after_a_last_checkpoint(sides: Sides, tmp_path: Path) -> None:
    line = ("--", *linux_guest.command(tmp_path, switch_off=True))
    console = tmp_path / "console"
    secondary = sides.secondary("--guest", "qemu", *line)
    primary = sides.primary("--guest", "qemu", "--interval", "0.5", "--console", str(console), *line)
    assert primary.end(120)[0] == 0
    assert secondary.end(30)[0] == 0
    assert b"reboot: Power down" in console.read_bytes()
    assert "powered off" in secondary.until("end")["sentence"]
    assert [len([e for e in side.events if e["event"] == "takeover"]) for side in (primary, secondary)] == [0, 0]
    assert wrong_pages(secondary) == 0
