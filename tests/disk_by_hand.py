# SPDX-License-Identifier: Apache-2.0
"""By hand: a Linux under TCG with a database on its disk, over deaths of each part of its pair.

    COLOCACHE_LINUX=FOLDER python tests/disk_by_hand.py primary --kills 20     the primary, running, receiving, ...
    ... secondary --kills 20    the process that runs the secondary's machine, its QEMUs, and its keeper
    ... server --kills 20       the export: the QEMU that writes to it, and its connection; the primary goes on alone
    ... aborted --kills 20      epochs: a state that is vetoed, a connection cut before and in it, cut in a disk write,
                                or stuck there

What does not end the pair is done several times to one, and then its primary is killed. After each takeover the guest
reads its database from the disk, at least twice. The last line has the sums. Exit status 0: every row that the
world was told of is there, and the database is whole.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import database_guest
from cli_sides import Process
from database_guest import Told
from soak_process import Region, child_of, children_of, wait_dead
from toy import Link, once

from colocache import clean
from colocache.errors import ColocacheError
from colocache.replication.address import Address
from colocache.replication.messages import MessageType as M

POINTS = ("running", "receiving", "sealed", "random")
INTERVAL = 0.3
DIES_AT = 40  # this checkpoint, if the primary kills itself
SIZE = 48 << 20
MOMENTS = ("receiving", "sealed", "any")
PER_PAIR = 5  # that a pair goes through before its primary is killed
ABORTS = (
    (M.VMSTATE_SIZE, "flip", "aborted"),
    (M.VMSTATE_SIZE, "cut", "connected"),
    (M.DISKS, "cut", "connected"),
    (M.VMSTATE_SIZE, "half-cut", "connected"),
    (M.DISK, "half-cut", "connected"),
    (M.DISK, "stall", "connected"),
)


class Pair:
    """A pair of QEMUs whose guest keeps a database. `patient`: only an operator's word makes the secondary take over;
    `link`: the connection goes through our hands."""

    def __init__(self, folder: Path, stack: ExitStack, *, patient: bool, link: bool = False, die_at: str = "") -> None:
        self.folder, self.stack = folder, stack
        self.name = f"by-hand-{os.getpid()}"
        self.console = folder / "console"
        for name in ("disk", "image"):
            (folder / name).touch()
            os.truncate(folder / name, SIZE)
        command = database_guest.command(folder)
        self._line = ("--guest", "qemu", "--console", str(self.console), "--run-on", "0")
        self._end = ("--", *command)
        self._limit = "300" if patient else "0.2"
        stack.callback(self._clean)
        self.secondary = self.start_secondary()
        self.region = Region(self.name)
        stack.callback(self.region.close)
        address = Address.parse(f"unix:{folder}/s")
        if link:
            self.link = Link(folder, address)
            stack.callback(self.link.close)
            address = self.link.address
        die = ("--die-at", die_at, "--die-at-checkpoint", str(DIES_AT)) if die_at else ()
        self.primary = Process(
            "primary", "--connect", str(address), "--interval", str(INTERVAL), "--verify", "none", "--disk",
            f"{folder}/disk", "--reconnect-limit", self._limit if patient else "20", *die, *self._line, *self._end,
        )  # fmt: skip
        stack.callback(self.primary.close)
        self.primary.until("checkpoint", timeout=120)

    def _clean(self) -> None:
        with suppress(ColocacheError):  # there is none if it ended in order
            clean(self.name)

    def start_secondary(self, *more: str) -> Process:
        made = Process(
            "secondary", "--listen", f"unix:{self.folder}/s", "--name", self.name, "--disk", f"{self.folder}/image",
            "--reconnect-limit", self._limit, *more, *self._line, *self._end,
        )  # fmt: skip
        self.stack.callback(made.close)
        made.until("listening")
        return made

    def told(self) -> Told:
        """So far."""
        return database_guest.read(self.console.read_bytes() if self.console.exists() else b"")

    def goes_on(self, checks: int, seconds: float = 120.0) -> Told:
        """After so many further looks at the whole database, the last of which began after now."""
        wanted = self.told().checks + checks + 1
        until = time.monotonic() + seconds
        while (told := self.told()).checks < wanted and not told.wrong:
            assert time.monotonic() < until, f"{told.checks} of {wanted} checks within {seconds:g} s"
            time.sleep(0.1)
        assert not told.wrong, told.wrong
        return told

    def checkpoints(self, more: int = 2) -> None:
        """So many that are sealed from now on: events that were said before do not count."""
        now = time.monotonic_ns()
        count = 1
        while more:
            more -= self.secondary.until("checkpoint", count, timeout=60)["t"] > now
            count += 1

    def aim(self, moment: str, seed: int) -> None:
        """Until the region is in this state, or for a random time."""
        if moment == "any":
            time.sleep(random.Random(seed).uniform(0, 2 * INTERVAL))
        until = time.monotonic() + 20
        while moment != "any" and time.monotonic() < until:
            found = self.region.found()
            if found and (found.receiving > found.sealed if moment == "receiving" else found.sealed > found.committed):
                break
            time.sleep(0.0001)

    def kill_primary(self, point: str, seed: int) -> None:
        """If it does not kill itself."""
        if point in ("receiving", "sealed"):
            self.primary.until("dying", timeout=120)
            return
        self.checkpoints(1)
        if point == "random":
            time.sleep(random.Random(seed).uniform(0, 2 * INTERVAL))
        self.primary.process.kill()
        self.primary.process.wait()

    def takes_over(self, *, word: bool) -> Told:
        """And what it tells then. `word`: of the operator."""
        if word:
            self.secondary.process.send_signal(signal.SIGUSR2)
        self.secondary.until("takeover", timeout=60)
        return self.goes_on(2)


@contextmanager
def pair(*, patient: bool, link: bool = False, die_at: str = "") -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="colocache-disk-") as folder, ExitStack() as stack:
        yield Pair(Path(folder), stack, patient=patient, link=link, die_at=die_at)


# ---- what becomes of it ----


def primary(number: int, _wanted: int, counts: Counter[str]) -> Told:
    point = POINTS[number % len(POINTS)]
    with pair(patient=False, die_at=point if point in ("receiving", "sealed") else "") as one:
        one.goes_on(1)
        one.kill_primary(point, number)
        told = one.takes_over(word=False)
    counts[f"primary, {point}"] += 1
    return told


def secondary(number: int, wanted: int, counts: Counter[str]) -> Told:
    with pair(patient=True) as one:
        one.goes_on(1)
        for n in range(wanted):
            seed = number + n
            moment = MOMENTS[seed % len(MOMENTS)]
            child = child_of(one.secondary.process.pid)
            n_connected = sum(event["event"] == "connected" for event in one.primary.events)
            one.aim(moment, seed)
            if seed % 5 == 4:
                what = "secondary and its keeper"
                one.secondary.process.kill()
                one.secondary.process.wait()
                wait_dead(child)
                one.secondary = one.start_secondary("--attach")
            elif seed % 5 == 3:
                what = "a QEMU of the secondary"
                with suppress(ProcessLookupError):
                    os.kill(random.Random(seed).choice(children_of(child) or [0]), signal.SIGKILL)
            else:
                what = "secondary"
                os.kill(child, signal.SIGKILL)
            if "QEMU" not in what:
                one.primary.until("connected", n_connected + 1, timeout=60)
            one.checkpoints()
            counts[f"{what}, {moment}"] += 1
        one.kill_primary("random", number)
        return one.takes_over(word=True)


def server(number: int, _wanted: int, counts: Counter[str]) -> Told:
    with pair(patient=True) as one:
        one.goes_on(1)
        one.checkpoints(1)
        time.sleep(random.Random(number).uniform(0, 2 * INTERVAL))
        if number % 2:
            counts["the QEMU that writes to the export"] += 1
            for qemu in children_of(one.primary.process.pid):
                os.kill(qemu, signal.SIGKILL)
            one.primary.process.wait(30)
            return one.takes_over(word=True)
        counts["the connection of the export"] += 1
        break_export(one.primary.process.pid)
        one.primary.until("alone", timeout=60)
        return one.goes_on(2)


def aborted(number: int, wanted: int, counts: Counter[str]) -> Told:
    with pair(patient=True, link=True) as one:
        one.goes_on(1)
        for n in range(wanted):
            kind, verdict, event = ABORTS[(number + n) % len(ABORTS)]
            count = sum(found["event"] == event for found in one.primary.events)
            one.link.rule = once(kind, verdict, direction="P→S")
            one.primary.until(event, count + 1, timeout=60)
            one.link.rule = lambda *_: "pass"
            one.checkpoints()
            counts[f"{kind.name} {verdict}"] += 1
        one.kill_primary("random", number)
        return one.takes_over(word=True)


def break_export(pid: int) -> None:
    """Shut the connection of an export in process `pid`, from outside: as if whoever serves it were gone."""
    inodes = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines() if "colocache.disk-" in line}
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    done = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if str(fd.readlink()).strip("socket:[]") in inodes:
                ours = libc.syscall(438, process, int(fd.name), 0)  # pidfd_getfd
                assert ours >= 0, os.strerror(ctypes.get_errno())
                with socket.socket(fileno=ours) as taken:
                    taken.shutdown(socket.SHUT_RDWR)
                done += 1
    os.close(process)
    assert done, "no connection of an export was found"


WHATS: dict[str, Callable[[int, int, Counter[str]], Told]] = {
    "primary": primary,
    "secondary": secondary,
    "server": server,
    "aborted": aborted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("--kills", type=int, default=4)
    given = parser.parse_args()
    per_pair = PER_PAIR if given.what in ("secondary", "aborted") else 1
    counts: Counter[str] = Counter()
    failed = changes = checks = 0
    for number in range(0, given.kills, per_pair):
        try:
            told = WHATS[given.what](number, min(per_pair, given.kills - number), counts)
        except AssertionError as error:
            failed += 1
            print(f"{number}: {str(error)[:2000]}", flush=True)
            continue
        changes, checks = changes + told.told, checks + told.checks
        print(number, dict(counts), f"{told.told} changes told, {told.checks} checks", flush=True)
    print(
        f"{counts.total()} times, {dict(counts)}; {changes} changes told, {checks} checks of all rows; {failed} failed"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
