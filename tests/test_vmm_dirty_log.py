# SPDX-License-Identifier: Apache-2.0
"""The dirty log of both guests, taken by the real engine, names every page that changed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from vmm_support import Host, every_guest, exact_steps, run_steps, wait_for

from colocache import (
    ArgumentError,
    BlockSpec,
    ColocacheError,
    KvmSlot,
    OrderError,
    RamImage,
    UffdDirtyLog,
    UffdRange,
    UnsupportedError,
)
from colocache.vmm.history import stores
from colocache.vmm.kvm import BOOT_SLOT, HIGH_SLOT, LOW_SLOT
from colocache.vmm.layout import LOW_ADDR, PAGE
from colocache.vmm.smaps import kernel_page_size


@pytest.fixture
def host(kind: str, backing: str) -> Iterator[Host]:
    made = Host(kind, backing)
    with made.stack:
        yield made


def kernel_keeps_logs() -> bool:
    """Whether this user, on this kernel, gets a log of a process's own mappings."""
    with RamImage.create(BlockSpec("probe", 4096), "shm") as image:
        try:
            UffdDirtyLog([UffdRange(0, 0, 1, image.addr)]).close()
        except ColocacheError:
            return False
        return True


@every_guest
def test_the_dirty_log_names_every_page_that_changed_and_no_page_is_lost(host: Host) -> None:
    machine = host.machine(run_pages=30, run_share=0.3)
    machine.boot()
    machine.discard_dirty_log()
    host.target.take()
    before = host.contents()
    seen = set()
    for _ in range(200):
        run_steps(machine, 3)
        machine.sync_dirty_log(host.target.cache)
        dirty = host.target.take()
        after = host.contents()
        for image, was, now in zip(host.images[0], before, after, strict=True):
            changed = set(np.flatnonzero((was != now).any(axis=1)).tolist())
            assert changed <= dirty[image.spec.name]
        # Nobody writes there, the CPU's own bits in the page tables are preset. But KVM counts as written what a CPU
        # may write, from the first time it is read: here the code.
        assert dirty["boot"] <= {machine.layout.code_page}
        seen |= dirty["pc.ram"]
        before = after
    split = machine.layout.split_page
    assert min(seen) < split < max(seen)  # both memory slots
    assert machine.verify().wrong == ()


@pytest.mark.kvm
@pytest.mark.parametrize(("kind", "backing"), [("kvm", "shm")])
def test_slots_that_change_lose_no_page(host: Host) -> None:
    """Taken out of the VM and put in again, with a new length in between, while the guest stands."""
    machine = host.machine()
    machine.boot()
    machine.discard_dirty_log()
    host.target.take()
    before = host.contents()
    run_steps(machine, 20)
    kvm, log, ram, half = machine._kvm, machine._log, machine.ram, machine.layout.split_page // 2
    split = machine.layout.split_page
    boot = KvmSlot(BOOT_SLOT, machine.boot_ram.index, 0, machine.boot_ram.n_pages)
    rest = KvmSlot(HIGH_SLOT, ram.index, split, ram.n_pages - split)
    with log.changing([boot, KvmSlot(LOW_SLOT, ram.index, 0, half), KvmSlot(9, ram.index, half, split - half), rest]):
        with pytest.raises(OrderError):
            machine.sync_dirty_log(host.target.cache)
        kvm.set_slot(LOW_SLOT, LOW_ADDR, ram.addr, 0, logged=False)
        kvm.set_slot(LOW_SLOT, LOW_ADDR, ram.addr, half * PAGE, logged=True)
        kvm.set_slot(9, LOW_ADDR + half * PAGE, ram.addr + half * PAGE, (split - half) * PAGE, logged=True)
    with pytest.raises(ArgumentError, match="slot 77"), log.changing([KvmSlot(77, ram.index, 0, half)]):
        pass
    log.changed([boot, KvmSlot(LOW_SLOT, ram.index, 0, half), KvmSlot(9, ram.index, half, split - half), rest])
    run_steps(machine, 20)
    machine.sync_dirty_log(host.target.cache)
    dirty, after = host.target.take(), host.contents()
    for image, was, now in zip(host.images[0], before, after, strict=True):
        assert set(np.flatnonzero((was != now).any(axis=1)).tolist()) <= dirty[image.spec.name]
    assert machine.verify().wrong == ()


@every_guest
def test_a_rewrite_is_dirty_though_nothing_changed(host: Host) -> None:
    machine = host.machine(rewrite_share=1.0, run_share=0.0)
    machine.boot()
    machine.discard_dirty_log()
    host.target.take()
    before = host.contents()
    run_steps(machine)
    machine.sync_dirty_log(host.target.cache)
    assert len(host.target.take()["pc.ram"]) > 1
    assert all(np.array_equal(was, now) for was, now in zip(before, host.contents(), strict=True))
    assert machine.verify().wrong == ()


@every_guest
def test_the_log_of_a_running_guest_loses_nothing(host: Host) -> None:
    """Background syncs, as on a primary: what they and the last one name together covers all that changed."""
    machine = host.machine()
    machine.boot()
    machine.discard_dirty_log()
    host.target.take()
    before = host.contents()
    machine.resume()
    for n in range(20):
        wait_for(machine, 20 * n)
        machine.sync_dirty_log(host.target.cache)
    machine.pause()
    machine.sync_dirty_log(host.target.cache)
    dirty = host.target.take()["pc.ram"]
    changed = set(np.flatnonzero((before[1] != host.contents()[1]).any(axis=1)).tolist())
    assert changed <= dirty


@every_guest
def test_discard_forgets_and_the_hint_begins_anew(host: Host) -> None:
    machine = host.machine()
    machine.boot()
    run_steps(machine, 200)
    assert 0 < machine.dirty_hint() <= machine.ram.n_pages
    machine.discard_dirty_log()
    assert machine.dirty_hint() == 0
    host.target.take()
    machine.sync_dirty_log(host.target.cache)
    assert host.target.take() == {"boot": set(), "pc.ram": set()}


@every_guest
def test_who_keeps_the_log_is_said(host: Host) -> None:
    machine = host.machine()
    assert kernel_page_size(host.images[0][1].addr) == (4096 if host.backing == "shm" else 2 << 20)
    if host.kind == "kvm":
        assert machine.dirty_source == "kvm"
    elif host.backing == "hugetlb":
        assert machine.dirty_source == "own"
    else:
        assert machine.dirty_source == ("uffd" if kernel_keeps_logs() else "own")


def test_bits_of_the_programs_own_log_come_back_if_the_target_does_not_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import colocache

    class NoLog:
        def __init__(self, _ranges: object) -> None:
            raise UnsupportedError("no such log here")

    monkeypatch.setattr(colocache, "UffdDirtyLog", NoLog)
    host = Host("process", "shm")
    with host.stack:
        machine = host.machine()
        assert machine.dirty_source == "own"
        machine.boot()
        host.target.take()
        exact_steps(machine, 3, 30)
        changed = set(stores(machine._history.array, machine._work, 0, 30).page.tolist())

        class Refuses:
            def sync_words(self, *_: object) -> None:
                raise ConnectionError

        with pytest.raises(ConnectionError):
            machine.sync_dirty_log(Refuses())  # type: ignore[arg-type]
        machine.sync_dirty_log(host.target.cache)
        assert host.target.take()["pc.ram"] >= changed > set()


@every_guest
def test_a_guest_that_never_ran_has_written_nothing(host: Host) -> None:
    """What the flush wrote before an SVM first runs is in the kernel's log of a process guest, but not its doing."""
    machine = host.machine()
    for image in host.images[0]:
        image.view[:] = 7
    machine.sync_dirty_log(host.target.cache)
    assert host.target.take() == {"boot": set(), "pc.ram": set()}
