# SPDX-License-Identifier: Apache-2.0
"""The console on a Unix socket: one client sees what is new and types, the guest never waits for it, and what was typed
is heard once over the SIGKILL of the primary."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import select
import socket
import stat
import struct
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import linux_guest
import pytest
from cli_sides import Process, Sides
from qemu_support import needs_qemu, wait_until
from toy import Link

from colocache.errors import ArgumentError
from colocache.outputs import unix_front
from colocache.outputs.keyboard import Keyboard
from colocache.outputs.piece import CARD, CONSOLE
from colocache.outputs.typed import TypedInput
from colocache.outputs.unix_front import UnixFront
from colocache.replication.address import Address

HEARD = re.compile(rb"heard (\d+) (\w+)\r\n")
DIES_AT = 40  # this checkpoint, if the primary kills itself


def client_of(path: Path, *, patience: float = 10.0) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(patience)
    try:
        made.connect(str(path))
    except BaseException:
        made.close()
        raise
    return made


def read(client: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes and (more := client.recv(n_bytes - len(data))):
        data += more
    return data


@pytest.fixture
def front(tmp_path: Path) -> Iterator[UnixFront]:
    made = UnixFront(str(tmp_path / "console"))
    made.show()
    yield made
    made.close()
    assert list(tmp_path.iterdir()) == []


class Machine:
    """Takes in all that it is given."""

    def __init__(self, front: UnixFront, *, room: int = 1 << 16) -> None:
        self.got = b""
        self.typed = TypedInput(live=True, limit_bytes=room)
        self.typed.in_flight(1)
        self.typed._give, self.typed._take_back = self._give, bytes
        front.hear(self.typed)

    def _give(self, data: bytes) -> int:
        self.got += data
        return len(data)


@pytest.fixture
def sides(tmp_path: Path, region_name: str) -> Iterator[Sides]:
    made = Sides(tmp_path, region_name)
    yield made
    made.close()


# ---- the front ----


def test_a_client_sees_the_console_and_types(front: UnixFront, tmp_path: Path) -> None:
    machine = Machine(front)
    front.emit(CONSOLE, b"before it came ")
    front.emit(CARD, b"no console")
    with client_of(tmp_path / "console") as client:
        assert read(client, 15) == b"before it came "
        front.emit(CONSOLE, b"and now")
        assert read(client, 7) == b"and now"
        client.sendall(b"ls\n")
        wait_until(lambda: machine.got == b"ls\n")
        client.shutdown(socket.SHUT_WR)  # it types no more and still sees
        front.emit(CONSOLE, b"files")
        assert read(client, 5) == b"files"


def test_the_socket_is_its_owners_only(front: UnixFront, tmp_path: Path) -> None:
    assert front is not None
    assert stat.S_IMODE((tmp_path / "console").stat().st_mode) == 0o600


def test_one_client_at_a_time_and_the_next_sees_what_is_new(front: UnixFront, tmp_path: Path) -> None:
    Machine(front)
    with client_of(tmp_path / "console") as first:
        front.emit(CONSOLE, b"one")
        assert read(first, 3) == b"one"
        with client_of(tmp_path / "console") as second:
            assert b"somebody else is at this console" in read(second, 200)
    wait_until(lambda: front._client is None)
    front.emit(CONSOLE, b"two")
    with client_of(tmp_path / "console") as third:
        assert read(third, 3) == b"two"


def test_a_console_that_nobody_reads_holds_nobody_up_and_says_what_is_gone(
    front: UnixFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix_front, "UNREAD_BYTES_MAX", 1000)
    for n in range(50):
        front.emit(CONSOLE, b"%099d\n" % n)
    assert len(front._unread) == 1000
    with client_of(tmp_path / "console") as client:
        note = b"\r\n[colocache: 4000 bytes of the console are gone: nobody read them]\r\n"
        last = b"".join(b"%099d\n" % n for n in range(40, 50))
        assert read(client, len(note) + len(last)) == note + last


def test_a_client_that_does_not_read_holds_nobody_up(front: UnixFront, tmp_path: Path) -> None:
    with client_of(tmp_path / "console") as client:
        for _ in range(80):
            front.emit(CONSOLE, bytes(1 << 16))
        assert len(front._unread) <= unix_front.UNREAD_BYTES_MAX + 200
        front.emit(CONSOLE, b"the end")
        data = b""
        while not data.endswith(b"the end"):
            data += client.recv(1 << 16)
        assert b"bytes of the console are gone" in data


def test_what_is_typed_too_fast_waits_in_the_clients_socket(front: UnixFront, tmp_path: Path) -> None:
    machine = Machine(front, room=10)
    with client_of(tmp_path / "console") as client:
        client.sendall(b"0123456789abcdef")
        wait_until(lambda: machine.typed.room == 0)
        time.sleep(0.1)
        assert machine.got == b"0123456789"
        client.close()  # it does not wait for the rest to be taken
        machine.typed.received(1)  # nothing is forgotten that the epoch did not take in
        machine.typed.in_flight(2)
        machine.typed.received(2)
        wait_until(lambda: machine.got == b"0123456789abcdef")


def test_a_client_that_left_before_a_stuck_guest_took_its_words_keeps_nobody_out(
    front: UnixFront, tmp_path: Path
) -> None:
    machine = Machine(front, room=3)
    with client_of(tmp_path / "console") as client:
        client.sendall(b"words")
        wait_until(lambda: machine.typed.room == 0)
    time.sleep(0.05)
    front.emit(CONSOLE, b"still here")
    with client_of(tmp_path / "console") as client:
        assert read(client, 10) == b"still here"


def test_input_waits_until_it_is_known_whether_the_guest_hears(front: UnixFront, tmp_path: Path) -> None:
    with client_of(tmp_path / "console") as client:
        client.sendall(b"early\n")
        time.sleep(0.05)
        machine = Machine(front)
        wait_until(lambda: machine.got == b"early\n")


def test_a_guest_that_does_not_hear_lets_a_client_type_into_the_void(front: UnixFront, tmp_path: Path) -> None:
    front.hear(None)
    with client_of(tmp_path / "console") as client:
        client.sendall(bytes(1 << 20))  # more than a socket holds


def test_a_secondary_takes_the_name_of_a_primary_that_is_dead_or_cut_off(front: UnixFront, tmp_path: Path) -> None:
    """Whoever comes from now on sees the machine that took over; the other's end leaves its name alone."""
    with pytest.raises(ArgumentError, match="another process listens there"):
        UnixFront(str(tmp_path / "console")).show()
    other = UnixFront(str(tmp_path / "console"), takes_over=True)
    other.emit(CONSOLE, b"said before it was shown, ")
    other.show()
    front.close()
    other.emit(CONSOLE, b"and after")
    with client_of(tmp_path / "console") as client:
        assert read(client, 35) == b"said before it was shown, and after"
    other.close()
    front._wake = os.eventfd(0)  # the fixture closes it once more
    front._thread = None


def test_a_name_that_can_be_no_socket_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, why in (
        (str(tmp_path / "file"), "no socket has this name"),
        (str(tmp_path / "no" / "where"), "no folder that can be written"),
        ("", "the path has 0 bytes"),
        ("x" * 101, "101 bytes, give 1 to 100"),
    ):
        with pytest.raises(ArgumentError, match=why):
            UnixFront(name)
    assert (tmp_path / "file").read_text() == "mine"


# ---- both alive ----


def everything(client: socket.socket, seconds: float) -> bytes:
    """What the client is told in that time."""
    data, until = b"", time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and select.select([client], [], [], left)[0]:
        more = client.recv(1 << 16)
        if not more:
            break
        data += more
    return data


@pytest.mark.parametrize("never", ["primary", "secondary"])
def test_with_the_link_cut_and_both_alive_one_machine_has_the_console(sides: Sides, tmp_path: Path, never: str) -> None:
    """On one host, with one PATH for both: it leads to whoever may be seen, and a client of the other hears nothing."""
    console = tmp_path / "console"
    args = {
        role: ("--console", f"unix:{console}", "--run-on", "0", "--arbiter", "never" if role == never else "solo",
               "--reconnect-limit", "4" if role == never else "0.3")
        for role in ("primary", "secondary")
    }  # fmt: skip
    secondary = sides.secondary(*args["secondary"])
    link = Link(tmp_path, Address.parse(f"unix:{tmp_path}/s"))
    try:
        primary = sides.primary("--connect", str(link.address), *args["primary"])
        secondary.until("checkpoint", 4)
        with client_of(console) as first:
            assert everything(first, 0.3)
            link.close()
            if never == "primary":
                secondary.until("takeover")
                time.sleep(0.2)
                everything(first, 0.1)  # what was on its way
                assert everything(first, 1.5) == b""
                with client_of(console) as second:
                    assert everything(second, 0.5)
            else:
                primary.until("alone")
                everything(first, 0.1)
                assert everything(first, 0.5)
            assert not any(event["event"] in ("takeover", "alone") for event in {
                "primary": primary, "secondary": secondary}[never].events)  # fmt: skip
    finally:
        link.close()


# ---- standard input ----


def test_a_pipe_is_read_when_this_side_is_shown_and_a_file_never(tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    (tmp_path / "file").write_text("no keys")
    with (tmp_path / "file").open() as file:
        for fd in (theirs, file.fileno(), -1):
            got: list[bytes] = []
            typed = TypedInput(live=True)
            typed._give = lambda data, got=got: (got.append(data), len(data))[1]  # type: ignore[misc]
            keyboard = Keyboard(fd)
            keyboard.hear(typed)
            if fd == theirs:
                os.write(ours, b"keys\n")
            time.sleep(0.1)
            assert got == []
            keyboard.show()
            if fd == theirs:
                wait_until(lambda got=got: got == [b"keys\n"])  # type: ignore[misc]
            time.sleep(0.1)
            keyboard.close()
            assert got == ([b"keys\n"] if fd == theirs else [])
    os.close(ours)
    os.close(theirs)


# ---- a real pair ----


def has_left(client: socket.socket) -> bool:
    """Whether all that was typed was taken from the socket, by somebody who is there still: at an end it is emptied."""
    waits = struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]
    poll = select.poll()
    poll.register(client, 0)
    return not waits and not poll.poll(0)


class Typist:
    """Types lines, each when the one before has left its socket, and comes back when the connection breaks. `typed` are
    those that are surely on their way; one that was in the socket when it broke is typed again if the guest has not
    heard it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.typed: list[bytes] = []
        self.unsure = b""  # the line of which it is not known whether it went
        self.seen = b""
        self.n_connections = self.n_again = 0
        self.problem: BaseException | None = None
        self.enough = threading.Event()
        self.holds = threading.Event()  # types nothing for now
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def heard(self) -> dict[int, bytes]:
        """By the guest's number. A front that can't know may say one epoch's lines again: the same."""
        found: dict[int, bytes] = {}
        for number, word in HEARD.findall(self.seen):
            assert found.setdefault(int(number), word) == word, "another line with this number"
        return found

    def _run(self) -> None:
        try:
            while not self.enough.is_set():
                try:
                    client = client_of(self.path)
                except OSError:
                    time.sleep(0.01)
                    continue
                self.n_connections += 1
                with client, contextlib.suppress(OSError):
                    self._talk(client)
        except BaseException as error:  # noqa: BLE001 -- the test asks
            self.problem = error

    def _talk(self, client: socket.socket) -> None:
        until = time.monotonic() + 3
        while self.unsure and time.monotonic() < until:
            if not self._read(client, 0.05):
                return
            if self.unsure in self.heard().values():
                self._went()
        self.n_again += bool(self.unsure)
        self.unsure = b""
        while not self.enough.is_set():
            if not self.unsure and not self.holds.is_set() and b"READY" in self.seen:
                self.unsure = b"w%d" % (len(self.typed) + 1)
                client.sendall(self.unsure + b"\n")
            if self.unsure and has_left(client):
                self._went()
            if not self._read(client, 0.005):
                return

    def _went(self) -> None:
        self.typed.append(self.unsure)
        self.unsure = b""

    def _read(self, client: socket.socket, seconds: float) -> bool:
        if not select.select([client], [], [], seconds)[0]:
            return True
        try:
            data = client.recv(1 << 16)
        except OSError:
            return False
        self.seen += data
        return bool(data)

    def end(self) -> None:
        self.enough.set()
        self._thread.join(20)
        if self.problem is not None:
            raise self.problem


def dies(primary: Process, point: str, run: int) -> None:
    """It is killed, if it does not kill itself at that point."""
    if point in ("receiving", "sealed"):
        primary.until("dying", timeout=120)
        return
    primary.until("checkpoint", DIES_AT, timeout=120)
    if point == "random":
        time.sleep(random.Random(run).uniform(0, 0.5))
    primary.process.kill()


@needs_qemu
@pytest.mark.parametrize("run", range(int(os.environ.get("COLOCACHE_LINUX_RUNS", "1"))))
@pytest.mark.parametrize(
    ("port", "point"),
    [("serial", "running"), ("serial", "receiving"), ("serial", "sealed"), ("serial", "random"), ("virtio", "random")],
)
def test_each_line_that_is_typed_is_heard_once_over_the_takeover(
    sides: Sides, tmp_path: Path, port: str, point: str, run: int
) -> None:
    """By hand: COLOCACHE_LINUX_RUNS=10."""
    if port == "virtio" and not (linux_guest.folder() / "modules" / "virtio_console.ko").is_file():
        pytest.skip("COLOCACHE_LINUX has no virtio_console.ko")
    console = tmp_path / "console"
    line = ("--guest", "qemu", "--console", f"unix:{console}", "--run-on", "0")
    command = linux_guest.command(tmp_path, init=linux_guest.LISTENER)
    if port == "virtio":
        command = (*linux_guest.command(tmp_path, init=linux_guest.VIRTIO_LISTENER), *linux_guest.VIRTIO_CONSOLE)
    die = ("--die-at", point, "--die-at-checkpoint", str(DIES_AT)) if point in ("receiving", "sealed") else ()
    secondary = sides.secondary(*line, "--reconnect-limit", "0.2", "--", *command)
    primary = sides.primary(*line, "--interval", "0.2", "--verify", "none", *die, "--", *command)
    primary.until("start")
    typist = Typist(console)
    try:
        dies(primary, point, run)
        secondary.until("takeover")
        wait_until(lambda: typist.n_connections > 1)
        at_least = len(typist.typed) + 20
        wait_until(lambda: len(typist.typed) > at_least or typist.problem is not None)
        typist.holds.set()
        until = time.monotonic() + 20
        while (typist.unsure or len(typist.heard()) < len(typist.typed)) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        typist.end()
    n_told_again = len(HEARD.findall(typist.seen)) - len(typist.heard())
    print(f"{len(typist.typed)} lines, {typist.n_again} typed again, {n_told_again} told again")
    assert typist.heard() == dict(enumerate(typist.typed, 1))
