# SPDX-License-Identifier: Apache-2.0
"""How long both machines of a pair stand for a checkpoint, and what that leaves the guest: ways beside each other.

    .venv/bin/python bench/pause.py [--ram 1G] [--set nothing --set 10M ...] [--checkpoints 200] [--rounds 3] [--json]

Each round runs, in an order that turns, every working set over a Unix socket and over TCP on loopback, once as it is,
once with `--no-background` (all pages in the pause), once with `--resume-at loaded` (the primary waits for the
secondary's flush) and once with `--cores-apart` (each side on its half of the cores, as two hosts would be). Told are
medians of the rounds' p50, p99 and max in milliseconds, of both machines with their stages, and the steps a second that
the primary's guest did, beside those of two guests that nobody replicates and whose log is taken and cleared at the
same interval, and how many of this machine's cores were busy: where these are all there are, the guests had to give
what the pair took. These two are not measured alike: the pair's is CPU time over time of its whole run, with start,
initial copy and takeover; that of the guests alone is of their steady intervals. Both sides share this machine, so on
two cores four threads want to run: other work shows in every figure, and the load before each round is told beside
them.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from colocache import RamImage, Sender
from colocache.children import python_command
from colocache.choices import TRANSPORTS
from colocache.commands.options import parse_size, print_json
from colocache.fitted_table import Column, print_fitted
from colocache.replication.blocks import rams_of_images
from colocache.vmm import GuestOptions
from colocache.vmm.guests import blocks_for, guest_kind_available, make_machine

STEPS_PER_SECOND = 125_000
ALONE_MAX = 50  # intervals that a guest is watched which nobody replicates
NOTHING_STEPS = 200  # a second: a page or a few in each epoch, so that the takeover can be seen to run on
WAYS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "no background": ("--no-background",),
    "resume at loaded": ("--resume-at", "loaded"),
    "cores apart": ("--cores-apart",),
}
SHOWN = ("pvm_pause_ms", "pause_ms")
COLUMNS = (
    Column("set", justify="left"), Column("over", justify="left"), Column("way", justify="left"),
    Column("PVM ms\np50/p99/max"), Column("SVM ms\np50/p99/max"), Column("of it\ncopy"),
    Column("guest's\nsteps/s"), Column("of one\nalone"), Column("cores busy in\nits whole run, alone"),
)  # fmt: skip


def one(given: dict[str, Any], size: str, transport: str, way: str) -> dict[str, Any]:
    """The report of one pair. ClickException: it failed."""
    rate, working_set = (NOTHING_STEPS, "1M") if size == "nothing" else (STEPS_PER_SECOND, size)
    line = python_command(
        "colocache.cli", "main", "demo", "--guest", given["guest"], "--backing", given["backing"],
        "--ram", given["ram"], "--working-set", working_set, "--steps-per-second", str(rate),
        "--checkpoints", str(given["checkpoints"]), "--interval", str(given["interval"]),
        "--verify", "none", "--transport", transport, "--json", *WAYS[way],
    )  # fmt: skip
    begin, busy = time.perf_counter(), children_seconds()
    ran = subprocess.run(line, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise click.ClickException(f"{size} over {transport}, {way}: {ran.stderr.strip().splitlines()[-1]}")
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    report["cores_busy"] = (children_seconds() - busy) / (time.perf_counter() - begin)
    return report


def children_seconds() -> float:
    """CPU time of all that this process has started and seen end, guests included: of whole runs, from start to end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one_alone(given: dict[str, Any], size: str) -> tuple[float, float]:
    """Steps a second of a guest that nobody replicates, and cores that it keeps busy; its log is taken and cleared at
    each interval."""
    rate, working_set = (NOTHING_STEPS, "1M") if size == "nothing" else (STEPS_PER_SECOND, size)
    kind, _ = guest_kind_available(given["guest"])
    options = GuestOptions(steps_per_second=rate, working_set_bytes=parse_size(working_set))
    with contextlib.ExitStack() as stack:
        images = [
            stack.enter_context(RamImage.create(spec, given["backing"]))
            for spec in blocks_for(parse_size(given["ram"]), kind)
        ]
        sender = stack.enter_context(Sender())
        for image in images:
            sender.add_block(image.spec.name, image.addr, image.spec.len_bytes, image.spec.page_size)
        machine = make_machine(kind, rams_of_images(images), options, sender.mark_dirty)
        stack.callback(machine.close)
        machine.boot()
        machine.resume()
        time.sleep(given["interval"])
        begin, busy, steps = time.perf_counter(), time.process_time(), machine.steps
        for _ in range(min(given["checkpoints"], ALONE_MAX)):
            time.sleep(given["interval"])
            machine.sync_dirty_log(sender)
        seconds = time.perf_counter() - begin
        return (machine.steps - steps) / seconds, (time.process_time() - busy) / seconds


def two_alone(given: dict[str, Any], size: str) -> tuple[float, float]:
    """The slower of two at the same time, as the two sides of a pair are, and cores that both keep busy."""
    line = [sys.executable, __file__, "--alone", size]
    for name in ("ram", "checkpoints", "interval", "guest", "backing"):
        line += [f"--{name}", str(given[name])]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    if any(process.returncode for process in both):
        raise click.ClickException(f"{size}, two guests that nobody replicates: one of them ended")
    steps, busy = zip(*(map(float, text.split()) for text in told), strict=True)
    return min(steps), sum(busy)


def medians(reports: list[dict[str, Any]], alone: list[tuple[float, float]]) -> dict[str, Any]:
    """Of all rounds, figure by figure."""

    def of(*path: str) -> float:
        found = []
        for report in reports:
            value: Any = report
            for name in path:
                value = value[name]
            found.append(float(value))
        return round(statistics.median(found), 4)

    first = reports[0]
    made: dict[str, Any] = {name: {share: of(name, share) for share in first[name]} for name in SHOWN}
    for name in ("pvm_stages_ms", "stages_ms"):
        made[name] = {stage: {share: of(name, stage, share) for share in one} for stage, one in first[name].items()}
    return {
        **made,
        "pvm_steps_per_s": of("pvm_steps_per_s"),
        "alone_steps_per_s": statistics.median(steps for steps, _ in alone),
        "cores_busy": of("cores_busy"),
        "alone_cores_busy": round(statistics.median(busy for _, busy in alone), 4),
        "flush_gb_per_s": of("flush_gb_per_s"),
    }


def row(result: dict[str, Any]) -> list[str]:
    """The texts of one result, one per column."""
    pauses = ["/".join(f"{value:.2f}" for value in result[name].values()) for name in SHOWN]
    copy = f"{result['stages_ms']['copy']['p50']:.2f}"
    share = result["pvm_steps_per_s"] / result["alone_steps_per_s"]
    steps = f"{result['pvm_steps_per_s']:,.0f}"
    busy = f"{result['cores_busy']:.2f}, {result['alone_cores_busy']:.2f}"
    return [result["set"], result["over"], result["way"], *pauses, copy, steps, f"{share:.2f}", busy]


@click.command(help=__doc__)
@click.option("--ram", default="256M", show_default=True)
@click.option("--set", "sets", multiple=True, default=("nothing", "10M", "100M"), show_default=True)
@click.option("--checkpoints", type=click.IntRange(min=2), default=200, show_default=True)
@click.option("--interval", default=0.1, show_default=True, help="Seconds between two checkpoints.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--guest", default="auto", show_default=True)
@click.option("--backing", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--alone", hidden=True, help="One guest of this set that nobody replicates, here.")
@click.option("--way", "ways", multiple=True, type=click.Choice(tuple(WAYS)), default=tuple(WAYS), show_default=True)
def main(
    sets: tuple[str, ...], ways: tuple[str, ...], rounds: int, as_json: bool, alone: str | None, **given: Any
) -> None:
    if alone:
        print(*one_alone(given, alone))
        return
    for size in sets:
        if size != "nothing":
            parse_size(size)
    console = Console(stderr=True)
    cases = [(size, transport, way) for size in sets for transport in TRANSPORTS for way in ways]
    reports: dict[tuple[str, str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    unreplicated: dict[str, list[tuple[float, float]]] = {size: [] for size in sets}
    loads = []
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pairs", total=rounds * (len(cases) + len(sets)))
        for number in range(rounds):
            loads.append(round(os.getloadavg()[0], 2))
            for size in sets:
                progress.update(task, description=f"{size}, two guests that nobody replicates")
                unreplicated[size].append(two_alone(given, size))
                progress.advance(task)
            at = number % len(cases)
            for case in (*cases[at:], *cases[:at]):
                progress.update(task, description=", ".join(case))
                reports[case].append(one(given, *case))
                progress.advance(task)
    results = [
        {"set": size, "over": transport, "way": way, **medians(reports[size, transport, way], unreplicated[size])}
        for size, transport, way in cases
    ]
    if as_json:
        print_json({"rounds": rounds, **given, "load_before": loads, "results": results})
        return
    title = f"{given['checkpoints']} checkpoints, medians of {rounds} rounds; load before each: {loads}"
    print_fitted(Console(), title, COLUMNS, [row(result) for result in results])


if __name__ == "__main__":
    sys.exit(main())
