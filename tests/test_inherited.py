# SPDX-License-Identifier: Apache-2.0
"""Whatever state a command inherits (signals, descriptors, limits, folder, environment), it does what it promises."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_sides import RAM, Sides, wrong_pages

from colocache.children import python_command

COMMAND = shlex.join(python_command("colocache.cli", "main"))


def shell(script: str, **given: Any) -> subprocess.CompletedProcess[str]:
    """`script` in a shell; $C is the colocache command."""
    script = script.replace("$C", COMMAND)
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False, errors="replace", **given
    )


@pytest.fixture
def sides(tmp_path: Path, region_name: str) -> Iterator[Sides]:
    made = Sides(tmp_path, region_name)
    yield made
    made.close()


def test_a_killed_machine_is_restarted_by_a_keeper_that_was_born_with_sigchld_ignored(sides: Sides) -> None:
    """The kernel reaps the child then, and its end looks like a good one: no new machine, memory gone, status 0."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        secondary = sides.secondary("--reconnect-limit", "20")
    finally:
        signal.signal(signal.SIGCHLD, before)
    primary = sides.primary()
    secondary.until("checkpoint", 2)
    os.kill(secondary.child(), signal.SIGKILL)
    assert secondary.until("restarted")["restarts"] == 1
    secondary.until("checkpoint", 4)
    primary.process.send_signal(signal.SIGTERM)
    primary.end()
    assert secondary.end()[0] == 0
    assert wrong_pages(primary, secondary) == 0


def test_a_side_that_was_born_with_every_signal_blocked_hears_them(sides: Sides) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        secondary = sides.secondary()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    primary = sides.primary()
    secondary.until("checkpoint", 2)
    secondary.process.send_signal(signal.SIGTERM)
    assert secondary.end()[0] == -signal.SIGTERM
    primary.process.send_signal(signal.SIGTERM)
    primary.end()


def test_a_side_under_nohup_does_not_end_at_a_hangup(sides: Sides) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        secondary = sides.secondary()
    finally:
        signal.signal(signal.SIGHUP, before)
    primary = sides.primary()
    secondary.until("checkpoint", 2)
    secondary.process.send_signal(signal.SIGHUP)
    os.kill(secondary.child(), signal.SIGHUP)
    secondary.until("checkpoint", 4)
    primary.process.send_signal(signal.SIGTERM)
    primary.end()
    assert secondary.end()[0] == 0


@pytest.mark.parametrize("closed", ["<&-", "<&- 2>&-"])
def test_a_demo_with_closed_descriptors_writes_into_no_socket_or_image_that_got_their_number(closed: str) -> None:
    ran = shell(f"$C demo {shlex.join(RAM)} --checkpoints 3 --interval 0.05 --run-on 0.1 --json {closed}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["wrong_pages"] == 0


@pytest.mark.parametrize(
    ("redirected", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
@pytest.mark.parametrize("command", ["inspect", "inspect --json", "clean nix", "doctor", "--version", "--help",
                                     "teach --list", "teach --chapter union"])  # fmt: skip
def test_a_report_that_can_not_be_written_is_one_sentence(command: str, redirected: str, reason: str) -> None:
    ran = shell(f"$C {command} {redirected}")
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    if command != "clean nix":
        assert lines == [f"Error: the output can't be written: {reason}"]
    assert len(lines) == 1


@pytest.mark.parametrize("command", ["teach --chapter union", "doctor", "--help"])
def test_a_reader_that_has_seen_enough_is_no_error(command: str) -> None:
    ran = shell(f"$C {command} | true; echo ${{PIPESTATUS[0]}}")
    assert ran.stderr == ""


@pytest.mark.parametrize("locale", ["LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "PYTHONIOENCODING=ascii",
                                    "PYTHONIOENCODING=latin-1"])  # fmt: skip
@pytest.mark.parametrize("command", ["doctor", "teach --chapter union", "inspect $'\\xff\\u20ac'"])
def test_output_that_is_no_utf8_is_no_traceback(locale: str, command: str) -> None:
    ran = shell(f"{locale} $C {command}")
    assert "Traceback" not in ran.stderr
    assert "Error" not in ran.stderr or command.startswith("inspect")


def test_a_command_works_in_a_folder_that_was_removed(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    ran = shell(f"mkdir {gone}; cd {gone}; rmdir {gone}; $C demo {shlex.join(RAM)} --checkpoints 2 --interval 0.05")
    assert ran.returncode == 0, ran.stderr


def test_a_command_works_under_a_umask_that_allows_nothing(tmp_path: Path) -> None:
    ran = shell(f"umask 0777; $C demo {shlex.join(RAM)} --checkpoints 2 --interval 0.05 --json")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "command",
    [
        "doctor", "inspect", "clean", "recover nix", "teach --chapter death-idle",
        f"demo {shlex.join(RAM)} --checkpoints 2 --interval 0.05 --run-on 0.1",
    ],
)  # fmt: skip
def test_a_command_works_where_proc_is_not_mounted(command: str) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    ran = shell(f"unshare -m sh -c {shlex.quote('umount -l /proc; ' + COMMAND + ' ' + command)}")
    assert "Traceback" not in ran.stderr
    assert ran.returncode == (1 if command == "recover nix" else 0), ran.stdout + ran.stderr


@pytest.mark.parametrize("sent_after", [0.05, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("command", ["demo --ram 16M", "doctor"])
def test_ctrl_c_in_the_first_half_second_is_no_traceback(command: str, sent_after: float, tmp_path: Path) -> None:
    started = tmp_path / "started"
    code = f"open({str(started)!r}, 'w').close()\nfrom colocache.entry import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *command.split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_until(started.exists)
        try:
            process.wait(sent_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=40)
    assert "Traceback" not in out + errors
    assert process.returncode in (0, -signal.SIGINT)


def wait_until(there: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 30
    while not there() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert there()
