# SPDX-License-Identifier: Apache-2.0
"""Disks whose system calls fail, and processes that die between them: the secondary has disk and memory of one epoch,
or the primary goes on alone and says so; nobody hangs, and nobody takes over beside a primary that lives."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from c_tools import run, tool
from disk_calls import Calls, failing
from qemu_support import guest, image_file, needs_qemu
from test_replication_disks import SIZE, DiskMachine, ToyMirrors, Truth, check, pair_with_a_disk, truth
from toy import QUICK, Recorder, once

from colocache.disks import export, nbd_client
from colocache.disks.mirrored import MirroredDisks
from colocache.disks.write import Kind, Write
from colocache.replication.errors import SecondaryLostError
from colocache.replication.messages import MessageType as M
from colocache.replication.mirrors import Mirrors
from colocache.vmm.qemu import mirror
from colocache.vmm.qemu.disk import DiskSpec, Nodes, node_of
from colocache.vmm.qemu.process import QemuProcess

ROOT = Path(__file__).resolve().parent.parent
STRIDE = int(os.environ.get("COLOCACHE_DISK_STRIDE", "11"))
__all__ = ["truth"]  # a fixture


# ---- a process that dies, and calls of one that lives ----


@pytest.fixture(scope="module")
def with_crash_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcolocache.so.0 that has them, for the loader to take first."""
    where = tmp_path_factory.mktemp("crash-points")
    run(
        [
            tool("cc", "gcc", "clang"), "-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread",
            "-DCOLOCACHE_FAULTS", "-I", ROOT / "csrc" / "include", *sorted((ROOT / "csrc").glob("*.c")),
            "-Wl,-soname,libcolocache.so.0", f"-Wl,--version-script={ROOT / 'csrc' / 'libcolocache.map'}",
            "-o", where / "libcolocache.so.0",
        ]
    )  # fmt: skip
    return where


@pytest.mark.parametrize("memory", ["mirror", "bounded"])
@pytest.mark.parametrize("what", ["engine", "calls", "failing"])
def test_disk_and_memory_are_of_one_epoch_wherever_it_ends(
    with_crash_points: Path, tmp_path: Path, memory: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All points: COLOCACHE_DISK_STRIDE=1."""
    command = [sys.executable, str(ROOT / "tests" / "disk_life.py"), str(tmp_path), memory, what, str(STRIDE)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(with_crash_points)}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, env=environment)
    assert ran.returncode == 0, ran.stderr
    counts = json.loads(ran.stdout)
    assert counts["recoveries"] >= 100 // STRIDE
    with capsys.disabled():
        print(f"\ndisks, {memory} memory, {what}: {counts}")


# ---- a secondary's, in a pair ----


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["pwritev", "pwrite"])
def test_a_call_that_fails_once_costs_a_connection_or_nothing(
    make_memory: Callable[..., Any],
    tmp_path: Path,
    truth: Truth,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        pair.events_s.wait("checkpoint", 2)
        failed = threading.Event()
        real = getattr(os, name)

        def fail(*given: Any) -> int:
            if not failed.is_set():
                failed.set()
                raise OSError(number, os.strerror(number))
            return int(real(*given))

        monkeypatch.setattr(os, name, fail)
        assert failed.wait(10)
        pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 3)
        assert bool(pair.events_s.all("lost")) == (name == "pwritev"), "a flush is repeated"
    check(pair, truth)


def test_a_log_that_takes_nothing_any_more_makes_the_primary_go_on_alone(
    make_memory: Callable[..., Any], tmp_path: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its secondary, which was told, does not take over beside it."""
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        pair.events_s.wait("checkpoint", 2)

        def fail(*_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwritev", fail)
        pair.events_p.wait("alone")
        assert pair.pvm.running
    assert not pair.events_s.all("takeover")
    assert truth.wrong == []


class UnreadMirrors(ToyMirrors):
    """The machine's disk can't be read."""

    def connected(self, send: Callable[[Write], None], *, fresh: bool, limit_bytes: int) -> None:
        if not fresh:
            raise SecondaryLostError("the guest's disks can't be read")
        super().connected(send, fresh=fresh, limit_bytes=limit_bytes)


def test_a_primary_whose_disk_can_not_be_sent_again_tells_its_secondary_that_it_goes_on_alone(
    make_memory: Callable[..., Any], tmp_path: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_replication_disks.ToyMirrors", UnreadMirrors)
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        pair.events_s.wait("checkpoint", 2)
        pair.link.rule = once(M.DISKS, "cut")
        pair.events_p.wait("alone")
        pair._running[0].join()
        assert not pair.events_s.all("takeover")
        assert "goes on alone" in pair._running[0].result.end
    assert truth.wrong == []


class TimedMachine(DiskMachine):
    """Remembers the longest that one of its writes took."""

    longest = 0.0

    def step(self, n: int) -> None:
        begin = time.monotonic()
        super().step(n)
        self.longest = max(self.longest, time.monotonic() - begin)


@pytest.mark.parametrize("kind", [M.DISK, M.VMSTATE_SIZE, M.CHECKPOINT_REQUEST])
def test_a_link_that_carries_nothing_any_more_holds_the_guest_up_for_the_peer_timeout_and_no_longer(
    make_memory: Callable[..., Any], tmp_path: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch, kind: M
) -> None:
    monkeypatch.setattr("test_replication_disks.DiskMachine", TimedMachine)
    with pair_with_a_disk(make_memory, tmp_path, truth) as pair:
        pair.events_s.wait("checkpoint", 2)
        pair.link.rule = once(kind, "stall")
        pair.events_p.wait("connected", 2)
        pair.events_s.wait("checkpoint", len(pair.events_s.all("checkpoint")) + 2)
        assert pair.pvm.longest < 2 * QUICK.peer_timeout  # type: ignore[attr-defined]
    check(pair, truth)


# ---- a primary's ----


class Machine:
    """The disk of a real QEMU, as replication gives orders about it."""

    sizes = (SIZE,)

    def __init__(self, process: QemuProcess) -> None:
        self._process = process

    def begin_mirror(self, exports: list[socket.socket], *, speed: int = 0) -> None:
        mirror.begin(self._process, 0, exports[0], speed)

    def mirrors(self) -> list[mirror.MirrorState]:
        return mirror.states(self._process, 1)

    def end_mirror(self) -> None:
        mirror.end(self._process, 1)

    def serve(self, path: str) -> None:
        mirror.serve(self._process, 1, path)

    def name(self, disk: int) -> str:
        return node_of(disk)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "disk").write_bytes(os.urandom(SIZE))
    with image_file() as image:
        process = QemuProcess(guest(), image, shared=True, nodes=Nodes.of_primary([DiskSpec.of(f"{tmp_path}/disk")]))
        try:
            yield Machine(process)
        finally:
            process.kill()


class FailingSocket(socket.socket):
    """Its calls fail when they are asked to."""

    calls: Calls

    def _passed(self, name: str, *given: Any) -> Any:
        real = getattr(super(), name)
        return self.calls._passed(name, lambda: real(*given))

    def connect(self, *given: Any) -> None:
        self._passed("connect", *given)

    def bind(self, *given: Any) -> None:
        self._passed("bind", *given)

    def listen(self, *given: Any) -> None:
        self._passed("listen", *given)

    def sendall(self, *given: Any) -> None:
        self._passed("sendall", *given)

    def recv_into(self, *given: Any) -> int:
        return int(self._passed("recv_into", *given))


def sockets(calls: Calls) -> Any:
    """The module `socket`, whose calls are counted and fail."""

    class Socket(FailingSocket):
        pass

    Socket.calls = calls
    pair = calls._passed
    return SimpleNamespace(
        **{**vars(socket), "socket": Socket, "socketpair": lambda: pair("socketpair", socket.socketpair)}
    )


@needs_qemu
@pytest.mark.parametrize("fresh", [False, True])
def test_a_primary_whose_call_fails_goes_on_without_its_secondary(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """Each call of its own side of the disks, and after each the next connection works."""
    n_threads = threading.active_count()
    at = 1
    names: list[str] = []
    while True:
        disks = MirroredDisks([SIZE])
        disks.write(Write(0, Kind.ZERO, 0, 4096))
        mirrors = Mirrors(machine, disks, Recorder("primary"))
        sent: list[Write] = []
        calls = Calls(at, failing(errno.EMFILE))
        for room in (nbd_client, export):
            monkeypatch.setattr(room, "socket", sockets(calls))
        try:
            mirrors.connected(sent.append, fresh=fresh, limit_bytes=0)
        except SecondaryLostError as error:
            names.append(calls.names[-1] if os.strerror(errno.EMFILE) in str(error) else str(error))
        else:
            break
        finally:
            for room in (nbd_client, export):
                monkeypatch.setattr(room, "socket", socket)
            mirrors.end()
        mirrors.connected(sent.append, fresh=fresh, limit_bytes=0)
        mirrors.end()
        assert threading.active_count() == n_threads
        at += 1
    assert set(names) == ({"socketpair"} if fresh else {"connect", "sendall", "recv_into"})
