# SPDX-License-Identifier: Apache-2.0
"""The keeper: when it starts a fresh process, when it does not, and that its own end is its child's."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy import Recorder

from colocache import Memory
from colocache.replication import keeper as module
from colocache.replication.child import EXIT_AGAIN, EXIT_LOAD_FAILED, ChildConfig
from colocache.replication.keeper import RESTARTS_MAX, Keeper
from colocache.replication.signals import Stop

CONFIG = ChildConfig(
    manifest="", listener_fd=-1, keeper_pid=0, guest="process", guest_options={}, options={}, arbiter="solo",
    security={}, threads=0, copy="auto", device_state_max=0, machine_readable=False, as_json=False,
)  # fmt: skip


@pytest.fixture
def listener() -> socket.socket:
    with socket.socket(socket.AF_UNIX) as made:
        yield made


def keeper_of(memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, code: str) -> Keeper:
    """A keeper whose children run `code` instead of a virtual machine."""
    monkeypatch.setattr(module, "python_command", lambda *_: [sys.executable, "-c", code])
    return Keeper(memory, listener, lambda *_: CONFIG, Recorder("secondary"), Stop())


def counting(path: Path, then: str) -> str:
    """Code that counts its runs in a file; `then` sees n, from 1."""
    return (
        "import os, signal, sys, pathlib\n"
        f"p = pathlib.Path({str(path)!r}); n = len(p.read_text()) + 1 if p.exists() else 1; p.write_text('x' * n)\n"
        f"{then}"
    )


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", f"sys.exit({EXIT_AGAIN})"])
def test_a_child_that_was_killed_or_gave_up_is_started_again(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, death: str
) -> None:
    keeper = keeper_of(memory, listener, monkeypatch, counting(tmp_path / "n", f"if n < 3: {death}"))
    assert keeper.run() == 0
    assert (tmp_path / "n").read_text() == "xxx"


@pytest.mark.parametrize("status", [0, 1, EXIT_LOAD_FAILED])
def test_a_child_that_ended_by_itself_is_not_started_again(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    keeper = keeper_of(memory, listener, monkeypatch, counting(tmp_path / "n", f"sys.exit({status})"))
    assert keeper.run() == status
    assert (tmp_path / "n").read_text() == "x"
    assert keeper.load_failed == (status == EXIT_LOAD_FAILED)


def test_a_child_that_dies_again_and_again_is_given_up(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keeper = keeper_of(memory, listener, monkeypatch, counting(tmp_path / "n", f"sys.exit({EXIT_AGAIN})"))
    assert keeper.run() == 1
    assert len((tmp_path / "n").read_text()) == RESTARTS_MAX + 1


def test_a_stopped_keeper_ends_its_child(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = counting(tmp_path / "n", "import time; time.sleep(60)")
    keeper = keeper_of(memory, listener, monkeypatch, code)

    def stop_later() -> None:
        while not (tmp_path / "n").exists():
            time.sleep(0.01)
        keeper._stop.set()

    threading.Thread(target=stop_later, daemon=True).start()
    begin = time.monotonic()
    assert keeper.run() == -signal.SIGTERM
    assert time.monotonic() - begin < 30


def test_an_operators_word_is_not_lost_on_a_child_that_has_no_handlers_yet(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import signal, sys, time\n"
        "from colocache.replication.signals import stop_on_signals\n"
        f"open({str(tmp_path / 'born')!r}, 'w').close(); time.sleep(0.3)\n"
        "with stop_on_signals({signal.SIGUSR2: lambda: sys.exit(0)}): time.sleep(30)\n"
        "sys.exit(1)"
    )
    keeper = keeper_of(memory, listener, monkeypatch, code)

    def operator() -> None:
        while not (tmp_path / "born").exists():
            time.sleep(0.01)
        keeper.pass_on(signal.SIGUSR2)

    thread = threading.Thread(target=operator)
    thread.start()
    assert keeper.run() == 0
    thread.join()


def test_an_operators_word_that_comes_between_two_children_is_heard_by_the_next(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    then = (
        "n == 1 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "import time\n"
        "from colocache.replication.signals import stop_on_signals\n"
        "with stop_on_signals({signal.SIGUSR2: lambda: sys.exit(0)}): time.sleep(5)\n"
        "sys.exit(1)"
    )
    keeper = keeper_of(memory, listener, monkeypatch, counting(tmp_path / "n", then))
    keeper._events.on_event = lambda event, _: keeper.pass_on(signal.SIGUSR2) if event == "restarted" else None
    assert keeper.run() == 0
    assert (tmp_path / "n").read_text() == "xx"


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_for_a_machine_that_is_ending_does_not_make_it_look_killed(signum: signal.Signals) -> None:
    """Its keeper would start it again, beside a primary that was told that it is alone."""
    config = dataclasses.replace(CONFIG, keeper_pid=os.getpid(), options={"timing": {}})
    code = (
        "import atexit, os\n"
        "from colocache.replication.child import main\n"
        f"atexit.register(os.kill, os.getpid(), {int(signum)})\n"
        "main()"
    )
    with config.as_file() as stdin:
        ended = subprocess.run([sys.executable, "-c", code], stdin=stdin, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "not a manifest" in ended.stderr


def test_no_new_child_starts_before_what_the_old_one_left_is_dead(
    memory: Memory, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A QEMU is a process of its own: two machines must never run on the same memory."""
    left = tmp_path / "left"
    code = counting(
        tmp_path / "n",
        "import subprocess, time\n"
        f"left = pathlib.Path({str(left)!r})\n"
        "if n == 1:\n"
        "    orphan = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "    left.write_text(str(orphan.pid)); os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(3 if os.path.exists('/proc/' + left.read_text()) else 0)\n",
    )
    assert keeper_of(memory, listener, monkeypatch, code).run() == 0
    assert (tmp_path / "n").read_text() == "xx"
