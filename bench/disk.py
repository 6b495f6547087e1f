# SPDX-License-Identifier: Apache-2.0
"""How fast a guest writes and reads its disk in a pair, beside the same guest that nobody replicates.

    COLOCACHE_LINUX=DIR .venv/bin/python bench/disk.py [--rounds 3] [--passes 2] [--interval 1] [--json]

A Linux under TCG runs `dd` with O_DIRECT on its virtio disk, over and over: writes of 1 MiB, 64 KiB and 4 KiB, and a
read. Each round runs it alone, twice at the same time (as a pair's two machines are, on the same cores), and in a pair
that takes checkpoints, in an order that turns. Told are medians over all passes of all rounds, in MB/s, and the
slowest and fastest of them. The time is the host's, pauses of the guest among it: the guest marks each part's begin
and end in its disk's last block, where this script looks. Needs a kernel as .ci/run makes one, and busybox.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from colocache.commands.options import print_json
from colocache.demo.side import Side
from colocache.fitted_table import Column, print_fitted
from colocache.vmm.qemu.disk import DiskSpec, Nodes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import linux_guest

BLOCK = 4096
DISK_BYTES = 160 << 20
MARK_AT = DISK_BYTES - BLOCK
LOOK_SECONDS = 0.001
QUIET_SECONDS_MAX = 180.0  # for one part to end, or for the pair to meet
# name -> bytes at once, how often, dd's words
PARTS: dict[str, tuple[int, int, str]] = {
    "write 1M": (1 << 20, 128, "if=/dev/zero of=/dev/vda oflag=direct"),
    "write 64K": (64 << 10, 1024, "if=/dev/zero of=/dev/vda oflag=direct"),
    "write 4K": (4 << 10, 4096, "if=/dev/zero of=/dev/vda oflag=direct"),
    "read 1M": (1 << 20, 128, "if=/dev/vda of=/dev/null iflag=direct"),
}
WAYS = ("alone", "two alone", "pair")
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
while [ ! -e /dev/vda ]; do usleep 100000; done
n=0
mark() {{
  n=$((n+1)); echo "$n $1 $2 ." > /tmp/mark
  dd if=/tmp/mark of=/dev/vda bs={BLOCK} seek={MARK_AT // BLOCK} conv=sync oflag=direct 2>/dev/null
}}
while true; do
""" + "".join(
    f"mark {number} begin; dd {words} bs={size} count={count} 2>/dev/null; mark {number} end\n"
    for number, (size, count, words) in enumerate([*PARTS.values()])
)
INIT += "done\n"
MARK = re.compile(rb"(\d+) (\d+) (begin|end) \.\n")


class Watch:
    """Looks at the marks in the disk at `path`: how many seconds each part took, by its name."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._last = b""
        self._began: tuple[bytes, float] | None = None
        self.seconds: dict[str, list[float]] = {name: [] for name in PARTS}

    def look(self) -> None:
        """At the mark as it is now. One that was missed costs its part, and nothing else."""
        found = MARK.match(os.pread(self._fd, 64, MARK_AT))
        now = time.monotonic()
        if not found or found[0] == self._last:
            return
        self._last = found[0]
        number, part, kind = found.groups()
        if kind == b"begin":
            self._began = (number, now)
        elif self._began and int(number) == int(self._began[0]) + 1:
            self.seconds[tuple(PARTS)[int(part)]].append(now - self._began[1])

    def follow(self, passes: int, alive: Callable[[], None]) -> None:
        """Until each part was seen so often."""
        until = time.monotonic() + QUIET_SECONDS_MAX
        had = 0
        while min(map(len, self.seconds.values())) < passes:
            self.look()
            if (have := sum(map(len, self.seconds.values()))) > had:
                had, until = have, time.monotonic() + QUIET_SECONDS_MAX
            alive()
            if time.monotonic() > until:
                raise click.ClickException(f"the guest did nothing for {QUIET_SECONDS_MAX:g} s")
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def a_disk(where: Path) -> Iterator[Path]:
    """An empty one, which goes with the guest."""
    path = where / f"disk-{secrets.token_hex(3)}"
    path.touch(0o600)
    os.truncate(path, DISK_BYTES)
    try:
        yield path
    finally:
        path.unlink()


def alone(line: tuple[str, ...], where: Path, passes: int, n_guests: int) -> dict[str, list[float]]:
    """Seconds of each part, of the first of so many that run at the same time."""
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(a_disk(where)) for _ in range(n_guests)]
        machines = []
        for disk in disks:
            nodes = Nodes.of_primary([DiskSpec.of(f"{disk},format=raw")])
            machine = subprocess.Popen(
                [*line, *nodes.words, "-display", "none"], stdin=subprocess.DEVNULL, start_new_session=True
            )
            stack.callback(machine.wait)
            stack.callback(machine.kill)
            machines.append(machine)

        def alive() -> None:
            if any(machine.poll() is not None for machine in machines):
                raise click.ClickException("a guest that nobody replicates ended")

        watch = Watch(disks[0])
        stack.callback(watch.close)
        watch.follow(passes, alive)
        return watch.seconds


def pair(
    line: tuple[str, ...], where: Path, passes: int, interval: float, events: list[dict[str, Any]]
) -> dict[str, list[float]]:
    """The same of a pair, from its first checkpoint on; its events are added."""
    with contextlib.ExitStack() as stack:
        disk, image = (stack.enter_context(a_disk(where)) for _ in range(2))
        name = f"bench-{secrets.token_hex(3)}"
        said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        common = ["--events", "--guest", "qemu", "--pair", name, "--peer-timeout", "10"]
        secondary = Side(
            "secondary",
            [*common, "--name", name, "--listen", f"unix:{where}/{name}", "--disk", f"{image},format=raw", "--", *line],
            said,
        )
        stack.callback(secondary.close)

        def hear(side: Side) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    events.append(said.get_nowait())
            if side.ended.is_set():
                raise click.ClickException(f"the {side.name} ended: {side.last_words()}")

        def until(side: Side, event: str) -> None:
            limit = time.monotonic() + QUIET_SECONDS_MAX
            while not any(one["event"] == event for one in events):
                hear(side)
                if time.monotonic() > limit:
                    raise click.ClickException(f"no {event} within {QUIET_SECONDS_MAX:g} s")
                time.sleep(0.01)

        events.clear()
        until(secondary, "listening")
        primary = Side(
            "primary",
            [*common, "--connect", f"unix:{where}/{name}", "--interval", str(interval), "--verify", "none",
             "--disk", f"{disk},format=raw",
             "--", *line],
            said,
        )  # fmt: skip
        stack.callback(primary.close)
        until(secondary, "checkpoint")
        watch = Watch(disk)
        stack.callback(watch.close)
        watch.follow(passes, lambda: (hear(secondary), hear(primary), None)[-1])
        return watch.seconds


def figures(seconds: list[float], part: str) -> dict[str, float]:
    """MB/s: the median, the slowest and the fastest."""
    size, count, _ = PARTS[part]
    rates = sorted(size * count / one / 1e6 for one in seconds)
    return {"p50": round(statistics.median(rates), 2), "min": round(rates[0], 2), "max": round(rates[-1], 2)}


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--passes", type=click.IntRange(min=1), default=2, show_default=True, help="Of all parts in each run.")
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two checkpoints.")
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), default=WAYS, show_default=True)
@click.option("--folder", default="", help="Where the disks lie.  [default: the folder for temporary files]")
@click.option("--json", "as_json", is_flag=True)
def main(rounds: int, passes: int, interval: float, ways: tuple[str, ...], folder: str, as_json: bool) -> None:
    if not os.environ.get("COLOCACHE_LINUX"):
        raise click.ClickException("COLOCACHE_LINUX names no folder with vmlinuz and modules: .ci/run makes one")
    console = Console(stderr=True)
    seconds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in PARTS} for way in ways}
    stands: list[float] = []
    loads = []
    with (
        tempfile.TemporaryDirectory(prefix="colocache.bench-", dir=folder or None) as made,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        where = Path(made)
        line = linux_guest.command(where, init=INIT)
        task = progress.add_task("guests", total=rounds * len(ways))
        for number in range(rounds):
            loads.append(round(os.getloadavg()[0], 2))
            at = number % len(ways)
            for way in (*ways[at:], *ways[:at]):
                progress.update(task, description=way)
                events: list[dict[str, Any]] = []
                found = (
                    pair(line, where, passes, interval, events)
                    if way == "pair"
                    else alone(line, where, passes, 2 if way == "two alone" else 1)
                )
                for name, took in found.items():
                    seconds[way][name] += took
                stands += [one["pause_ns"] / 1e6 for one in events if one["event"] == "sent"]
                progress.advance(task)
    results = {way: {name: figures(took, name) for name, took in parts.items()} for way, parts in seconds.items()}
    pause = round(statistics.median(stands), 2) if stands else None
    if as_json:
        print_json(
            {"rounds": rounds, "passes": passes, "interval": interval, "load_before": loads, "pvm_pause_ms": pause,
             "mb_per_s": results}
        )  # fmt: skip
        return
    columns = (Column("dd", justify="left"), *(Column(f"{way}\nMB/s  (min-max)") for way in ways))
    rows = [
        [name, *("{p50:.1f}  ({min:.1f}-{max:.1f})".format(**results[way][name]) for way in ways)] for name in PARTS
    ]
    title = f"dd with O_DIRECT, medians of {rounds} rounds of {passes} passes or more; load before each: {loads}"
    print_fitted(Console(), title, columns, rows)


if __name__ == "__main__":
    sys.exit(main())
