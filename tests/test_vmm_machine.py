# SPDX-License-Identifier: Apache-2.0
"""Both guests, on the real engine: they do what their history says; their dirty log names every page they changed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from colocache import BlockSpec, Cache, Memory, MemoryShortError, RamImage, UnsupportedError
from colocache.errors import ArgumentError, ClosedError, OrderError
from colocache.vmm import (
    DeviceStateError,
    GuestOptions,
    Machine,
    MachineError,
    Ram,
    base,
    blocks_for,
    guest_kind_available,
    make_machine,
)
from colocache.vmm.history import stores
from colocache.vmm.kvm import split_registers
from colocache.vmm.machine import kvm_trouble
from colocache.vmm.smaps import kernel_page_size

RAM_BYTES = 3 << 20
TROUBLE = kvm_trouble()
needs_kvm = pytest.mark.skipif(TROUBLE is not None, reason=str(TROUBLE))
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


@pytest.fixture
def host(kind: str, backing: str) -> Iterator[Host]:
    made = Host(kind, backing)
    with made.stack:
        yield made


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


# ---- the program --------------------------------------------------------------------------------------------------


@every_guest
def test_memory_is_what_the_history_says_after_every_pause(host: Host) -> None:
    machine = host.machine()
    machine.boot()
    assert machine.verify().wrong == ()
    for _ in range(5):
        run_steps(machine)
        report = machine.verify()
        assert report.wrong == ()
        assert report.n_pages == RAM_BYTES // 4096
    assert len(machine._history) == 5


@pytest.mark.kvm
@needs_kvm
def test_the_same_salts_make_the_same_memory_in_kvm_and_in_a_process() -> None:
    memories = []
    for kind in ("kvm", "process"):
        host = Host(kind, "shm")
        with host.stack:
            machine = host.machine(run_pages=40, run_share=0.2, rewrite_share=0.2)
            machine.boot()
            for salt, n_steps in [(7, 400), (8, 1), (9, 0), (10, 777)]:
                exact_steps(machine, salt, n_steps)
            assert machine.steps == 1178
            assert machine.verify().wrong == ()
            memories.append(host.contents())
    for kvm, process in zip(*memories, strict=True):
        assert np.array_equal(kvm, process)


@every_guest
def test_verify_finds_any_page_that_is_not_as_it_must_be(host: Host) -> None:
    machine = host.machine()
    machine.boot()
    run_steps(machine)
    boot, ram = host.images[0]
    last = ram.spec.n_pages - 1
    for image, page in [(boot, 0), (boot, 5), (boot, boot.spec.n_pages - 1), (ram, 0), (ram, last)]:
        image.view[page, 4095] ^= 0x80
        assert machine.verify().wrong == ((image.spec.name, page),)
        image.view[page, 4095] ^= 0x80
    ram.view[:] = 0
    assert len(machine.verify().wrong) > 0


@every_guest
def test_two_machines_with_one_beginning_drift_apart(host: Host) -> None:
    first, second = host.machine(), host.machine()
    for machine in (first, second):
        machine.boot()
    exact_steps(first, 5, 100)
    state = first.save_device_state()
    for mine, theirs in zip(host.images[1], host.images[0], strict=True):
        mine.view[:] = theirs.view
    second.load_device_state(state)
    for machine in (first, second):
        run_steps(machine)
    n_common = min(len(first._history), len(second._history)) - 1
    assert first._history.array[:n_common].tolist() == second._history.array[:n_common].tolist()
    assert first._history.array[-1, 1] != second._history.array[-1, 1]
    assert not np.array_equal(host.images[0][1].view, host.images[1][1].view)


@every_guest
def test_pause_stands_at_a_step_boundary_and_stays_there(host: Host) -> None:
    machine = host.machine(run_pages=200, run_share=1.0, rewrite_share=0.0)
    machine.boot()
    for _ in range(10):
        run_steps(machine, 1)
        before, steps = host.contents(), machine.steps
        machine.pause()
        time.sleep(0.005)
        assert machine.steps == steps
        assert all(np.array_equal(was, now) for was, now in zip(before, host.contents(), strict=True))
        assert machine.verify().wrong == ()


@every_guest
def test_a_slow_guest_pauses_at_once_and_keeps_its_rate(host: Host) -> None:
    machine = host.machine(steps_per_second=20)
    machine.boot()
    begin = time.monotonic()
    run_steps(machine, 3)
    assert machine.steps <= 1 + 20 * (time.monotonic() - begin)
    assert machine.verify().wrong == ()


# ---- the dirty log --------------------------------------------------------------------------------------------------


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
    assert machine.dirty_source == ("kvm" if host.kind == "kvm" else "own" if host.backing == "hugetlb" else "uffd")


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


# ---- device state ---------------------------------------------------------------------------------------------------


@every_guest
@pytest.mark.parametrize("with_hashes", [True, False])
def test_a_state_makes_another_machine_go_on_where_the_first_stood(host: Host, with_hashes: bool) -> None:
    first, second = host.machine(), host.machine(working_set_bytes=4096)
    first.boot()
    run_steps(first)
    run_steps(first)
    state = first.save_device_state(with_hashes=with_hashes)
    second.check_device_state(memoryview(state))
    for mine, theirs in zip(host.images[1], host.images[0], strict=True):
        mine.view[:] = theirs.view
    host.target.take()
    report = second.load_device_state(memoryview(state))
    assert report.wrong_pages == ()
    assert report.epoch_hashes_checked == (RAM_BYTES // 4096 if with_hashes else 0)
    assert second.steps == first.steps
    assert second.verify().wrong == ()
    # the write of the load was marked, and it is a real one
    shadow = second.layout.shadow_page
    assert host.target.take() == {"boot": {shadow}, "pc.ram": set()}
    assert not np.array_equal(host.images[0][0].view[shadow], host.images[1][0].view[shadow])
    run_steps(second)
    assert second.verify().wrong == ()
    assert first.verify().wrong == ()
    # and back: the first takes what the second made of it
    for mine, theirs in zip(host.images[0], host.images[1], strict=True):
        mine.view[:] = theirs.view
    assert first.load_device_state(second.save_device_state(with_hashes=True)).wrong_pages == ()
    run_steps(first)
    assert first.verify().wrong == ()


@every_guest
def test_a_page_that_is_not_the_primarys_is_found_at_load(host: Host) -> None:
    first, second = host.machine(), host.machine()
    first.boot()
    run_steps(first)
    state = first.save_device_state(with_hashes=True)
    for mine, theirs in zip(host.images[1], host.images[0], strict=True):
        mine.view[:] = theirs.view
    boot, ram = host.images[1]
    boot.view[1, 0] ^= 1
    ram.view[ram.spec.n_pages - 1, 4095] ^= 1
    assert second.load_device_state(state).wrong_pages == (("boot", 1), ("pc.ram", ram.spec.n_pages - 1))


@every_guest
def test_a_shadow_page_that_was_not_restored_is_found_at_the_next_load(host: Host) -> None:
    """Every load draws anew, so its page differs from the primary's: a flush that leaves it out can't pass unseen."""
    first, second = host.machine(), host.machine()
    first.boot()
    for _ in range(2):
        run_steps(first)
        state = first.save_device_state(with_hashes=True)
        host.images[1][1].view[:] = host.images[0][1].view
        if not second._ready:
            host.images[1][0].view[:] = host.images[0][0].view
        report = second.load_device_state(state)
    assert report.wrong_pages == (("boot", second.layout.shadow_page),)


@every_guest
def test_a_state_that_is_refused_changes_nothing(host: Host) -> None:
    machine = host.machine()
    machine.boot()
    run_steps(machine)
    good = machine.save_device_state()
    before, steps = host.contents(), machine.steps
    host.target.take()
    for bad in (b"", b"x" * 1000, good[:-1], good[:100] + b"\xff" + good[101:]):
        for what in (machine.check_device_state, machine.load_device_state):
            with pytest.raises(DeviceStateError):
                what(bad)
    assert machine.steps == steps
    assert all(np.array_equal(was, now) for was, now in zip(before, host.contents(), strict=True))
    assert host.target.take()["boot"] == set()
    run_steps(machine)
    assert machine.verify().wrong == ()


@pytest.mark.kvm
@needs_kvm
@pytest.mark.parametrize(("name", "value"), [("rip", 0x4000), ("rflags", 0x3202), ("rsp", 0x1000), ("cr3", 0x2000)])
def test_registers_that_are_not_this_guests_are_refused(name: str, value: int) -> None:
    host = Host("kvm", "shm")
    with host.stack:
        machine = host.machine()
        machine.boot()
        run_steps(machine)
        registers = machine._save_registers()
        machine._check_registers(registers)
        regs, sregs = split_registers(registers)
        setattr(sregs if name == "cr3" else regs, name, value)
        with pytest.raises(DeviceStateError, match=f"not of this guest.*{name} {value:#x}"):
            machine._check_registers(bytes(regs) + bytes(sregs))
        with pytest.raises(DeviceStateError, match="bytes of registers"):
            machine._check_registers(registers[:-8])


@pytest.mark.kvm
@needs_kvm
def test_a_kvm_state_is_nothing_for_a_process_guest() -> None:
    kvm, process = Host("kvm", "shm"), Host("process", "shm")
    with kvm.stack, process.stack:
        machine = kvm.machine()
        machine.boot()
        with pytest.raises(DeviceStateError, match="kind kvm, this one is process"):
            process.machine().check_device_state(machine.save_device_state())


# ---- order, failure, the end --------------------------------------------------------------------------------------


@every_guest
def test_calls_out_of_order_are_refused(host: Host) -> None:
    machine = host.machine()
    for what in (machine.resume, machine.save_device_state, machine.verify):
        with pytest.raises(OrderError, match="neither booted nor given a device state"):
            what()
    machine.boot()
    state = machine.save_device_state()
    machine.resume()
    for refused in (machine.boot, machine.save_device_state, machine.verify, lambda: machine.load_device_state(state)):
        with pytest.raises(OrderError, match="pause it first"):
            refused()
    machine.close()
    machine.close()
    for refused in (machine.resume, machine.pause, machine.verify, machine.discard_dirty_log):
        with pytest.raises(ClosedError):
            refused()
    assert machine.steps >= 0


@every_guest
def test_a_machine_that_runs_can_be_closed(host: Host) -> None:
    machine = host.machine()
    machine.boot()
    machine.resume()
    machine.close()
    was = host.contents()
    time.sleep(0.01)
    assert all(np.array_equal(old, new) for old, new in zip(was, host.contents(), strict=True))


@pytest.mark.kvm
@needs_kvm
def test_a_vcpu_that_dies_is_told_and_never_waited_for() -> None:
    host = Host("kvm", "shm")
    with host.stack:
        machine = host.machine()
        machine.boot()
        code = machine.layout.code_page
        host.images[0][0].view[code : code + 2] = 0x0F  # no instruction
        machine.resume()
        deadline = time.monotonic() + 10
        while machine.failure is None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert "exit reason" in (machine.failure or "")
        for what in (machine.pause, machine.resume):
            with pytest.raises(MachineError, match="does not run any more: the vCPU came out with exit reason"):
                what()


@pytest.mark.kvm
@needs_kvm
def test_a_vcpu_that_hears_no_stop_is_kicked_out_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colocache.vmm.runner.PATIENCE", 0.3)
    host = Host("kvm", "shm")
    with host.stack:
        machine = host.machine()
        machine.boot()
        code = machine.layout.code_page
        host.images[0][0].view[code].reshape(-1)[:2] = (0xEB, 0xFE)  # jmp to itself
        machine.resume()
        time.sleep(0.05)
        with pytest.raises(MachineError, match="no step boundary"):
            machine.pause()
        machine.close()  # the thread is got out of the guest all the same


@every_guest
def test_kicks_do_no_harm(host: Host) -> None:
    machine = host.machine()
    machine.boot()
    machine.resume()
    for n in range(50):
        wait_for(machine, n)
        machine._kick()
    machine.pause()
    assert machine.verify().wrong == ()


def test_rams_that_blocks_for_did_not_make_are_refused() -> None:
    for rams in (
        [],
        [Ram("boot", 0, 4096, 131, 0)],
        [Ram("pc.ram", 0, 4096, 131, 0), Ram("boot", 1, 4096, 637, 0)],
        [Ram("boot", 0, 4096, 130, 0), Ram("pc.ram", 1, 4096, 638, 0)],
        [Ram("boot", 0, 8192, 131, 0), Ram("pc.ram", 1, 4096, 637, 0)],
    ):
        with pytest.raises(ArgumentError):
            make_machine("process", rams, GuestOptions(), lambda *_: None)


def test_the_kind_that_is_taken_comes_with_its_reason() -> None:
    assert guest_kind_available("process")[0] == "process"
    kind, why = guest_kind_available()
    assert kind == ("process" if TROUBLE else "kvm")
    assert why
    with pytest.raises(ArgumentError, match="auto, kvm, process"):
        guest_kind_available("xen")


def test_without_kvm_the_reason_and_what_helps_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = ("this user may not open /dev/kvm", "`sudo usermod -aG kvm $USER`, then log in again")
    monkeypatch.setattr("colocache.vmm.machine.kvm_trouble", lambda: sentence)
    assert guest_kind_available("auto") == ("process", f"{sentence[0]} ({sentence[1]})")
    with pytest.raises(MachineError, match=r"may not open /dev/kvm \(.*usermod"):
        guest_kind_available("kvm")


def test_blocks_are_specs_of_the_engine() -> None:
    assert all(isinstance(spec, BlockSpec) for spec in blocks_for(RAM_BYTES))
    assert base.ReferenceMachine.blocks_for(RAM_BYTES) == blocks_for(RAM_BYTES)
    with contextlib.suppress(ArgumentError):
        blocks_for(1)
        pytest.fail("a machine of one byte")
