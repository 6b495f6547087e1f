# SPDX-License-Identifier: Apache-2.0
"""Bounded memory beside the mirror: what a secondary needs beyond one image, how long it stands, how fast its guest is.

    sudo .venv/bin/python bench/bounded.py [--ram 1G] [--share 10] [--working-set 8M] [--rounds 1] [--spill DIR]

Memory: for each recorded trace a secondary in a memory control group of its own receives the pages of one interval
after the other, while its VM writes those of another; each interval ends with a checkpoint, and bounded memory brings
one forward when staged and private pages come near --share per cent of guest RAM. Told is the kernel's own peak of the
group from epoch 1 on, less the one image: page tables, bitmaps and Python's heap are in it. Needs root and a version-1
or version-2 memory group; without, that part is left out.

Speed: a guest under KVM that writes flat out, with a checkpoint every 100 ms, for some working sets: steps in a second
between the pauses. Each first write of an epoch costs a fault: with the mirror to note the page, bounded to copy it.

Spilling: an epoch of scattered pages that its limit has room for, or of which all but an eighth goes to the disk that
--spill is on: how long it takes to come, and its flush.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from colocache import BlockSpec, Cache, Memory
from colocache.commands.options import parse_size
from colocache.errors import ArgumentError
from colocache.measure.baseline import pages_at
from colocache.measure.patterns import WORKLOADS, n_intervals, recorded
from colocache.replication.blocks import rams_of_blocks
from colocache.spill import check_folder
from colocache.vmm import GuestOptions
from colocache.vmm.guests import guest_class
from colocache.vmm.kvm import kvm_trouble

PAGE = 4096
BLOCK = "pc.ram"
MODES = ("mirror", "bounded")
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # version 1, version 2
PEAKS = ("memory.max_usage_in_bytes", "memory.peak")
STEP_PAGES = 256  # that come, or are written, between two looks at the limit
MARGIN_PAGES = 6 * STEP_PAGES  # a step of each, and what the kernel holds in stock for each core
SPEED_RAM, SPEED_CHECKPOINTS, SPEED_SECONDS = 256 << 20, 12, 0.1
SPEED_SETS = ("2M", "8M", "32M", "128M")
SPILL_EVERY = 4  # th page of guest RAM comes


@dataclass
class MemoryFigures:
    """Of one trace in one mode; bytes, milliseconds."""

    workload: str
    mode: str
    extra_bytes: int  # the kernel's peak beyond one image
    checkpoints: int
    brought_forward: int
    pause_p50_ms: float
    pause_max_ms: float


@dataclass
class SpeedFigures:
    """Of one mode and working set in one round."""

    mode: str
    working_set_bytes: int
    steps_per_second: float
    pause_p50_ms: float


@dataclass
class SpillFigures:
    """Of an epoch, in one round; milliseconds."""

    spilled_bytes: int
    receive_ms: float
    seal_ms: float
    flush_ms: float


# ---- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_group() -> Iterator[Path | None]:
    """A fresh memory control group; None: there can be none here."""
    for root in GROUPS:
        group = root / f"colocache-bench-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
        if any((group / peak).exists() for peak in PEAKS):
            try:
                yield group
            finally:
                group.rmdir()
            return
        with contextlib.suppress(OSError):
            group.rmdir()
    yield None


def replay(group: Path, workload: str, mode: str, backing: str, ram: int, share: float, answer: Any) -> None:
    """In a process of its own: all intervals of a trace; puts MemoryFigures into `answer`."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    peak = next(group / name for name in PEAKS if (group / name).exists())
    with (
        Memory.create(None, [BlockSpec(BLOCK, ram)], backing=backing, memory_mode=mode) as memory,
        Cache.create(memory) as cache,
    ):
        secondary = Secondary(cache)
        secondary.become_epoch_1()
        peak.write_text("0")  # it is what is used now: one image, and what is there in every epoch
        room = int(ram * share / 100) - (int(peak.read_text()) - ram)
        secondary.most_pages = room // PAGE - MARGIN_PAGES
        n = n_intervals(workload)
        for interval in range(n):
            ours = np.flatnonzero(recorded(workload, interval, secondary.n_pages).bits)
            theirs = np.flatnonzero(recorded(workload, interval + n // 2, secondary.n_pages).bits)
            secondary.interval(ours, theirs)
        extra, pauses = int(peak.read_text()) - ram, secondary.pauses_ms
        told = MemoryFigures(
            workload, mode, extra, len(pauses), len(pauses) - n, statistics.median(pauses), max(pauses)
        )
    answer.send(told)


class Secondary:
    """The engine with a VM that writes what it is told to; all of it in this process."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.block = cache.blocks[BLOCK]
        self.n_pages = self.block.n_pages
        self.bounded = cache.status().memory_mode == "bounded"
        self.most_pages = self.n_pages  # staged and private
        self.vm = pages_at(self.block.guest_addr, self.n_pages).view(np.uint64)
        self.epoch = 1
        self.pauses_ms: list[float] = []
        self._page = np.random.default_rng(1).integers(0, 256, (STEP_PAGES, PAGE), np.uint8)
        self._arrived, self._written = (np.zeros(self.n_pages, np.bool_) for _ in range(2))

    def become_epoch_1(self) -> None:
        for first in range(0, self.n_pages, STEP_PAGES):
            pfns = np.arange(first, min(first + STEP_PAGES, self.n_pages), dtype=np.uint64)
            self.cache.receive_pages(1, self.block, pfns, self._page[: pfns.size])
        self._checkpoint()
        self.pauses_ms.clear()

    def interval(self, ours: Any, theirs: Any) -> None:
        """Pages of the primary come while the VM writes; then a checkpoint."""
        for first in range(0, max(ours.size, theirs.size), STEP_PAGES):
            come, written = ours[first : first + STEP_PAGES], theirs[first : first + STEP_PAGES]
            if self.bounded and np.count_nonzero(self._arrived) + np.count_nonzero(self._written) > self.most_pages:
                self._checkpoint()
            self.cache.receive_pages(self.epoch, self.block, come.astype(np.uint64), self._page[: come.size])
            self.vm[written, 0] += np.uint64(1)
            self._arrived[come] = self._written[written] = True
        self._checkpoint()

    def _checkpoint(self) -> None:
        if not self.bounded:
            words = np.zeros(-(-self.n_pages // 64), np.uint64)
            bits = np.packbits(self._written, bitorder="little")
            words.view(np.uint8)[: bits.size] = bits
            self.cache.sync_words(self.block, words)
        self.cache.device_state_buffer(self.epoch, 0)
        begin = time.perf_counter()
        self.cache.seal(self.epoch)
        self.cache.flush()
        self.cache.loaded()
        self.pauses_ms.append((time.perf_counter() - begin) * 1e3)
        if self.bounded:
            self.cache.free_staged()
        self.epoch += 1
        self._arrived[:] = self._written[:] = False


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(mode: str, backing: str, working_set: int) -> SpeedFigures:
    """A KVM guest that writes flat out between checkpoints."""
    kind = guest_class("kvm")
    options = GuestOptions(steps_per_second=0.0, working_set_bytes=working_set, run_share=0.0)
    specs = kind.blocks_for(SPEED_RAM)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(Memory.create(None, specs, backing=backing, memory_mode=mode))
        cache = stack.enter_context(Cache.create(memory))
        state = first_state(kind, options, cache)
        rams = rams_of_blocks(cache.blocks.values(), memory.images, private=mode == "bounded")
        machine = kind(rams, options, cache.mark_dirty)
        stack.callback(machine.close)
        rates, pauses = [], []
        for epoch in range(1, SPEED_CHECKPOINTS + 1):
            begin = time.perf_counter()
            if epoch > 1:
                machine.pause()
                machine.sync_dirty_log(cache)
            cache.device_state_buffer(epoch, len(state))[:] = state
            cache.seal(epoch)
            cache.flush()
            machine.load_device_state(state)
            cache.loaded()
            if epoch == 1:
                machine.discard_dirty_log()
            steps = machine.steps
            begun = time.perf_counter()
            machine.resume()
            cache.free_staged()  # while it runs, as a secondary does
            time.sleep(SPEED_SECONDS)
            rates.append((machine.steps - steps) / (time.perf_counter() - begun))
            pauses.append((begun - begin) * 1e3)
        machine.pause()
    return SpeedFigures(mode, working_set, statistics.median(rates[1:]), statistics.median(pauses[1:]))


def spilling(folder: Path, n_bytes: int, spills: bool) -> SpillFigures:
    """Every fourth page comes, one by one."""
    block = BlockSpec(BLOCK, SPILL_EVERY * n_bytes)
    with (
        Memory.create(None, [block], backing="shm", memory_mode="bounded", spill=folder) as memory,
        Cache.create(memory) as cache,
    ):
        secondary = Secondary(cache)
        secondary.become_epoch_1()
        cache.limit_staged(n_bytes // 8 if spills else 0)
        pfns = np.arange(0, secondary.n_pages, SPILL_EVERY, dtype=np.uint64)
        pages = np.full((STEP_PAGES, PAGE), 7, np.uint8)
        begin = time.perf_counter()
        for first in range(0, pfns.size, STEP_PAGES):
            cache.receive_pages(2, BLOCK, pfns[first : first + STEP_PAGES], pages)
        came = time.perf_counter()
        cache.device_state_buffer(2, 0)
        cache.seal(2)
        sealed = time.perf_counter()
        spilled = cache.flush().spilled_pages * PAGE
        flushed = time.perf_counter()
        cache.loaded()
    return SpillFigures(spilled, (came - begin) * 1e3, (sealed - came) * 1e3, (flushed - sealed) * 1e3)


def first_state(kind: Any, options: GuestOptions, cache: Cache) -> bytes:
    """Epoch 1 arrives: the memory of a machine that was just booted, whose device state is returned."""
    specs = [BlockSpec(block.name, block.len_bytes, block.page_size) for block in cache.blocks.values()]
    with Memory.create(None, specs, backing="shm") as memory, Cache.create(memory) as other:
        machine = kind(rams_of_blocks(other.blocks.values(), memory.images), options, lambda *_: None)
        try:
            machine.boot()
            state: bytes = machine.save_device_state()
            for block, theirs in zip(cache.blocks.values(), other.blocks.values(), strict=True):
                cache.receive_pages(1, block, np.arange(block.n_pages, dtype=np.uint64), np.array(theirs.guest))
        finally:
            machine.close()
    return state


# ---- the rounds ------------------------------------------------------------------------------------------------------


@click.command(help=__doc__)
@click.option("--ram", type=parse_size, default="1G", help="guest RAM for the traces (default 1G)")
@click.option("--share", type=click.FloatRange(1, 100), default=10.0, help="per cent of it that may be taken beside it")
@click.option("--workload", "workloads", multiple=True, type=click.Choice(WORKLOADS), default=WORKLOADS)
@click.option("--working-set", "sets", multiple=True, type=parse_size, default=SPEED_SETS, help="of the guest's speed")
@click.option("--backing", type=click.Choice(("shm", "thp")), default="shm", help="pages of the images")
@click.option("--rounds", type=click.IntRange(1), default=3, help="of the guest's speed, and of spilling")
@click.option("--spill", default="/var/tmp", show_default=True, help="a folder on a disk")  # noqa: S108 -- names of its own
@click.option("--spill-epoch", type=parse_size, default="64M", show_default=True, help="how much comes for that")
@click.option("--json", "as_json", is_flag=True, help="every figure instead of the tables")
def main(
    ram: int,
    share: float,
    workloads: tuple[str, ...],
    sets: tuple[int, ...],
    backing: str,
    rounds: int,
    spill: str,
    spill_epoch: int,
    as_json: bool,
) -> None:
    memory: list[MemoryFigures] = []
    speeds: list[SpeedFigures] = []
    spills: list[SpillFigures] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("traces", total=len(workloads) * len(MODES))
        for workload in workloads:
            for mode in MODES:
                with memory_group() as group:
                    if group is None:
                        print("no memory control group can be made here: the traces are left out", file=sys.stderr)
                        workloads = ()
                        break
                    memory.append(in_a_process(replay, group, workload, mode, backing, ram, share))
                progress.advance(task)
        task = progress.add_task("speed", total=rounds * len(MODES) * len(sets))
        if (trouble := kvm_trouble()) is not None:
            print(f"the guest's speed is left out: {trouble[0]}", file=sys.stderr)
        else:
            for _ in range(rounds):
                for working_set in sets:
                    for mode in MODES:
                        speeds.append(speed(mode, backing, working_set))
                        progress.advance(task)
        try:
            folder = check_folder(spill)
        except ArgumentError as error:
            print(f"spilling is left out: {error}", file=sys.stderr)
        else:
            spills = [spilling(folder, spill_epoch, spills) for _ in range(rounds) for spills in (False, True)]
    if as_json:
        print(json.dumps({"ram_bytes": ram, "memory": [asdict(one) for one in memory],
                          "speed": [asdict(one) for one in speeds],
                          "spill": [asdict(one) for one in spills]}))  # fmt: skip
        return
    console = Console()
    if memory:
        console.print(memory_table(memory, ram))
    if speeds:
        console.print(speed_table(speeds))
    if spills:
        console.print(spill_table(spills, spill_epoch))


def in_a_process(work: Callable[..., None], *args: Any) -> Any:
    """What `work` tells, done where nothing else is counted."""
    ours, theirs = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(target=work, args=(*args, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise click.ClickException("a process ended before it told its figures: its words are above") from None
    finally:
        process.join()


def memory_table(figures: list[MemoryFigures], ram: int) -> Table:
    table = Table(box=SIMPLE, title=f"Beyond one image of {ram >> 20} MiB, by the kernel's peak")
    for title in ("trace", "memory", "MiB", "of RAM", "pauses", "early", "p50, ms", "max, ms"):
        table.add_column(title, justify="left" if title in ("trace", "memory") else "right")
    for one in figures:
        table.add_row(
            one.workload, one.mode, f"{one.extra_bytes / (1 << 20):.1f}", f"{100 * one.extra_bytes / ram:.1f} %",
            str(one.checkpoints), str(one.brought_forward), f"{one.pause_p50_ms:.2f}", f"{one.pause_max_ms:.2f}",
        )  # fmt: skip
    return table


def speed_table(figures: list[SpeedFigures]) -> Table:
    table = Table(box=SIMPLE, title="A KVM guest that writes flat out, a checkpoint every 100 ms")
    for title in ("working set", "memory", "steps a second (least, most)", "of the mirror's", "flush and load, ms"):
        table.add_column(title, justify="right")
    for working_set in dict.fromkeys(one.working_set_bytes for one in figures):
        mirror = 0.0
        for mode in MODES:
            mine = [one for one in figures if (one.mode, one.working_set_bytes) == (mode, working_set)]
            rates = [one.steps_per_second for one in mine]
            rate = statistics.median(rates)
            mirror = mirror or rate
            table.add_row(
                f"{working_set >> 20} MiB", mode, f"{rate:,.0f} ({min(rates):,.0f}, {max(rates):,.0f})",
                f"{100 * rate / mirror:.0f} %", f"{statistics.median(one.pause_p50_ms for one in mine):.2f}",
            )  # fmt: skip
    return table


def spill_table(figures: list[SpillFigures], n_bytes: int) -> Table:
    table = Table(box=SIMPLE, title=f"An epoch of {n_bytes >> 20} MiB of scattered pages")
    for title in ("on the disk", "to come, ms (least, most)", "seal, ms", "flush, ms (least, most)"):
        table.add_column(title, justify="right")
    for spilled in sorted({one.spilled_bytes for one in figures}):
        mine = [one for one in figures if one.spilled_bytes == spilled]
        come, flush = [one.receive_ms for one in mine], [one.flush_ms for one in mine]
        table.add_row(
            f"{spilled >> 20} MiB", f"{statistics.median(come):.0f} ({min(come):.0f}, {max(come):.0f})",
            f"{statistics.median(one.seal_ms for one in mine):.2f}",
            f"{statistics.median(flush):.1f} ({min(flush):.1f}, {max(flush):.1f})",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
