# SPDX-License-Identifier: Apache-2.0
"""Events reach their reader whole: one line each, whoever is killed, and a reader that went away stops no machine."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_sides import RAM

import colocache
from colocache.children import python_command
from colocache.replication import lines
from colocache.replication.events import Events


@pytest.fixture(params=[True, False], ids=["unbuffered", "buffered"])
def packets(request: pytest.FixtureRequest) -> Iterator[tuple[int, io.TextIOWrapper]]:
    """A pipe whose reader gets each write() of the writer by itself (pipe(2), O_DIRECT), as a stdout of Python's."""
    read, write = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    raw = io.FileIO(write, "w")
    out = io.TextIOWrapper(raw if request.param else io.BufferedWriter(raw), write_through=request.param)
    yield read, out
    os.close(read)
    out.close()


def test_a_process_killed_while_it_reports_leaves_no_line_without_its_end(
    packets: tuple[int, io.TextIOWrapper],
) -> None:
    """The keeper writes to the same pipe: half a line would swallow what it says of the death."""
    read, out = packets
    events = Events("secondary", machine_readable=True, out=out)
    for epoch in (1, 2):
        events.emit("checkpoint", f"epoch {epoch}: flushed", epoch=epoch)
        packet = os.read(read, 1 << 16)
        assert packet.endswith(b"\n")
        assert json.loads(packet)["epoch"] == epoch


def test_a_sentence_for_people_is_one_write_too(packets: tuple[int, io.TextIOWrapper]) -> None:
    read, out = packets
    Events("primary", machine_readable=False, out=out).emit("start", "guest kvm")
    assert os.read(read, 1 << 16) == b"primary: guest kvm\n"


def test_a_reader_that_went_away_stops_nobody() -> None:
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(io.FileIO(write, "w"), write_through=True) as out:
        with pytest.raises(BrokenPipeError):  # what Events meets, and keeps to itself
            out.write("a line")
        events = Events("secondary", machine_readable=True, out=out)
        events.emit("checkpoint")
        events.emit("checkpoint")


def test_a_process_without_a_stdout_reports_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with `>&-`, Python's sys.stdout is None."""
    monkeypatch.setattr("sys.stdout", None)
    Events("secondary", machine_readable=True).emit("checkpoint")


# ---- a reader that stops reading ----


def pipe() -> tuple[int, int]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    return read, write


def sockets() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    return ours, theirs


def read_all(fd: int) -> bytes:
    """What comes until its writers are gone, or nothing came for half a second."""
    os.set_blocking(fd, False)
    got, until = b"", time.monotonic() + 20
    quiet = time.monotonic() + 0.5
    while time.monotonic() < min(quiet, until):
        try:
            came = os.read(fd, 1 << 20)
            if not came:
                break
            got += came
            quiet = time.monotonic() + 0.5
        except BlockingIOError:
            time.sleep(0.005)
    return got


@pytest.mark.parametrize("made", [pipe, sockets, terminal])
@pytest.mark.parametrize("own_description", [True, False], ids=["proc", "no-proc"])
def test_a_reader_that_stopped_holds_up_nobody_and_hears_how_much_it_missed(
    made: Callable[[], tuple[int, int]], own_description: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not own_description:  # as where /proc is missing
        monkeypatch.setattr(lines.Lines, "_without_waiting", lambda *_: None)
    read, write = made()
    with io.TextIOWrapper(io.FileIO(write, "w"), write_through=True) as out:
        events = Events("secondary", machine_readable=True, out=out)
        begin = time.monotonic()
        for epoch in range(10_000):
            events.emit("checkpoint", "x" * 100, epoch=epoch)
        assert time.monotonic() - begin < 15, "a blocked write would never have come back"
        got = read_all(read)
        events.emit("checkpoint", "y", epoch=10_000)
        events.close()
        got += read_all(read)
        flags = fcntl.fcntl(write, fcntl.F_GETFL)
    os.close(read)
    assert not flags & os.O_NONBLOCK, "the file description is shared with other processes"
    said = [json.loads(line) for line in got.splitlines()]
    epochs = [one["epoch"] for one in said if one["event"] == "checkpoint"]
    lost = sum(one["lost"] for one in said if one["event"] == "unread")
    assert epochs == sorted(epochs)
    assert lost > 0
    assert len(epochs) + lost == 10_001


@pytest.mark.parametrize("stuck", ["stdout", "stderr"])
def test_a_reader_that_stopped_holds_up_neither_checkpoint_nor_takeover(
    stuck: str, tmp_path: Path, region_name: str
) -> None:
    read, write = pipe()
    address = f"unix:{tmp_path}/s"
    common = [*RAM, "--run-on", "0.5", "--peer-timeout", "1"]
    told = ["--events"] if stuck == "stdout" else []
    outputs: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stuck: write}
    secondary = subprocess.Popen(
        python_command("colocache.cli", "main", "secondary", *common, "--listen", address, "--name", region_name,
                       "--reconnect-limit", "0.1", *told),
        start_new_session=True, **outputs,
    )  # fmt: skip
    primary = subprocess.Popen(
        python_command("colocache.cli", "main", "primary", *common, "--connect", address, "--interval", "0.01", *told),
        start_new_session=True, **outputs,
    )  # fmt: skip
    os.close(write)
    try:
        assert wait_for(lambda: sealed(region_name) >= 100), "checkpoints stopped when the pipe was full"
        primary.send_signal(signal.SIGKILL)
        assert secondary.wait(60) == 0, "it took over, ran on, and every page was right"
        got = read_all(read)
    finally:
        for side in (primary, secondary):
            if side.poll() is None:
                side.terminate()
            side.wait(30)
        os.close(read)
    assert 0 < len(got) <= 1 << 16


def sealed(region: str) -> int:
    try:
        return colocache.inspect(region).status.sealed_epoch
    except colocache.ColocacheError:
        return 0


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
