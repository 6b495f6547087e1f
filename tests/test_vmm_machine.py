# SPDX-License-Identifier: Apache-2.0
"""Both guests do what their history says, stop where they must, and say it when they can't run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from vmm_support import RAM_BYTES, TROUBLE, Host, every_guest, exact_steps, needs_kvm, run_steps, wait_for

from colocache import BlockSpec
from colocache.choices import GUESTS
from colocache.errors import ArgumentError, ClosedError, OrderError
from colocache.vmm import (
    DeviceStateError,
    GuestOptions,
    MachineError,
    Ram,
    base,
    blocks_for,
    guest_kind_available,
    make_machine,
    process,
)


@pytest.fixture
def host(kind: str, backing: str) -> Iterator[Host]:
    made = Host(kind, backing)
    with made.stack:
        yield made


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
    for kvm, native in zip(*memories, strict=True):
        assert np.array_equal(kvm, native)


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


@every_guest
def test_the_history_of_a_guest_that_is_synced_while_it_runs_does_not_grow_for_ever(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "TIDY_ENTRIES", 8)
    monkeypatch.setattr("colocache.vmm.history.CHUNK", 500)
    machine = host.machine(run_pages=64, run_share=0.5)
    machine._tidy_at = 8
    machine.boot()
    longest = 0
    for _ in range(100):
        machine.resume()
        wait_for(machine, machine.steps + 300)
        machine.sync_dirty_log(host.target.cache)
        machine.pause()
        longest = max(longest, len(machine._history))
        assert machine.verify().wrong == ()
    assert longest < 60


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
def test_the_registers_that_are_saved_are_those_that_kvm_tells_when_asked() -> None:
    host = Host("kvm", "shm")
    with host.stack:
        machine = host.machine()
        machine.boot()
        vcpu = machine._vcpu
        seen = set()

        def asked() -> bytes:
            return bytes(vcpu.regs()) + bytes(vcpu.sregs())

        assert machine._save_registers() == asked()
        for _ in range(5):
            run_steps(machine)
            assert machine._save_registers() == asked()
            seen.add(asked())
            state = machine.save_device_state()
        run_steps(machine)
        machine.load_device_state(state)
        assert machine._save_registers() == asked(), "what was in the run page before the load"
        assert len(seen) > 1


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
            with pytest.raises(MachineError, match="no longer runs: the vCPU came out with exit reason"):
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
    monkeypatch.setattr("colocache.vmm.kvm.kvm_trouble", lambda: sentence)
    assert guest_kind_available("auto") == ("process", f"{sentence[0]} ({sentence[1]})")
    with pytest.raises(MachineError, match=r"may not open /dev/kvm \(.*usermod"):
        guest_kind_available("kvm")


class OtherMachine(process.ProcessMachine):
    """A guest that somebody adds: a class in a file of its own."""

    kind = "other"


def test_a_new_kind_of_guest_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUESTS, "other", "other_guest:OtherMachine")
    monkeypatch.setitem(sys.modules, "other_guest", sys.modules[OtherMachine.__module__])
    assert guest_kind_available("other") == ("other", "other was asked for")
    states = []
    for kind in ("other", "process"):
        host = Host(kind, "shm")
        with host.stack:
            machine = host.machine()
            machine.boot()
            run_steps(machine)
            assert (machine.kind, machine.verify().wrong) == (kind, ())
            states.append(machine.save_device_state())
            machine.check_device_state(states[-1])
            if kind == "process":
                with pytest.raises(DeviceStateError, match="kind other, this one is process"):
                    machine.check_device_state(states[0])


def test_blocks_are_specs_of_the_engine() -> None:
    assert all(isinstance(spec, BlockSpec) for spec in blocks_for(RAM_BYTES))
    assert base.ReferenceMachine.blocks_for(RAM_BYTES) == blocks_for(RAM_BYTES)
    with contextlib.suppress(ArgumentError):
        blocks_for(1)
        pytest.fail("a machine of one byte")
