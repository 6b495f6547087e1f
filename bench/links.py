# SPDX-License-Identifier: Apache-2.0
"""How long the primary stands where its secondary is not on the same machine: loopback, 1 Gbit/s, 10 ms of delay.

    sudo .venv/bin/python bench/links.py [--set nothing --set 10M] [--checkpoints 100] [--rounds 3] [--json]

`colocache primary` and `colocache secondary` over TCP, each link beside the others in an order that turns, once as they
are and once with `--no-background` (all pages in the pause). 1 Gbit/s is the kernel's token bucket on the loopback
device of a network namespace, which takes root; 10 ms are 5 in each direction, in a relay of this process, as not
every kernel can delay packets itself. Told are medians of the rounds' p50, p99 and max of the primary's pause, with
what it must wait for in it at least: one round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from colocache.children import python_command
from colocache.commands.options import parse_size, print_json
from colocache.demo.tally import summary_of
from colocache.fitted_table import Column, print_fitted

STEPS_PER_SECOND = 125_000
NOTHING_STEPS = 200  # a second: a page or a few in each epoch
DELAY_SECONDS = 0.005  # in each direction
CHUNK = 1 << 18
LIMIT_SECONDS = 600.0  # of one pair
LINKS = ("loopback", "1gbit", "10ms")
WAYS: dict[str, tuple[str, ...]] = {"as it is": (), "no background": ("--no-background",)}
COLUMNS = (
    Column("link", justify="left"), Column("set", justify="left"), Column("way", justify="left"),
    Column("primary stands, ms\np50/p99/max"), Column("pages of a\ncheckpoint"), Column("of them in\nthe pause"),
)  # fmt: skip


# ---- the links -------------------------------------------------------------------------------------------------------


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction: each chunk leaves DELAY_SECONDS after it came, however many are under way."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

    async def send() -> None:
        while (due_and_data := await under_way.get())[1]:
            await asyncio.sleep(max(0.0, due_and_data[0] - loop.time()))
            writer.write(due_and_data[1])
            await writer.drain()
        writer.close()

    sending = asyncio.create_task(send())
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            await under_way.put((loop.time() + DELAY_SECONDS, data))
    await under_way.put((0.0, b""))
    with contextlib.suppress(OSError):
        await sending


@contextlib.contextmanager
def delayed(port: int) -> Iterator[int]:
    """A port whose connections go to `port`, later."""
    ready: list[int] = []
    there = threading.Event()
    loop = asyncio.new_event_loop()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(200):  # the secondary may not listen yet
            with contextlib.suppress(ConnectionRefusedError):
                onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
                break
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
        for each in (writer, onward_writer):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(relay(reader, onward_writer), relay(onward_reader, writer))

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ready.append(server.sockets[0].getsockname()[1])
        there.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    there.wait(10)
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def slow_link_trouble() -> str:
    """What keeps a namespace with a slow link from being made; "": nothing."""
    if os.geteuid() != 0:
        return "1 Gbit/s is left out: a network namespace takes root (sudo)"
    if missing := [tool for tool in ("unshare", "ip", "tc") if not shutil.which(tool)]:
        return f"1 Gbit/s is left out: {', '.join(missing)} is missing (Debian: apt install util-linux iproute2)"
    made = subprocess.run([*in_slow_namespace(), "true"], capture_output=True, text=True, check=False)
    return f"1 Gbit/s is left out: {made.stderr.strip()}" if made.returncode else ""


def in_slow_namespace() -> list[str]:
    """The beginning of a command that runs where loopback has 1 Gbit/s."""
    script = 'ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 128k latency 20ms && exec "$@"'
    return ["unshare", "-n", "sh", "-c", script, "sh"]


# ---- one pair --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def one(given: dict[str, Any], link: str, size: str, way: str) -> dict[str, Any]:
    """The primary's report. ClickException: it failed."""
    if link == "1gbit":
        again = [sys.executable, __file__, "--only", size, way, "--json"]
        for name in ("ram", "backing", "checkpoints", "interval"):
            again += [f"--{name}", str(given[name])]
        ran = subprocess.run([*in_slow_namespace(), *again], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise click.ClickException(f"1 Gbit/s: {ran.stderr.strip().splitlines()[-1]}")
        report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return report
    rate, working_set = (NOTHING_STEPS, "1M") if size == "nothing" else (STEPS_PER_SECOND, size)
    machine = ("--ram", given["ram"], "--backing", given["backing"])
    port = free_port()
    secondary = subprocess.Popen(
        python_command("colocache.cli", "main", "secondary", "--json", "--listen", f"127.0.0.1:{port}", *machine),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with contextlib.ExitStack() as stack:
            to = stack.enter_context(delayed(port)) if link == "10ms" else port
            line = python_command(
                "colocache.cli", "main", "primary", "--connect", f"127.0.0.1:{to}", "--events", "--verify", "none",
                *machine, "--working-set", working_set, "--steps-per-second", str(rate),
                "--checkpoints", str(given["checkpoints"]), "--interval", str(given["interval"]), *WAYS[way],
            )  # fmt: skip
            primary = subprocess.run(line, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
            if primary.returncode == 0:
                secondary.wait(30)
    finally:
        secondary.kill()
        _, said = secondary.communicate()
    if primary.returncode:
        words = [*primary.stderr.strip().splitlines()[-1:], *said.strip().splitlines()[-1:]]
        raise click.ClickException(f"{size} over {link}, {way}: {'; '.join(words)}")
    events = [json.loads(text) for text in primary.stdout.splitlines() if text.startswith("{")]
    return told([event for event in events if event.get("event") == "checkpoint"][1:])  # the first is the initial copy


def told(checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one pair: pauses in ms with their stages, and the pages of a checkpoint that were sent in the pause."""
    pauses = [one["pause_ms"] for one in checkpoints]
    return {
        "pvm_pause_ms": summary_of(pauses),
        "pvm_stages_p50_ms": {
            stage: round(statistics.median(one["stages"][stage] for one in checkpoints), 3)
            for stage in checkpoints[0]["stages"]
        },
        "pages": round(statistics.median(one["sent_pages"] for one in checkpoints)),
        "in_the_pause": round(statistics.median(one["sent_pages"] - one["background_pages"] for one in checkpoints)),
    }


def medians(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all rounds, figure by figure."""

    def of(first: Any, *path: str) -> Any:
        if isinstance(first, dict):
            return {name: of(value, *path, name) for name, value in first.items()}
        found = []
        for report in reports:
            value: Any = report
            for name in path:
                value = value[name]
            found.append(value)
        return round(statistics.median(found), 3)

    made: dict[str, Any] = of(reports[0])
    return made


@click.command(help=__doc__)
@click.option("--ram", default="256M", show_default=True)
@click.option("--set", "sets", multiple=True, default=("nothing", "10M"), show_default=True)
@click.option("--link", "links", multiple=True, type=click.Choice(LINKS), default=LINKS, show_default=True)
@click.option("--checkpoints", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--interval", default=0.2, show_default=True, help="Seconds between two checkpoints.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--backing", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--only", nargs=2, hidden=True, help="One pair of this set and way, here, for a namespace.")
def main(
    sets: tuple[str, ...],
    links: tuple[str, ...],
    rounds: int,
    as_json: bool,
    only: tuple[str, str] | None,
    **given: Any,
) -> None:
    if only:
        print_json(one(given, "loopback", *only))
        return
    for size in sets:
        if size != "nothing":
            parse_size(size)
    console = Console(stderr=True)
    if "1gbit" in links and (trouble := slow_link_trouble()):
        console.print(trouble)
        links = tuple(link for link in links if link != "1gbit")
    cases = [(link, size, way) for link in links for size in sets for way in WAYS]
    reports: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pairs", total=rounds * len(cases))
        for number in range(rounds):
            for case in (*cases[number % len(cases) :], *cases[: number % len(cases)]):
                progress.update(task, description=", ".join(case))
                reports[case].append(one(given, *case))
                progress.advance(task)
    results = [{"link": case[0], "set": case[1], "way": case[2], **medians(reports[case])} for case in cases]
    if as_json:
        print_json({"rounds": rounds, **given, "results": results})
        return
    rows = [
        [result["link"], result["set"], result["way"],
         "/".join(f"{value:.2f}" for value in result["pvm_pause_ms"].values()),
         f"{result['pages']:,.0f}", f"{result['in_the_pause']:,.0f}"]
        for result in results
    ]  # fmt: skip
    print_fitted(Console(), f"{given['checkpoints']} checkpoints, medians of {rounds} rounds", COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main())
