# SPDX-License-Identifier: Apache-2.0
"""RAM blocks beside guest memory: each is the same on both sides of an epoch, or its machine is refused by name."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from qemu_support import QEMU, Pair, guest, image_file, needs_qemu, wait_until

from colocache.vmm.errors import DeviceStateError
from colocache.vmm.history import Words
from colocache.vmm.machine import LoadReport
from colocache.vmm.qemu import memory_access, process_log, ram_blocks, refusals
from colocache.vmm.qemu.command_line import CommandLineError
from colocache.vmm.qemu.description import describe
from colocache.vmm.qemu.errors import QemuDiedError, QemuError
from colocache.vmm.qemu.loading import compare_others
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.state import CarriedPage, SavedState, pack, parse
from colocache.vmm.workload import GuestOptions

pytestmark = needs_qemu
RAM = 32 << 20


def block(process: QemuProcess, name: str) -> bytes:
    (found,) = (one for one in ram_blocks.other_blocks(process) if one.name.endswith(name))
    return bytes(memory_access.read(process.pid, found.address, found.len_bytes))


def test_a_process_that_is_being_taken_apart_has_ended() -> None:
    """It is still there for whoever waits for it, and has no memory any more."""
    with subprocess.Popen(["true"]) as ended:
        wait_until(lambda: Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        with pytest.raises(QemuDiedError, match="has ended"):
            memory_access.read(ended.pid, 4096, 8)


def test_its_dirty_log_says_that_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: str, *_: Any) -> int:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path)

    process: Any = SimpleNamespace(pid=1, address=lambda: 0)
    ram: Any = SimpleNamespace(index=0, n_pages=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", gone)
        with pytest.raises(QemuDiedError, match="has ended"):
            process_log.log_of(process, ram, kvm_maps_it=False)


def test_one_that_ends_while_its_blocks_are_compared_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory goes before it counts as dead. What a living one refuses is an error as ever."""
    alive: Any = SimpleNamespace(alive=True)
    report = LoadReport(0, (), 0)
    errors: list[QemuError] = [QemuDiedError("has ended"), QemuError("refused")]

    def hashes(_: QemuProcess) -> Words:
        raise errors.pop(0)

    monkeypatch.setattr(ram_blocks, "hashes", hashes)
    assert compare_others(alive, np.zeros(1, np.uint64), report) is report
    with pytest.raises(QemuError, match="refused"):
        compare_others(alive, np.zeros(1, np.uint64), report)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair(GuestOptions(command=(QEMU, "-m", "32", "-accel", "tcg", "-nodefaults")), RAM)
    yield made
    made.close()


def test_the_tables_that_the_firmware_was_given_travel_with_their_epoch(pair: Pair) -> None:
    """QEMU finishes them when the firmware asks; one that is half through must find the same after a takeover."""
    pair.primary.boot()
    pair.primary.resume()
    primary = pair.primary._alive()
    fresh = {one.name: one.data for one in pair.primary.description.others}
    wait_until(lambda: block(primary, "/rom@etc/acpi/tables") != fresh["/rom@etc/acpi/tables"])
    report = pair.checkpoint()
    assert report.wrong_pages == ()
    secondary = pair.secondary._alive()
    for name in fresh:
        assert block(secondary, name) == block(primary, name), name
    assert block(secondary, "/rom@etc/acpi/tables") != fresh["/rom@etc/acpi/tables"]
    assert any(block(secondary, "pc.bios"))


def test_a_block_of_which_the_secondary_has_other_bytes_is_told_by_its_name(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram_blocks, "put", lambda *_: None)  # what an epoch carries is lost
    pair.primary.boot()
    pair.primary.resume()
    primary = pair.primary._alive()
    fresh = {one.name: one.data for one in pair.primary.description.others}
    wait_until(lambda: block(primary, "/rom@etc/acpi/tables") != fresh["/rom@etc/acpi/tables"])
    assert "/rom@etc/acpi/tables" in {name for name, _ in pair.checkpoint().wrong_pages}


def test_a_guest_with_a_display_is_refused_by_the_name_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its device, and, where nobody knew that device, by its RAM block."""
    with pytest.raises(CommandLineError, match="display"):
        guest("-nodefaults", "-device", "VGA")
    monkeypatch.setattr(refusals, "DEVICES", {})
    with pytest.raises(QemuError, match=r"RAM block \S+/vga.vram of \d+ bytes, which its secondary would not have"):
        describe(guest("-nodefaults", "-device", "VGA,romfile="))


@pytest.mark.parametrize(("carried", "right"), [(False, False), (True, True)])
def test_what_a_guest_writes_to_its_screen_is_seen_by_the_comparison(
    monkeypatch: pytest.MonkeyPatch, carried: bool, right: bool
) -> None:
    """As if displays were not refused: the firmware writes to the frame buffer, which lies in no image."""
    monkeypatch.setattr(refusals, "DEVICES", {})
    which = "CARRIED" if carried else "CONSTANT"
    monkeypatch.setattr(ram_blocks, which, (*getattr(ram_blocks, which), "*/vga.vram"))
    made = Pair(GuestOptions(command=(QEMU, "-m", "32", "-accel", "tcg", "-nodefaults", "-device", "VGA")), RAM)
    try:
        made.primary.boot()
        made.primary.resume()
        primary = made.primary._alive()
        wait_until(lambda: any(block(primary, "vga.vram")))
        wrong = {name.partition("/")[2] for name, _ in made.checkpoint().wrong_pages}
        assert wrong == (set() if right else {"vga.vram"})
    finally:
        made.close()


def test_each_block_is_found_as_qemus_own_map_of_the_guest_has_it() -> None:
    with image_file() as image:
        process = QemuProcess(guest(), image, shared=True)
        try:
            blocks = {one.name: one for one in ram_blocks.other_blocks(process)}
            names = {name for name, _ in ram_blocks.all_blocks(process)}
            assert set(blocks) == names - {"colocache.ram"}
            told = process.monitor(f"gpa2hva {(1 << 32) - blocks['pc.bios'].len_bytes:#x}")
            assert f"{blocks['pc.bios'].address:#x}" in told
        finally:
            process.kill()


def test_pages_of_a_block_that_is_not_there_are_refused_before_the_seal(pair: Pair) -> None:
    shape = pair.primary.description.shape(RAM // 4096)
    stream = b"QEVM\x00\x00\x00\x03" + b"\0"
    good = CarriedPage(0, shape.others[0] - 1, bytes([7]) * 4096)
    assert parse(shape, pack(shape.machine, SavedState(stream, None, (good,)))).carried == (good,)
    for bad in (CarriedPage(len(shape.others), 0, good.data), CarriedPage(0, shape.others[0], good.data)):
        with pytest.raises(DeviceStateError, match="which is not there"):
            pair.secondary.check_device_state(pack(shape.machine, SavedState(stream, None, (good, bad))))
    state = bytearray(pack(shape.machine, SavedState(stream, None, (good,))))
    struct.pack_into("<Q", state, 64, 1 << 40)  # more pages than there are bytes
    with pytest.raises(DeviceStateError):
        pair.secondary.check_device_state(bytes(state))
