# SPDX-License-Identifier: Apache-2.0
"""What the soak needs of processes: start one, read its events, see it die, and read its region from outside."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colocache import inspect
from colocache.children import python_command
from colocache.errors import ColocacheError

Event = dict[str, Any]
SHM = Path("/dev/shm")
DEATH_SECONDS_MAX = 30.0
END_SECONDS_MAX = 60.0
BROKEN_LINE = "broken line"  # takes the place of what can't be read; each event is one line, whoever is killed


class BrokenError(Exception):
    """An expectation was not met: what the soak is there to find."""


class Process:
    """One `colocache` command with --events. Its events go to `inbox` and, with its stderr, to `log`. `image`: of the
    disk that its guest has, if it has one."""

    def __init__(
        self, side: str, args: list[str], log: Path, inbox: queue.SimpleQueue[Event], image: Path | None = None
    ) -> None:
        self.side = side
        self.log = log
        self._inbox = inbox
        main = ("soak_disk", "main") if image else ("colocache.cli", "main")
        command = python_command(*main, side, *args, "--die-with-parent", str(os.getpid()))
        environment = {**os.environ, "COLOCACHE_SOAK_DISK": str(image)} if image else None
        with log.open("ab") as errors:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
                env=environment,
            )  # fmt: skip
        self.pid = self.popen.pid
        self.ended = threading.Event()  # and all it said is in the inbox
        self._reader = threading.Thread(target=self._read, name=f"soak-{side}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.log.open("ab") as log:
            for line in self.popen.stdout:
                log.write(line)
                log.flush()
                try:
                    self._inbox.put(json.loads(line))
                except ValueError:
                    self._inbox.put({"event": BROKEN_LINE, "side": self.side, "line": line.decode(errors="replace")})
        self.ended.set()

    def send(self, signum: int) -> None:
        """Send a signal, if it still runs."""
        self.popen.send_signal(signum)

    def wait(self) -> int:
        """Its exit status, after all its events were read. BrokenError if it does not end."""
        try:
            status = self.popen.wait(END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise BrokenError(f"the {self.side} (pid {self.pid}) did not end within {END_SECONDS_MAX:g} s") from None
        if not self.ended.wait(END_SECONDS_MAX):
            raise BrokenError(f"the {self.side} ended with status {status} but somebody still holds its stdout")
        return status

    def close(self) -> None:
        """End it whatever it does."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        self._reader.join(10.0)
        if self.popen.stdout is not None:
            self.popen.stdout.close()


def child_of(pid: int) -> int:
    """The one process that keeper `pid` has started; 0 if there is none at the moment.

    Its other children are QEMUs whose driver died, about to die too: they are given to the keeper.
    """
    for child in children_of(pid):
        with contextlib.suppress(OSError):
            if b"python" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]:
                return child
    return 0


def children_of(pid: int) -> list[int]:
    """All child processes of `pid`."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def wait_dead(pid: int) -> None:
    """Until no thread of a killed process can store anything any more."""
    deadline = time.monotonic() + DEATH_SECONDS_MAX
    while time.monotonic() < deadline:
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state in "ZX" and len(tasks) <= 1:
            return
        time.sleep(0.001)
    raise BrokenError(f"process {pid} was killed by SIGKILL and is still there after {DEATH_SECONDS_MAX:g} s")


@dataclass(frozen=True)
class Found:
    """What a dead secondary left, read from outside: the soak's own opinion of what attach must find."""

    sealed: int
    committed: int
    receiving: int
    bounded: bool = False

    @property
    def action(self) -> str:
        """What attach must do."""
        if not self.sealed:
            return "NOTHING"
        if self.committed < self.sealed:
            return "REPLAYED"
        return "NO_RESTART" if self.receiving > self.sealed and not self.bounded else "RESTART"

    @property
    def sentence(self) -> str:
        """How its sentence must begin."""
        return {
            "NOTHING": "no epoch was sealed yet",
            "REPLAYED": f"epoch {self.sealed} was sealed but not committed: replayed its flush",
            "RESTART": f"epoch {self.sealed} is committed and guest RAM is exactly that: restarted from epoch "
            f"{self.sealed}"
            if self.bounded
            else f"epoch {self.sealed} is committed and no newer page had come: restarted from epoch {self.sealed},",
            "NO_RESTART": f"cannot restart: pages of epoch {self.receiving} had already come over epoch {self.sealed} ",
        }[self.action]

    def after_recover(self) -> Found:
        """What the next attach finds."""
        return Found(self.sealed, self.sealed, self.receiving, self.bounded)


class Region:
    """The control region of one secondary, open for reading; readable after its name is gone too."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = os.open(SHM / f"colocache.{name}.control", os.O_RDONLY | os.O_CLOEXEC)

    def found(self) -> Found | None:
        """None: nothing was made in it yet."""
        if os.fstat(self._fd).st_size == 0:
            return None
        try:
            status = inspect(self._fd).status
        except ColocacheError:
            return None
        bounded = status.memory_mode == "bounded"
        return Found(status.sealed_epoch, status.committed_epoch, status.receiving_epoch, bounded)

    def close(self) -> None:
        """Only the descriptor: the region is its secondary's."""
        os.close(self._fd)
