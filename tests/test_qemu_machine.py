# SPDX-License-Identifier: Apache-2.0
"""A QEMU as a primary and as a secondary machine, with the small guest, whose every page can be checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from qemu_support import QEMU, Pair, every_accel, needs_qemu, run_on, wait_until

from colocache.errors import ArgumentError, OrderError
from colocache.vmm.errors import DeviceStateError, MachineError
from colocache.vmm.machine import Ram
from colocache.vmm.qemu import memory_access
from colocache.vmm.qemu.errors import QemuLoadError
from colocache.vmm.qemu.guest_image import WORK_ADDR
from colocache.vmm.qemu.loading import LOAD_TRIES
from colocache.vmm.qemu.machine import QemuMachine
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.state import HEADER, SavedState, pack, parse
from colocache.vmm.workload import GuestOptions

pytestmark = needs_qemu
MakePair = Callable[..., Pair]


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**options: object) -> Pair:
        made.append(Pair(GuestOptions(**{"steps_per_second": 5000.0, "working_set_bytes": 4 << 20, **options})))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def started(make_pair: MakePair, accel: str = "tcg", **options: object) -> Pair:
    """A pair whose primary runs."""
    pair = make_pair(accel=accel, **options)
    pair.primary.boot()
    pair.primary.resume()
    run_on(pair.primary)
    return pair


@every_accel
def test_a_pair_stays_in_step_and_the_secondary_takes_over_with_no_wrong_page(make_pair: MakePair, accel: str) -> None:
    pair = started(make_pair, accel)
    for _ in range(5):
        report = pair.checkpoint()
        others = sum(one.n_pages for one in pair.primary.description.others)
        assert others > 0
        assert (report.epoch_hashes_checked, report.wrong_pages) == (pair.primary_image.spec.n_pages + others, ())
        run_on(pair.primary)
        run_on(pair.secondary)
    step = pair.primary.steps
    pair.primary.close()
    assert pair.secondary.steps >= step - 5000 * 60
    run_on(pair.secondary)
    pair.secondary.pause()
    found = pair.secondary.verify()
    assert found.wrong == ()
    assert found.n_pages > 1000


@every_accel
def test_both_machines_diverge_after_a_checkpoint(make_pair: MakePair, accel: str) -> None:
    """If they wrote the same, a secondary whose writes were never undone would look right."""
    pair = started(make_pair, accel)
    pair.checkpoint()
    run_on(pair.primary)
    run_on(pair.secondary)
    for machine in (pair.primary, pair.secondary):
        machine.pause()
        assert machine.verify().wrong == ()
    n_bytes = pair.primary.ram.len_bytes
    memories = [
        machine._alive().guest_memory(WORK_ADDR, n_bytes - WORK_ADDR) for machine in (pair.primary, pair.secondary)
    ]
    assert memories[0] != memories[1]


@every_accel
def test_a_page_that_was_not_carried_is_found(make_pair: MakePair, accel: str) -> None:
    """The checks can fail: one page of the working set stays as it was."""
    pair = started(make_pair, accel)
    pair.checkpoint()
    kept = pair.secondary_image.view.copy()
    run_on(pair.primary, 2000)
    pair.primary.pause()
    changed = np.flatnonzero((pair.primary_image.view != kept).any(axis=1))
    page = int(changed[changed >= WORK_ADDR // 4096][0])
    pair.primary.sync_dirty_log(pair.sender)
    pair.send()
    pair.secondary.pause()
    pair.secondary_image.view[page] = kept[page]
    state = pair.primary.save_device_state(with_hashes=True)
    assert pair.secondary.load_device_state(state).wrong_pages == (("pc.ram", page),)
    assert ("pc.ram", page) in pair.secondary.verify().wrong


@every_accel
def test_the_secondarys_writes_never_reach_the_image(make_pair: MakePair, accel: str) -> None:
    pair = started(make_pair, accel)
    pair.checkpoint()
    epoch = pair.secondary_image.view.copy()
    run_on(pair.secondary, 2000)
    assert pair.secondary.dirty_hint() > 100
    pair.secondary.pause()
    assert (pair.secondary_image.view == epoch).all()


@every_accel
def test_a_secondary_killed_at_any_moment_restarts_from_the_image(make_pair: MakePair, accel: str) -> None:
    pair = started(make_pair, accel)
    pair.checkpoint()
    step = pair.secondary.steps
    run_on(pair.secondary)
    pair.secondary._alive()._process.kill()
    assert pair.checkpoint().wrong_pages == ()  # noticed or not
    run_on(pair.primary)
    pair.secondary._alive()._process.kill()
    wait_until(pair.secondary._went_astray)
    assert pair.secondary.failure is None  # its own branch harms nobody
    pair.primary.close()
    pair.secondary.promoted()
    pair.secondary.resume()
    run_on(pair.secondary)
    pair.secondary.pause()
    assert pair.secondary.verify().wrong == ()
    assert pair.secondary.steps > step


def test_a_machine_that_the_world_sees_is_never_set_back_to_an_epoch(make_pair: MakePair) -> None:
    pair = started(make_pair)
    pair.checkpoint()
    pair.secondary.promoted()
    pair.secondary._alive()._process.kill()
    wait_until(lambda: pair.secondary.failure is not None)
    with pytest.raises(MachineError, match="QEMU has ended"):
        pair.secondary.pause()


@pytest.mark.parametrize("event", ["SHUTDOWN", "GUEST_PANICKED"])
def test_a_secondary_whose_own_branch_ended_takes_over_from_the_newest_epoch(make_pair: MakePair, event: str) -> None:
    pair = started(make_pair)
    pair.checkpoint()
    run_on(pair.secondary)
    branch = pair.secondary._alive()
    branch._events.put({"event": event, "data": {}})
    assert (pair.secondary.failure, pair.secondary.powered_off) == (None, False)
    pair.secondary.promoted()
    assert pair.secondary._alive() is not branch
    pair.secondary.resume()
    run_on(pair.secondary)
    pair.secondary.pause()
    assert pair.secondary.verify().wrong == ()


def test_a_load_that_fails_costs_one_process_and_another_is_tried(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = started(make_pair)
    load, victims = QemuProcess.load, []

    def killed_in_mid_load(self: QemuProcess, state: bytes) -> None:
        if len(victims) < LOAD_TRIES - 1:
            victims.append(self)
            assert self._stream is not None
            self._stream.sendall(state[: len(state) // 2])
            self._process.kill()
            self._process.wait()
        load(self, state)

    monkeypatch.setattr(QemuProcess, "load", killed_in_mid_load)
    assert pair.checkpoint().wrong_pages == ()
    assert len(victims) == LOAD_TRIES - 1
    assert not any(victim.alive for victim in victims)
    run_on(pair.secondary)
    pair.secondary.pause()
    assert pair.secondary.verify().wrong == ()


def test_a_state_that_no_process_takes_is_given_up_after_a_fixed_number(make_pair: MakePair) -> None:
    """Its envelope is right, so only the load can show that QEMU refuses it."""
    pair = started(make_pair)
    pair.primary.pause()
    shape = pair.primary.description.shape(pair.primary.ram.n_pages)
    state = parse(shape, pair.primary.save_device_state())
    cut = state.stream[: len(state.stream) // 2] + b"\0"
    refused = pack(shape.machine, SavedState(cut, None))
    pair.secondary.check_device_state(refused)
    with pytest.raises(QemuLoadError):
        pair.secondary.load_device_state(refused)
    assert (pair.secondary_image.view == 0).all()
    with pytest.raises(OrderError):
        pair.secondary.resume()  # it is never resumed half loaded


def test_a_damaged_state_is_refused_before_a_process_sees_it(make_pair: MakePair) -> None:
    """QEMU itself takes a state with a flipped bit."""
    pair = started(make_pair)
    pair.primary.pause()
    state = pair.primary.save_device_state()
    pair.secondary.check_device_state(state)
    rng = np.random.default_rng(1)
    for at in [0, 8, 12, 16, 24, 56, 64, HEADER.size, len(state) - 1, *rng.integers(0, len(state), 200).tolist()]:
        bad = bytearray(state)
        bad[at] ^= 1 << int(rng.integers(0, 8))
        with pytest.raises(DeviceStateError):
            pair.secondary.check_device_state(bytes(bad))
    for length in (0, 1, HEADER.size, len(state) - 8):
        with pytest.raises(DeviceStateError):
            pair.secondary.check_device_state(state[:length])


def test_a_state_of_another_machine_is_refused(make_pair: MakePair) -> None:
    pair, other = started(make_pair), make_pair(command=(QEMU, "-m", "24", "-accel", "tcg"))
    pair.primary.pause()
    with pytest.raises(DeviceStateError, match="another machine"):
        other.secondary.check_device_state(pair.primary.save_device_state())


def test_a_process_that_wrote_guest_memory_before_its_load_is_never_used(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page written early would hide the image's page for ever."""
    pair = started(make_pair)
    private_bytes, early = QemuProcess.private_bytes, []

    def one_was_early(self: QemuProcess) -> int:
        if not early:
            early.append(self)
            memory_access.write(self.pid, self.address() + WORK_ADDR, b"early")
            assert private_bytes(self) == 4096
        return private_bytes(self)

    monkeypatch.setattr(QemuProcess, "private_bytes", one_was_early)
    assert pair.checkpoint().wrong_pages == ()
    assert pair.secondary._process is not early[0]
    assert not early[0].alive


def test_a_guest_that_reboots_stays_in_step_also_after_the_takeover(make_pair: MakePair) -> None:
    """A process that waited has no firmware of its own: the machine would hang at its first reboot."""
    pair = started(make_pair)
    pair.checkpoint()
    pair.primary._alive().qmp.execute("system_reset")
    wait_until(lambda: pair.primary.steps < 100)
    run_on(pair.primary)
    assert pair.checkpoint().wrong_pages == ()
    pair.primary.close()
    run_on(pair.secondary, 1000)
    pair.secondary._alive().qmp.execute("system_reset")
    wait_until(lambda: pair.secondary.steps < 900)
    run_on(pair.secondary)
    pair.secondary.pause()
    assert pair.secondary.verify().wrong == ()


def test_a_guest_that_powers_off_is_told_and_can_still_be_saved_and_loaded(make_pair: MakePair) -> None:
    pair = make_pair(command=(QEMU, "-m", "24", "-accel", "tcg", "-no-reboot"))
    pair.primary.boot()
    pair.primary.resume()
    pair.primary._alive().qmp.execute("system_reset")  # a machine without reboot ends there
    wait_until(lambda: pair.primary.powered_off)
    assert pair.primary.failure is None
    pair.primary.pause()
    state = pair.primary.save_device_state(with_hashes=True)
    pair.primary.sync_dirty_log(pair.sender)
    pair.send()
    assert pair.secondary.load_device_state(state).wrong_pages == ()
    assert not pair.secondary.powered_off


def test_the_death_of_the_primarys_qemu_is_told(make_pair: MakePair) -> None:
    pair = started(make_pair)
    pair.primary._alive()._process.kill()
    wait_until(lambda: pair.primary.failure is not None)
    with pytest.raises(MachineError, match="QEMU has ended"):
        pair.primary.pause()


def test_the_console_is_that_of_the_machine_that_runs(make_pair: MakePair) -> None:
    pair = started(make_pair)
    said: list[bytes] = []
    pair.secondary.on_output = said.append
    pair.checkpoint()
    wait_until(lambda: b"#" in b"".join(said))


def test_an_image_without_a_file_is_refused() -> None:
    with pytest.raises(ArgumentError, match="in a file"):
        QemuMachine([Ram("pc.ram", 0, 4096, 6144, 4096)], GuestOptions(), lambda *_: None)


def test_close_leaves_no_process_and_no_descriptor(make_pair: MakePair) -> None:
    make_pair().close()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    pair = started(make_pair)
    pair.checkpoint()
    pids = [machine._alive().pid for machine in (pair.primary, pair.secondary)]
    pair.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)  # noqa: PTH110
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
