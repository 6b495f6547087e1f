# SPDX-License-Identifier: Apache-2.0
"""colocache's pair of stock QEMUs beside QEMU's own (`x-colo`): the same small guest under KVM, in one run.

    .venv/bin/python bench/beside_qemu.py [--ram 1G] [--working-set 10M ...] [--checkpoints 6] [--rounds 2] [--json]

For each working set and round both pairs run on this machine, one after the other, both sides of each, over TCP on
loopback; then their primary is killed. Told: how long each machine stood for a checkpoint, what the secondary's host
needs beyond one image of guest RAM, for pages and beside them for its processes, and how long after the primary's death
the secondary ran alone.
QEMU's pair has neither disks nor cards, as ours; it has no heartbeat, and is told of the death at once. Needs KVM, a
QEMU with x-colo, and `pip install '.[qemu]'`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from colocache.commands.options import parse_size
from colocache.errors import ColocacheError
from colocache.vmm.qemu.guests import guest_of
from colocache.vmm.qemu.qmp import Event, Qmp
from colocache.vmm.workload import GuestOptions

STEPS_PER_SECOND = 125_000.0  # page writes, as in QEMU's own figures that people compare with
PAGE = 4096
START_SECONDS = 30.0
SKIPPED = 2  # first checkpoints of QEMU's pair: the very first flushes all of RAM


@dataclass
class Figures:
    """Of one pair in one round; times in milliseconds, memory in MiB."""

    pvm_stands: list[float] = field(default_factory=list)
    svm_stands: list[float] = field(default_factory=list)
    pages_mib: float = 0.0  # beyond one image: a second one, or pages that wait and private ones
    processes_mib: float = 0.0  # QEMUs and what drives them, without guest RAM
    takeover_ms: float = 0.0


# ---- QEMU's own pair -------------------------------------------------------------------------------------------------


class Stops:
    """When a machine stood: from the times that QEMU puts on its events."""

    def __init__(self) -> None:
        self.periods: list[tuple[float, float]] = []  # (stopped, seconds)
        self._changed = threading.Condition()
        self._stopped: float | None = None

    def on_event(self, event: Event) -> None:
        at = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        with self._changed:
            if event["event"] == "STOP":
                self._stopped = at
            elif event["event"] == "RESUME" and self._stopped is not None:
                self.periods.append((self._stopped, at - self._stopped))
                self._stopped = None
            self._changed.notify_all()

    def wait_for(self, n: int, seconds: float) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.periods) >= n, seconds):
                raise click.ClickException(
                    f"QEMU's pair made {len(self.periods)} checkpoints of {n} in {seconds:.0f} s"
                )


@contextlib.contextmanager
def qemu(arguments: list[str], descriptors: list[int], stops: Stops) -> Iterator[tuple[subprocess.Popen[bytes], Qmp]]:
    """A QEMU with a QMP socket; killed at the end."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    command = [*arguments, "-chardev", f"socket,id=qmp,fd={fd}", "-mon", "chardev=qmp,mode=control", "-display", "none"]
    process = subprocess.Popen(command, pass_fds=[*descriptors, fd], stdin=subprocess.DEVNULL)
    theirs.close()
    try:
        qmp = Qmp(ours, stops.on_event, START_SECONDS)
        try:
            yield process, qmp
        finally:
            with contextlib.suppress(ColocacheError):
                qmp.close()
    finally:
        process.kill()
        process.wait()


def anonymous_bytes(pid: int, guest_ram: Callable[[str, int], bool]) -> tuple[int, int]:
    """Memory of a process that is no file's: (private copies of guest RAM, or guest RAM itself; all other). 0 if gone.

    guest_ram(name, bytes): whether an area is that.
    """
    of_guest = other = 0
    with contextlib.suppress(OSError):
        here = False
        for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
            word, _, rest = line.partition(" ")
            if word.endswith(":"):
                if word == "Anonymous:":
                    n_bytes = int(rest.split()[0]) * 1024
                    of_guest, other = (of_guest + n_bytes, other) if here else (of_guest, other + n_bytes)
            else:
                begin, _, end = word.partition("-")
                here = guest_ram(line, int(end, 16) - int(begin, 16))
    return of_guest, other


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def qemus_own(ram: int, working_set: int, checkpoints: int, interval: float) -> Figures:
    """Run QEMU's pair for `checkpoints`, kill its primary."""
    options = GuestOptions(working_set_bytes=working_set, steps_per_second=STEPS_PER_SECOND, accel="kvm")
    guest = guest_of(options, ram)
    pvm, svm, found = Stops(), Stops(), Figures()
    # With shared memory the migration would leave RAM out: anonymous memory, as people run it.
    arguments = [guest.line.program, *guest.line.args, "-m", f"{ram}B", "-serial", "null"]
    try:
        with qemu([*arguments, "-incoming", "defer"], guest.line.descriptors, svm) as (secondary, to_svm):
            colo: dict[str, Any] = {"capabilities": [{"capability": "x-colo", "state": True}]}
            to_svm.execute("migrate-set-capabilities", **colo)
            address = f"tcp:127.0.0.1:{free_port()}"
            to_svm.execute("migrate-incoming", uri=address)
            with qemu(arguments, guest.line.descriptors, pvm) as (primary, to_pvm):
                to_pvm.execute("migrate-set-capabilities", **colo)
                to_pvm.execute(
                    "migrate-set-parameters", x_checkpoint_delay=round(interval * 1000), max_bandwidth=1 << 40
                )
                to_pvm.execute("migrate", uri=address)
                pvm.wait_for(SKIPPED + checkpoints, START_SECONDS + (SKIPPED + checkpoints) * (interval + 2))
                time.sleep(interval / 2)  # between two checkpoints
                of_guest, other = anonymous_bytes(secondary.pid, lambda _, n_bytes: n_bytes >= ram // 2)
                found.pages_mib, found.processes_mib = (of_guest - ram) / 2**20, other / 2**20
                resumed = len(svm.periods)
                primary.kill()
                primary.wait()
                dead = time.time()
                to_svm.execute("x-colo-lost-heartbeat")
                svm.wait_for(resumed + 1, START_SECONDS)
                stopped, seconds = svm.periods[resumed]
                found.takeover_ms = (stopped + seconds - dead) * 1000
            found.pvm_stands = [seconds * 1000 for _, seconds in pvm.periods[SKIPPED:][:checkpoints]]
            found.svm_stands = [seconds * 1000 for _, seconds in svm.periods[SKIPPED:resumed][:checkpoints]]
    finally:
        guest.close()
    return found


# ---- ours ------------------------------------------------------------------------------------------------------------


class Sampler:
    """The most memory that the secondary of a demo took beyond the image of guest RAM, as long as it was a secondary.

    (After the takeover the demo reads all of guest RAM, to check it.) Its processes are looked at every half second, as
    the kernel walks all their pages for it, which they feel; its files in shared memory every 20 ms: they hold what
    came for the next epoch.
    """

    def __init__(self, demo_pid: int) -> None:
        self.pages = self.processes = 0  # the most bytes
        self._demo, self._over = demo_pid, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        private, due = 0, 0.0
        while not self._over.wait(0.02):
            if time.monotonic() >= due:
                due = time.monotonic() + 0.5
                each = [anonymous_bytes(pid, is_image) for pid in secondary_of(self._demo)]
                if each and not any(is_primary(pid) for pid in descendants(self._demo)):
                    return
                private = sum(of_guest for of_guest, _ in each)
                self.processes = max(self.processes, sum(other for _, other in each))
            self.pages = max(self.pages, private + self._files())

    def _files(self) -> int:
        found = 0
        for part in ("cache.*", "control"):
            for path in Path("/dev/shm").glob(f"colocache.demo-{self._demo}-*.{part}"):  # noqa: S108
                with contextlib.suppress(OSError):
                    found += path.stat().st_blocks * 512
        return found

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def is_image(area: str, n_bytes: int) -> bool:  # noqa: ARG001 -- see anonymous_bytes
    return "/colocache.demo-" in area


def secondary_of(demo: int) -> list[int]:
    """The processes of a demo's secondary: its child among whose descendants QEMUs wait for a state."""
    for child in children_of(demo):
        family = [child, *descendants(child)]
        if any(waits_for_a_state(pid) for pid in family):
            return family
    return []


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text(encoding="ascii").split()]
    return found


def descendants(pid: int) -> list[int]:
    return [found for child in children_of(pid) for found in (child, *descendants(child))]


def words_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def waits_for_a_state(pid: int) -> bool:
    return b"-incoming" in words_of(pid)


def is_primary(pid: int) -> bool:
    words = words_of(pid)
    return b"qemu-system" in words[0] and b"-incoming" not in words if words else False


def ours(ram: int, working_set: int, checkpoints: int, interval: float) -> Figures:
    """Run `colocache demo` with QEMU guests in the same way."""
    with tempfile.TemporaryFile("w+") as said:
        command = [
            *(sys.executable, "-m", "colocache", "demo", "--json", "--verify", "none"),
            *("--guest", "qemu", "--accel", "kvm", "--transport", "tcp", "--ram", str(ram)),
            *("--working-set", str(working_set), "--steps-per-second", str(STEPS_PER_SECOND)),
            *("--checkpoints", str(checkpoints + SKIPPED), "--interval", str(interval)),
        ]
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        with Sampler(process.pid) as sampler:
            process.wait()
        said.seek(0)
        lines = said.read().splitlines()
    if process.returncode != 0 or not lines:
        raise click.ClickException(f"colocache demo ended with {process.returncode}")
    report = json.loads(lines[-1])
    return Figures(
        [report["pvm_pause_ms"]["p50"]],
        [report["pause_ms"]["p50"]],
        sampler.pages / 2**20,
        sampler.processes / 2**20,
        report["failover"]["detect_ms"] + report["failover"]["promote_ms"],
    )


# ---- both ------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Least, median and most."""
    if not values:
        return "-"
    figures = (min(values), statistics.median(values), max(values))
    return "/".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in figures)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ram", type=parse_size, default="1G", show_default=True, help="Guest RAM.")
@click.option(
    "--working-set", "working_sets", type=parse_size, multiple=True, default=("10M", "100M", "500M"), show_default=True
)
@click.option("--checkpoints", type=click.IntRange(1), default=6, show_default=True, help="Of each pair in a round.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option(
    "--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds between checkpoints."
)
@click.option("--json", "as_json", is_flag=True, help="Every figure as one JSON object.")
def main(
    ram: int, working_sets: tuple[int, ...], checkpoints: int, rounds: int, interval: float, as_json: bool
) -> None:
    """colocache's pair of stock QEMUs beside QEMU's own."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise click.ClickException("this needs /dev/kvm: QEMU's own pair does not work under TCG")
    ways = {"x-colo": qemus_own, "colocache": ours}
    found: dict[tuple[int, str], list[Figures]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("pairs", total=rounds * len(working_sets) * len(ways))
        for _ in range(rounds):
            for working_set in working_sets:
                for name, way in ways.items():
                    found.setdefault((working_set, name), []).append(way(ram, working_set, checkpoints, interval))
                    progress.advance(task)
    if as_json:
        click.echo(json.dumps([{"working_set": size, "pair": name, "rounds": [asdict(f) for f in figures]}
                               for (size, name), figures in found.items()]))  # fmt: skip
        return
    table = Table(
        title=f"{ram >> 20} MiB, {STEPS_PER_SECOND:,.0f} page writes/s, {checkpoints} checkpoints, {rounds} rounds",
        caption="least/median/most milliseconds that a machine stands for a checkpoint (colocache: of the rounds' "
        "medians); the most MiB beyond one image of guest RAM, in pages, and in processes beside them; ms from "
        "the primary's death to the takeover",
        box=SIMPLE,
        padding=(0, 0),
    )
    for column in ("writes", "pair", "primary stands", "secondary stands", "pages", "processes", "takeover"):
        table.add_column(column, justify="left" if column == "pair" else "right", no_wrap=True)
    for (size, name), figures in found.items():
        table.add_row(
            f"{size / 1e6:.0f} MB",
            name,
            spread([value for f in figures for value in f.pvm_stands]),
            spread([value for f in figures for value in f.svm_stands]),
            f"{max(f.pages_mib for f in figures):.0f}",
            f"{max(f.processes_mib for f in figures):.0f}",
            f"{statistics.median([f.takeover_ms for f in figures]):.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
