# SPDX-License-Identifier: Apache-2.0
"""What only a guest can tell of a pause: how long its dirty log takes to sync, and its device state to load."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from time import perf_counter_ns

from colocache import Cache, Memory
from colocache.measure.clock import undisturbed
from colocache.vmm.guests import blocks_for, guest_kind_available, make_machine
from colocache.vmm.machine import Ram
from colocache.vmm.workload import GuestOptions

RAM_BYTES = 64 << 20
DIRTY_PAGES = 4096  # of the 8,192 that the guest writes at random
PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class GuestTimes:
    """Medians of some pauses of the reference guest."""

    kind: str
    sync_ns_per_page: float
    sync_pages: int  # dirty pages of the median pause
    load_ns: int
    state_bytes: int


def guest_times(rounds: int) -> GuestTimes:
    """Let the best guest that this machine has run and stop so often. MachineError, MemoryShortError."""
    kind, _ = guest_kind_available()
    syncs, loads, pages = [], [], []
    with (
        Memory.create(blocks=blocks_for(RAM_BYTES, kind), backing="shm") as memory,
        Cache.create(memory, threads=1) as cache,
    ):
        rams = [
            Ram(block.name, block.index, block.page_size, block.n_pages, block.guest_addr)
            for block in cache.blocks.values()
        ]
        options = GuestOptions(working_set_bytes=RAM_BYTES // 2, steps_per_second=0)
        machine = make_machine(kind, rams, options, cache.mark_dirty)
        try:
            machine.boot()
            machine.discard_dirty_log()
            for _ in range(rounds):
                machine.resume()
                until = time.monotonic() + PATIENCE_SECONDS
                while machine.dirty_hint() < DIRTY_PAGES and time.monotonic() < until:
                    time.sleep(0.001)
                machine.pause()
                pages.append(max(1, machine.dirty_hint()))
                with undisturbed():
                    start = perf_counter_ns()
                    machine.sync_dirty_log(cache)
                    syncs.append(perf_counter_ns() - start)
                state = machine.save_device_state()
                with undisturbed():
                    start = perf_counter_ns()
                    machine.load_device_state(state)
                    loads.append(perf_counter_ns() - start)
        finally:
            machine.close()
    per_page = median(took / count for took, count in zip(syncs, pages, strict=True))
    return GuestTimes(kind, per_page, round(median(pages)), round(median(loads)), len(state))
