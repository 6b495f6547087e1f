# SPDX-License-Identifier: Apache-2.0
"""What the tests of the reference machine share: a host that makes machines, and ways to run them."""

from __future__ import annotations

import time
from contextlib import ExitStack

import numpy as np
import pytest

from colocache import Cache, Memory, MemoryShortError, RamImage, UnsupportedError
from colocache.vmm import GuestOptions, Machine, Ram, base, blocks_for, make_machine
from colocache.vmm.kvm import kvm_trouble

RAM_BYTES = 3 << 20
TROUBLE = kvm_trouble()
needs_kvm = pytest.mark.skipif(TROUBLE is not None, reason=" -- ".join(TROUBLE or ()))
KINDS = [
    pytest.param("kvm", "shm", marks=[pytest.mark.kvm, needs_kvm], id="kvm-shm"),
    pytest.param("kvm", "hugetlb", marks=[pytest.mark.kvm, pytest.mark.hugepages, needs_kvm], id="kvm-hugetlb"),
    pytest.param("process", "shm", id="process-shm"),
    pytest.param("process", "hugetlb", marks=pytest.mark.hugepages, id="process-hugetlb"),
]
every_guest = pytest.mark.parametrize(("kind", "backing"), KINDS)


class Collector:
    """A dirty log's target: an otherwise idle cache with blocks of the same sizes."""

    def __init__(self, stack: ExitStack) -> None:
        memory = stack.enter_context(Memory.create(blocks=blocks_for(RAM_BYTES), backing="shm"))
        self.cache = stack.enter_context(Cache.create(memory))
        self.epoch = 0

    def take(self) -> dict[str, set[int]]:
        """Pages marked since the last take, by block."""
        bits = {name: np.unpackbits(block.svm_bitmap.view(np.uint8), bitorder="little")
                for name, block in self.cache.blocks.items()}  # fmt: skip
        self.epoch += 1
        self.cache.device_state_buffer(self.epoch, 0)
        self.cache.seal(self.epoch)
        self.cache.flush()
        self.cache.loaded()
        return {name: set(np.flatnonzero(some).tolist()) for name, some in bits.items()}


class Host:
    """Makes machines, each on RAM of its own, and closes all of it."""

    def __init__(self, kind: str, backing: str) -> None:
        self.kind, self.backing = kind, backing
        self.stack = ExitStack()
        self.target = Collector(self.stack)
        self.images: list[list[RamImage]] = []

    def machine(self, **options: object) -> base.ReferenceMachine:
        images = []
        for spec in blocks_for(RAM_BYTES):
            try:
                images.append(self.stack.enter_context(RamImage.create(spec, self.backing)))
            except (MemoryShortError, UnsupportedError) as error:
                pytest.skip(str(error))
        self.images.append(images)
        rams = [Ram(one.spec.name, i, 4096, one.spec.n_pages, one.addr) for i, one in enumerate(images)]
        facts = {"steps_per_second": 0.0, "working_set_bytes": 1 << 30} | options
        made = make_machine(self.kind, rams, GuestOptions(**facts), self.target.cache.mark_dirty)
        self.stack.callback(made.close)
        assert isinstance(made, base.ReferenceMachine)
        return made

    def contents(self, at: int = 0) -> list[np.ndarray]:
        return [image.view.copy() for image in self.images[at]]


def run_steps(machine: base.ReferenceMachine, at_least: int = 50) -> None:
    """Resume, wait for some steps, pause."""
    goal = machine.steps + at_least
    machine.resume()
    wait_for(machine, goal)
    machine.pause()


def wait_for(machine: Machine, steps: int) -> None:
    deadline = time.monotonic() + 30
    while machine.steps < steps:
        assert machine.failure is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


def exact_steps(machine: base.ReferenceMachine, salt: int, n_steps: int) -> None:
    """The same steps on any machine: under this salt, up to this number."""
    box = machine._mailbox.box
    machine._history.append(machine.steps, salt)
    box.salt, box.limit, box.stop = salt, machine.steps + n_steps, 0
    machine._enter()
