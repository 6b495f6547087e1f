# SPDX-License-Identifier: Apache-2.0
"""After a takeover on bounded memory the machine goes on over one image, without a byte of it being lost on the way."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from colocache import BlockSpec, Cache, Memory, NoMemoryError, OrderError, RangeError, UnsupportedError
from colocache.private import private_bytes, private_write_back
from colocache.replication import fold as fold_module
from colocache.replication.blocks import rams_of_blocks
from colocache.replication.fold import Fold
from colocache.vmm import GuestOptions
from colocache.vmm.guests import guest_class
from colocache.vmm.machine import Machine

PAGE = 4096
RAM_BYTES = 4 << 20


def become_epoch_1(cache: Cache, machine: Machine | None = None) -> None:
    """Epoch 1, all zeros or what a primary of the same kind booted, is sealed, flushed and loaded."""
    state = b""
    if machine is not None:
        with Primary(machine.kind) as primary:
            state = primary.state
            for block, image in zip(cache.blocks.values(), primary.images, strict=True):
                cache.receive_pages(1, block, np.arange(block.n_pages, dtype=np.uint64), image)
    else:
        for block in cache.blocks.values():
            cache.receive_zero(1, block, 0, block.n_pages)
    cache.device_state_buffer(1, len(state))[:] = state
    cache.seal(1)
    cache.flush()
    if machine is not None:
        machine.load_device_state(state)
    cache.loaded()


class Primary:
    """A machine that ran for a while: its memory and its device state."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> Primary:
        cls = guest_class(self._kind)
        self._memory = Memory.create(None, cls.blocks_for(RAM_BYTES), backing="shm")
        self._cache = Cache.create(self._memory)
        rams = rams_of_blocks(self._cache.blocks.values(), self._memory.images)
        self._machine = cls(rams, GuestOptions(), lambda *_: None)
        self._machine.boot()
        self.state = self._machine.save_device_state()
        self.images = [np.array(block.guest) for block in self._cache.blocks.values()]
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.close()
        self._cache.close()
        self._memory.unlink()
        self._memory.close()


class Events:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event: str, _sentence: str = "", **fields: Any) -> None:
        self.said.append((event, fields))


@pytest.fixture
def memory(region_name: str, request: pytest.FixtureRequest) -> Any:
    blocks = getattr(request, "param", None) or [BlockSpec("boot", 3 * PAGE), BlockSpec("ram", 1 << 20)]
    with Memory.create(region_name, blocks, backing="shm", memory_mode="bounded") as made:
        yield made


def test_the_image_takes_what_the_machine_wrote_only_after_a_takeover(memory: Memory) -> None:
    with Cache.create(memory) as cache:
        become_epoch_1(cache)
        ram = cache.blocks["ram"]
        with ram.writable(7, 20) as pages:
            pages[:] = 0xA5
            image = memory.images[1].guest_fd
            with pytest.raises(OrderError, match="after a takeover"):
                cache.fold("ram", 0, 256)
            assert os.pread(image, 20 * PAGE, 7 * PAGE) == bytes(20 * PAGE)
            cache.failover()
            with pytest.raises(RangeError):
                cache.fold("ram", 1, 256)
            assert cache.fold("ram", 0, 10) == 3 * PAGE
            assert cache.private_bytes() == 17 * PAGE
            assert cache.fold("ram", 10, 246) == 17 * PAGE
            assert cache.private_bytes() == 0
            assert os.pread(image, 20 * PAGE, 7 * PAGE) == b"\xa5" * (20 * PAGE)
            pages[0] = 0x11  # the same addresses, and the image at once
            assert os.pread(image, PAGE, 7 * PAGE) == b"\x11" * PAGE
            assert cache.private_bytes() == 0


def test_mirrored_memory_has_nothing_to_fold(make_memory: Any) -> None:
    with Cache.create(make_memory()) as cache:
        cache.failover() if cache.status().sealed_epoch else None
        with pytest.raises(UnsupportedError, match="mirrored"):
            cache.fold(0, 0, 1)


def test_what_is_private_here_can_be_written_back_by_hand(memory: Memory) -> None:
    with Cache.create(memory) as cache:
        become_epoch_1(cache)
        ram, image = cache.blocks["ram"], memory.images[1].guest_fd
        with ram.writable(3, 2) as pages:
            pages[:] = 0x77
            assert private_write_back(0, ram.guest_addr, ram.len_bytes, image, 0) == 2 * PAGE
            assert private_bytes(0, ram.guest_addr, ram.len_bytes) == 2 * PAGE
        assert os.pread(image, 3 * PAGE, 3 * PAGE) == b"\x77" * (2 * PAGE) + bytes(PAGE)


@pytest.mark.parametrize("kind", ["process", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_a_guest_that_took_over_runs_on_over_one_image(
    region_name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded part by part between its steps, every page is what its history says; from then on nothing is private."""
    cls = guest_class(kind)
    if (trouble := cls.trouble()) is not None:
        pytest.skip(trouble[0])
    monkeypatch.setattr(fold_module, "PART_BYTES", 1 << 20)
    with (
        Memory.create(region_name, cls.blocks_for(RAM_BYTES), backing="shm", memory_mode="bounded") as memory,
        Cache.create(memory) as cache,
    ):
        rams = rams_of_blocks(cache.blocks.values(), memory.images, private=True)
        machine = cls(rams, GuestOptions(), lambda *_: None)
        try:
            become_epoch_1(cache, machine)
            cache.failover()
            events = Events()
            svm = SimpleNamespace(cache=cache, machine=machine, pause=machine.pause, resume=machine.resume)
            fold = Fold(svm, events)  # type: ignore[arg-type]
            machine.resume()
            run(machine, 300)
            while fold.rest is not None:
                run(machine, 20)
                fold.step()
            run(machine, 300)
            machine.pause()
            ((name, told),) = events.said
            assert (name, told["pauses"]) == ("folded", 5)
            assert told["bytes"] > 0
            assert cache.private_bytes() == 0
            report = machine.verify()
            assert (report.n_pages, report.wrong) == (RAM_BYTES // PAGE, ())
            shown = b"".join(os.pread(one.guest_fd, one.spec.len_bytes, 0) for one in memory.images)
            assert shown == b"".join(bytes(block.guest) for block in cache.blocks.values())
        finally:
            machine.close()


def run(machine: Machine, steps: int) -> None:
    """So many more steps."""
    until = machine.steps + steps
    waited = threading.Event()
    while machine.steps < until:
        assert machine.failure is None
        waited.wait(0.002)


def test_a_fold_that_fails_costs_the_machine_nothing(memory: Memory) -> None:
    """The file system is full: it is told once, and the machine runs on as it was."""
    calls: list[str] = []

    def no_room(*_: object) -> int:
        calls.append("fold")
        raise NoMemoryError("the file system of the guest image is full")

    with Cache.create(memory) as cache:
        become_epoch_1(cache)
        cache.failover()
        machine = SimpleNamespace(fold=no_room)
        events = Events()
        svm = SimpleNamespace(
            cache=cache, machine=machine, pause=lambda: calls.append("pause"), resume=lambda: calls.append("resume")
        )
        fold = Fold(svm, events)  # type: ignore[arg-type]
        for _ in range(3):
            fold.step()
        assert calls == ["pause", "fold", "resume"]
        assert [name for name, _ in events.said] == ["fold_error"]
        assert fold.rest is None


def test_mirrored_machines_do_not_stand_for_it(make_memory: Any) -> None:
    with Cache.create(make_memory()) as cache:
        fold = Fold(SimpleNamespace(cache=cache), Events())  # type: ignore[arg-type]
        fold.step()
        assert fold.rest is None
