# SPDX-License-Identifier: Apache-2.0
"""A device state makes another machine go on; its load writes RAM and marks it; a bad one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from vmm_support import RAM_BYTES, Host, every_guest, needs_kvm, run_steps

from colocache.vmm import (
    DeviceStateError,
)
from colocache.vmm.kvm import split_registers


@pytest.fixture
def host(kind: str, backing: str) -> Iterator[Host]:
    made = Host(kind, backing)
    with made.stack:
        yield made


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
def test_a_load_is_of_the_bytes_that_it_is_given_whatever_was_looked_at_before(host: Host) -> None:
    first, second = host.machine(), host.machine()
    first.boot()
    older = first.save_device_state()
    run_steps(first)
    newer = first.save_device_state()
    second.check_device_state(newer)
    with pytest.raises(DeviceStateError):
        second.load_device_state(newer[:-1] + bytes([newer[-1] ^ 1]))
    for looked_at, loaded in ((newer, older), (older, newer), (newer, newer)):
        second.check_device_state(looked_at)
        second.load_device_state(loaded)
        assert second.steps == (first.steps if loaded == newer else 0)


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
