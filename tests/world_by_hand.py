# SPDX-License-Identifier: Apache-2.0
"""By hand, as root or where users make namespaces: a client of a Linux guest under TCG over SIGKILLs of its primary.

    COLOCACHE_LINUX=FOLDER python tests/world_by_hand.py requests --kills 20    200 HTTP requests a second
    ... download --kills 4      50 MB by HTTP, and its checksum
    ... session --kills 4       a shell by telnet

The primary is killed running, receiving, sealed, random in turn. The last line has the sums. Exit status 0: nothing was
wrong, missing or doubled, and no connection broke.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

import linux_guest
from cli_sides import Process

from colocache.demo import network
from colocache.demo.tally import percentile

GUEST = "10.9.0.2"
POINTS = ("running", "receiving", "sealed", "random")
RATE = 200  # requests a second
FILE_LINES = 6_250_000  # of `seq`: 48.9 MB
SMALL = b"a small page of the guest's\n"
SERVERS = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev; mkdir /dev/pts; mount -t devpts pts /dev/pts
mount -t tmpfs -o size=80m tmp /tmp
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci \
  failover net_failover virtio_net; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
ip link set lo up; ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up
mkdir /tmp/www; echo "a small page of the guest's" > /tmp/www/small
grep -q big /proc/cmdline && seq 1 6250000 > /tmp/www/big
httpd -h /tmp/www; telnetd -l /bin/sh
n=0
while true; do n=$((n+1)); echo "count $n"; usleep 100000; done
"""
COUNT = re.compile(rb"count (\d+)\r\n")


class Seen:
    """What a client saw."""

    def __init__(self) -> None:
        self.latencies: list[tuple[float, float]] = []  # when it was asked (time.monotonic), ms
        self.errors: list[str] = []
        self.killed_at = 0.0
        self.n_bytes = 0  # of the newest request


async def fetch(seen: Seen, path: str) -> bytes:
    """One request on a connection of its own."""
    begin = time.monotonic()
    body = b""
    try:
        reader, writer = await asyncio.open_connection(GUEST, 80)
        writer.write(b"GET /%s HTTP/1.0\r\n\r\n" % path.encode())
        answer = b""
        while data := await reader.read(1 << 18):
            answer += data
            seen.n_bytes = len(answer)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " not in head[:20]:
            seen.errors.append(f"{head[:40]!r}")
    except OSError as error:
        seen.errors.append(repr(error))
    seen.latencies.append((begin, (time.monotonic() - begin) * 1e3))
    return body


async def requests(seen: Seen) -> None:
    """At a fixed rate, whatever is still unanswered, until some time after the kill."""

    async def one() -> None:
        if await fetch(seen, "small") != SMALL:
            seen.errors.append("another page")

    tasks = []
    begin = time.monotonic()
    while not (seen.killed_at and time.monotonic() > seen.killed_at + 6):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(max(0.0, begin + len(tasks) / RATE - time.monotonic()))
    await asyncio.gather(*tasks)


async def download(seen: Seen) -> None:
    """One after the other until one began after the kill."""
    while not any(begin > seen.killed_at > 0 for begin, _ in seen.latencies):
        body = await fetch(seen, "big")
        if hashlib.sha256(body).hexdigest() != big_checksum():
            seen.errors.append(f"another checksum of {len(body)} bytes")


@cache
def big_checksum() -> str:
    return hashlib.sha256(b"".join(b"%d\n" % n for n in range(1, FILE_LINES + 1))).hexdigest()


async def session(seen: Seen) -> None:
    """A shell that is asked for sums."""
    reader, writer = await asyncio.open_connection(GUEST, 23)
    number = 0
    try:
        while not (seen.killed_at and time.monotonic() > seen.killed_at + 6):
            number += 1
            begin = time.monotonic()
            writer.write(b"echo r$((%d+1))\n" % number)
            said = await asyncio.wait_for(reader.readuntil(b"r%d\r\n" % (number + 1)), 60)
            seen.latencies.append((begin, (time.monotonic() - begin) * 1e3))
            if len(re.findall(rb"r\d+\r\n", said)) != 1:
                seen.errors.append(f"{said!r} for {number}")
    except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
        seen.errors.append(repr(error))


async def until(side: Process, event: str, after: float = 0.0) -> None:
    """The first such event after that time."""
    count = 1
    while True:
        found = await asyncio.to_thread(side.until, event, count, 120.0)
        if int(found["t"]) / 1e9 > after:
            return
        count += 1


async def run(what: Callable[[Seen], Coroutine[Any, Any, None]], point: str, number: int, folder: Path) -> Seen:
    """One pair, one kill."""
    seen = Seen()
    big = what is download
    command = list(linux_guest.command(folder, init=SERVERS))
    command[command.index("-m") + 1] = "224" if big else "96"
    command[-1] += " big" if big else ""
    console = folder / "console"
    line = ("--guest", "qemu", "--console", str(console), "--run-on", "0")
    die = ["--die-at", point, "--die-at-checkpoint", "110" if big else "90"] if point in ("receiving", "sealed") else []
    secondary = Process("secondary", "--listen", f"unix:{folder}/s", "--net", f"tap:{network.TAPS['secondary']}",
                        "--reconnect-limit", "0.2", *line, "--", *command)  # fmt: skip
    primary = None
    try:
        await until(secondary, "listening")
        primary = Process("primary", "--connect", f"unix:{folder}/s", "--net", f"tap:{network.TAPS['primary']}",
                          "--interval", "0.2", "--verify", "none", *die, *line, "--", *command)  # fmt: skip
        await until(primary, "checkpoint")
        while True:  # its servers come up
            if await fetch(Seen(), "big" if big else "small"):
                break
            await asyncio.sleep(0.3)
        task = asyncio.create_task(what(seen))
        if die:
            await until(primary, "dying")
        else:
            if big:
                while seen.n_bytes < 15 << 20:  # noqa: ASYNC110 -- in the middle of one; bytes are no event
                    await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(5)
            await until(primary, "checkpoint", time.monotonic())
            if point == "random":
                await asyncio.sleep(random.Random(number).uniform(0, 0.4))
            primary.process.kill()
        seen.killed_at = time.monotonic()
        await until(secondary, "takeover")
        await asyncio.wait_for(task, 180)
    finally:
        for side in (primary, secondary):
            if side is not None:
                await asyncio.to_thread(side.close)
    counted = [int(n) for n in COUNT.findall(console.read_bytes())]
    if counted != list(range(1, len(counted) + 1)):
        seen.errors.append("the console's count is broken")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("requests", "download", "session"))
    parser.add_argument("--kills", type=int, default=4)
    given = parser.parse_args()
    if os.environ.get("COLOCACHE_BY_HAND") != str(os.getpid()):
        os.environ["COLOCACHE_BY_HAND"] = str(os.getpid())
        how = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
        os.execvp(how[0], [*how, "--", sys.executable, *sys.argv])  # noqa: S606
    network.make("10.9.0.1/24")
    big_checksum()
    whats = {"requests": requests, "download": download, "session": session}
    failed, longest, pair, alone, n_answers = 0, [], [], [], 0
    for number in range(given.kills):
        with tempfile.TemporaryDirectory(prefix="colocache-world-") as folder:
            seen = asyncio.run(run(whats[given.what], POINTS[number % 4], number, Path(folder)))
        at = seen.killed_at
        pair += [ms for begin, ms in seen.latencies if begin + ms / 1e3 < at]
        alone += [ms for begin, ms in seen.latencies if begin > at + 2]
        longest.append(max(ms for _, ms in seen.latencies))
        n_answers += len(seen.latencies)
        failed += len(seen.errors)
        print(number + 1, POINTS[number % 4], len(seen.latencies), f"longest {longest[-1]:.0f} ms", seen.errors[:3],
              flush=True)  # fmt: skip
    told = [f"{name} {percentile(values, 0.5):.0f} / {percentile(values, 0.99):.0f}"
            for name, values in (("pair", pair), ("alone", alone))]  # fmt: skip
    print(f"{given.kills} kills, {n_answers} answers, {failed} wrong or failed; longest wait, median and worst: "
          f"{percentile(longest, 0.5):.0f}, {max(longest):.0f} ms; ms p50 / p99: {', '.join(told)}")  # fmt: skip
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
