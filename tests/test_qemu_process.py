# SPDX-License-Identifier: Apache-2.0
"""One QEMU: started, saved, loaded into a fresh process, killed; what it writes and what it must not write."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu_support import content, guest, image_file, needs_qemu, wait_until

from colocache.vmm.qemu import inside, ram_blocks
from colocache.vmm.qemu.command_line import CommandLine
from colocache.vmm.qemu.description import describe
from colocache.vmm.qemu.errors import QemuDiedError, QemuError, QemuLoadError, QemuSlowError
from colocache.vmm.qemu.process import QemuProcess

pytestmark = needs_qemu
STATE_MAX = 1 << 20

Start = Callable[..., QemuProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[QemuProcess] = []

    def start_one(line: CommandLine, image: int, **options: Any) -> QemuProcess:
        made.append(QemuProcess(line, image, **options))
        return made[-1]

    yield start_one
    for one in made:
        one.kill()


@pytest.fixture
def primary_image() -> Iterator[int]:
    with image_file() as fd:
        yield fd


@pytest.fixture
def secondary_image() -> Iterator[int]:
    with image_file() as fd:
        yield fd


def booted(start: Start, image: int, *more: str) -> tuple[QemuProcess, bytes]:
    """A primary that ran for a while and stands, and its device state."""
    primary = start(guest(*more), image, shared=True)
    primary.cont()
    wait_until(lambda: content(image).count(b"\0") < len(content(image)) - 100_000)  # the firmware has run
    primary.stop()
    return primary, primary.save(STATE_MAX)


def copy(source: int, target: int) -> None:
    os.pwrite(target, content(source), 0)


def test_a_fresh_process_becomes_the_saved_machine_and_its_writes_are_private(
    start: Start, primary_image: int, secondary_image: int
) -> None:
    _, state = booted(start, primary_image)
    copy(primary_image, secondary_image)
    epoch = content(secondary_image)
    secondary = start(guest(), secondary_image, shared=False, incoming=True)
    assert secondary.status() == "inmigrate"
    assert secondary.private_bytes() == 0
    secondary.load(state)
    assert secondary.status() == "paused"  # it stands until it is told to run
    secondary.cont()
    secondary.qmp.execute("system_reset")
    wait_until(lambda: secondary.private_bytes() > 0)
    assert secondary.status() == "running"
    assert content(secondary_image) == epoch


def test_a_machine_that_took_over_is_folded_into_the_image_and_runs_on_over_it(
    start: Start, primary_image: int, secondary_image: int
) -> None:
    _, state = booted(start, primary_image)
    copy(primary_image, secondary_image)
    secondary = start(guest(), secondary_image, shared=False, incoming=True)
    ram_blocks.fill(secondary, describe(guest()).others)
    secondary.load(state)
    secondary.cont()
    secondary.qmp.execute("system_reset")  # all of the firmware's work once more
    wait_until(lambda: secondary.private_bytes() > 0)
    secondary.stop()
    memory, private = bytes(secondary.guest_memory(0, len(content(secondary_image)))), secondary.private_bytes()
    half = len(memory) // 2
    folded = secondary.fold(secondary_image, 0, half) + secondary.fold(secondary_image, half, half)
    assert folded == private
    assert secondary.private_bytes() == 0
    assert content(secondary_image) == memory == bytes(secondary.guest_memory(0, len(memory)))
    os.pwrite(secondary_image, bytes(0xA0000), 0)
    assert secondary.guest_memory(0, 0xA0000).count(0) == 0xA0000
    secondary.cont()
    secondary.qmp.execute("system_reset")
    wait_until(lambda: any(os.pread(secondary_image, 0xA0000, 0)))  # the firmware keeps its data there
    assert secondary.private_bytes() == 0
    assert secondary.status() == "running"
    os.kill(secondary.pid, 9)
    with pytest.raises(QemuError, match=r"ended|process"):
        secondary.fold(secondary_image, 0, half)


def test_a_shared_machine_writes_the_image(start: Start, primary_image: int) -> None:
    primary, _ = booted(start, primary_image)
    assert primary.private_bytes() == 0
    with open(f"/proc/{primary.pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 -- not a file with a content
        assert os.pread(memory.fileno(), len(content(primary_image)), primary.address()) == content(primary_image)


def test_a_state_that_qemu_refuses_costs_the_process_and_not_the_image(
    start: Start, primary_image: int, secondary_image: int
) -> None:
    _, state = booted(start, primary_image)
    copy(primary_image, secondary_image)
    epoch = content(secondary_image)
    refused = start(guest(), secondary_image, shared=False, incoming=True)
    with pytest.raises(QemuLoadError, match=r"refused the device state|ended while it loaded"):
        refused.load(state[: len(state) // 2])
    assert not refused.alive
    another = start(guest(), secondary_image, shared=False, incoming=True)
    another.load(state)
    assert another.status() == "paused"
    assert content(secondary_image) == epoch


def test_a_process_killed_in_mid_load_costs_the_process_and_not_the_image(
    start: Start, primary_image: int, secondary_image: int
) -> None:
    _, state = booted(start, primary_image)
    copy(primary_image, secondary_image)
    epoch = content(secondary_image)
    victim = start(guest(), secondary_image, shared=False, incoming=True)
    assert victim._stream is not None
    victim._stream.sendall(state[: len(state) // 2])  # it loads and waits for the rest
    victim._process.kill()
    with pytest.raises(QemuLoadError, match=r"did not take|ended while it loaded"):
        victim.load(state[len(state) // 2 :])
    another = start(guest(), secondary_image, shared=False, incoming=True)
    another.load(state)
    assert content(secondary_image) == epoch


def test_a_load_that_never_ends_is_given_up(start: Start, primary_image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colocache.vmm.qemu.process.LOAD_SECONDS", 0.5)
    waiting = start(guest(), primary_image, shared=False, incoming=True)
    os.kill(waiting.pid, 19)  # SIGSTOP
    with pytest.raises(QemuLoadError, match=r"within 0\.5 s"):
        waiting.load(b"nothing")


def test_a_device_state_of_a_running_machine_is_refused(start: Start, primary_image: int) -> None:
    """QEMU itself would save it without a word."""
    primary, _ = booted(start, primary_image)
    primary.cont()
    with pytest.raises(QemuError, match="stop it first"):
        primary.save(STATE_MAX)


def test_a_device_state_above_its_bound_is_refused(start: Start, primary_image: int) -> None:
    primary, state = booted(start, primary_image)
    with pytest.raises(QemuError, match=f"{len(state)} bytes; at most {len(state) - 1}"):
        primary.save(len(state) - 1)
    assert len(primary.save(len(state))) == len(state)


def test_a_command_that_qemu_refuses_is_one_sentence(start: Start, primary_image: int) -> None:
    primary = start(guest(), primary_image, shared=True)
    with pytest.raises(QemuError, match="QEMU refused `no-such-command`"):
        primary.qmp.execute("no-such-command")
    assert primary.status() == "prelaunch"


def test_a_qemu_that_does_not_come_up_says_its_last_words(primary_image: int) -> None:
    with pytest.raises(QemuDiedError, match=r"exit status 1: .*no-such-cpu"):
        QemuProcess(guest("-cpu", "no-such-cpu"), primary_image, shared=True)


def test_a_qemu_that_could_not_even_be_started_names_that_cause(
    primary_image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    QemuProcess(guest(), primary_image, shared=True).kill()  # makes the driver's own

    def no_more(*_: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socketpair", no_more)
    with pytest.raises(OSError, match="Too many open files"):
        QemuProcess(guest(), primary_image, shared=True)


def test_an_unmigratable_device_is_refused_at_the_start(primary_image: int) -> None:
    """Saving it would be a segmentation fault of the primary."""
    words = ["-drive", "file=/dev/zero,format=raw,if=none,id=d,readonly=on", "-device", "nvme,serial=1,drive=d"]
    with pytest.raises(QemuDiedError, match="-only-migratable"):
        QemuProcess(guest(*words), primary_image, shared=True)


def test_death_is_seen_and_told(start: Start, primary_image: int) -> None:
    seen: list[str] = []
    primary = start(guest(), primary_image, shared=True, on_event=lambda event: seen.append(event["event"]))
    assert primary.alive
    primary._process.kill()
    wait_until(lambda: "COLOCACHE_DEATH" in seen)
    assert not primary.alive
    with pytest.raises(QemuDiedError):
        primary.stop()


def test_the_guests_console_is_read(start: Start, primary_image: int) -> None:
    """The firmware's own words, by way of SeaBIOS's serial console."""
    said: list[bytes] = []
    primary = start(guest("-machine", "graphics=off"), primary_image, shared=True, on_output=said.append)
    primary.cont()
    wait_until(lambda: b"SeaBIOS" in b"".join(said))


def test_a_package_in_a_path_with_spaces_drives_qemu(
    start: Start, primary_image: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dynamic linker reads LD_PRELOAD as a list of paths between spaces and colons."""
    moved = tmp_path / "a path: with spaces" / "preload.so"
    moved.parent.mkdir()
    shutil.copyfile(inside.PRELOAD, moved)
    monkeypatch.setattr(inside, "PRELOAD", moved)
    primary = start(guest(), primary_image, shared=True)
    assert primary.status() in ("prelaunch", "paused")


def test_kill_leaves_no_descriptor(primary_image: int) -> None:
    QemuProcess(guest(), primary_image, shared=True).kill()  # makes the driver's own
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        made = QemuProcess(guest(), primary_image, shared=True, incoming=True)
        made.kill()
        made.kill()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


CHILD = """
import os, sys, time
from colocache.vmm.qemu.command_line import read_command_line
from colocache.vmm.qemu.process import QemuProcess
image = os.memfd_create("image")
os.posix_fallocate(image, 0, 32 << 20)
made = QemuProcess(read_command_line(["qemu-system-x86_64", "-m", "32", "-accel", "tcg"]), image, shared=True)
made.cont()
print(made.pid, flush=True)
time.sleep(600)
"""


def test_no_qemu_outlives_the_process_that_drives_it() -> None:
    driver = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None
        pidfd = os.pidfd_open(int(driver.stdout.readline()))
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(0) == []
        driver.kill()
        assert poll.poll(30_000) != []
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    os.close(pidfd)


def preloaded(command: list[str], image: int, parent: int) -> subprocess.CompletedProcess[str]:
    """Run a program as QEMU is run, told that `parent` is its parent."""
    file = os.fstat(image)
    ours, theirs = socket.socketpair()
    with ours, theirs, inside.PRELOAD.open("rb") as preload:  # by descriptor: its path may have spaces
        environment = {
            **os.environ,
            "LD_PRELOAD": f"/proc/self/fd/{preload.fileno()}",
            "COLOCACHE_QEMU": f"{theirs.fileno()} {parent} {file.st_dev} {file.st_ino}",
        }
        fds = [image, theirs.fileno(), preload.fileno()]
        return subprocess.run(command, env=environment, pass_fds=fds, check=False, stdout=subprocess.PIPE, text=True)


def test_a_parent_that_died_before_qemu_could_ask_for_its_death_leaves_no_qemu(primary_image: int) -> None:
    """The preload asks the kernel first and looks at its parent then: here the parent is another than was said."""
    assert preloaded(["true"], primary_image, os.getpid()).returncode == 0
    assert preloaded(["true"], primary_image, os.getppid()).returncode == 127


PUNCH = """
import ctypes, os, sys
fd, libc = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True)
for name in ("fallocate", "fallocate64"):
    for mode in (3, 16 | 1):  # a hole; zeros in place of what was there
        answer = getattr(libc, name)(fd, mode, ctypes.c_long(0), ctypes.c_long(4096))
        print(answer, os.strerror(ctypes.get_errno()))
print(libc.fallocate(fd, 1, ctypes.c_long(0), ctypes.c_long(4096)))
"""


def test_nothing_in_a_qemu_can_punch_holes_into_the_image(primary_image: int) -> None:
    """QEMU gives ballooned memory back by holes in the file, also where it maps the file privately."""
    done = preloaded([sys.executable, "-c", PUNCH, str(primary_image)], primary_image, os.getpid())
    assert done.stdout.splitlines() == [*["-1 Operation not supported"] * 4, "0"]
    assert os.fstat(primary_image).st_blocks * 512 == os.fstat(primary_image).st_size


def test_it_is_told_when_a_machine_stood_that_was_saved_in_the_same_breath(start: Start, primary_image: int) -> None:
    """The save is a part of the pause: QEMU stood since before it."""
    primary, state = booted(start, primary_image)
    assert primary.stop_and_save(STATE_MAX) == (state, None)  # it stood already
    primary.cont()
    asked = time.monotonic_ns()
    _, since = primary.stop_and_save(STATE_MAX)
    assert since is not None
    assert asked - 1_000_000 < since < time.monotonic_ns()
    assert primary.status() == "paused"


def test_what_a_guest_does_meanwhile_is_not_kept_for_the_next_command(start: Start, primary_image: int) -> None:
    """Each event comes to both monitors: the second is read for it too, or QEMU would keep what nobody reads."""
    primary, _ = booted(start, primary_image)
    for _ in range(50):
        primary.qmp.execute("system_reset")
    wait_until(lambda: len(primary.quick._data) < 200 and not select.select([primary.quick._socket], [], [], 0)[0])
    primary.cont()
    assert primary.status() == "running"


def test_a_late_answer_is_not_taken_for_the_next_command(start: Start, primary_image: int) -> None:
    primary, _ = booted(start, primary_image)
    os.kill(primary.pid, signal.SIGSTOP)
    with pytest.raises(QemuSlowError, match=r"did not answer `query-name` within 0.1 s"):
        primary.quick.execute_all([("query-name", {})], timeout=0.1)
    os.kill(primary.pid, signal.SIGCONT)
    assert primary.quick.execute_all([("query-status", {})])[0]["running"] is False


def test_what_qemu_complains_of_is_told_and_not_the_advice_after_it(start: Start, primary_image: int) -> None:
    with pytest.raises(QemuError, match="unsupported machine type"):
        start(guest("-machine", "nosuch"), primary_image, shared=True)


def test_what_can_be_done_while_qemu_saves_is_done_once_it_stands(start: Start, primary_image: int) -> None:
    primary, _ = booted(start, primary_image)
    seen: list[str] = []
    primary.stop_and_save(STATE_MAX, lambda: seen.append("stood before"))
    primary.cont()

    def fails() -> None:
        seen.append("stands")
        raise QemuError("what is wrong")

    with pytest.raises(QemuError, match="what is wrong"):
        primary.stop_and_save(STATE_MAX, fails)
    assert seen == ["stood before", "stands"]
    assert primary.status() == "paused"
