# SPDX-License-Identifier: Apache-2.0
"""What the tests of the QEMU guest share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from colocache import BlockSpec, RamImage, Sender
from colocache.vmm.machine import LoadReport, MarkDirty, Ram
from colocache.vmm.qemu.command_line import CommandLine, read_command_line
from colocache.vmm.qemu.machine import QemuMachine
from colocache.vmm.workload import GuestOptions

QEMU = "qemu-system-x86_64"
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}: apt install qemu-system-x86")
RAM_BYTES = 32 << 20


def guest(*more: str, accel: str = "tcg") -> CommandLine:
    """A machine with 32 MiB that boots into its firmware."""
    return read_command_line([QEMU, "-m", "32", "-accel", accel, *more])


@contextmanager
def image_file(len_bytes: int = RAM_BYTES) -> Iterator[int]:
    """A descriptor of reserved memory of that size."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, len_bytes)
        yield fd
    finally:
        os.close(fd)


def content(fd: int) -> bytes:
    """All that a file holds."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Come back when the condition holds; fails after a long time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- a pair of machines without a conversation: the pages are carried by hand ----------------------------------------


SMALL_RAM = 24 << 20
ACCELS = [
    pytest.param("tcg", id="tcg"),
    pytest.param(
        "kvm",
        marks=[pytest.mark.kvm, pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm")],
        id="kvm",
    ),
]
every_accel = pytest.mark.parametrize("accel", ACCELS)


class Pair:
    """A primary and a secondary machine, each on an image of its own."""

    def __init__(self, options: GuestOptions, ram_bytes: int = SMALL_RAM) -> None:
        self.stack = ExitStack()
        with self.stack:
            self.options = options
            self.sender = self.stack.enter_context(Sender())
            self.primary_image, self.primary = self._machine(ram_bytes, self.sender.mark_dirty)
            self.secondary_image, self.secondary = self._machine(ram_bytes, lambda *_: None)
            image = self.primary_image
            self.sender.add_block("pc.ram", image.addr, image.spec.len_bytes)
            self.sender.mark_all()
            self.stack = self.stack.pop_all()

    def _machine(self, ram_bytes: int, mark_dirty: MarkDirty) -> tuple[RamImage, QemuMachine]:
        image = self.stack.enter_context(RamImage.create(BlockSpec("pc.ram", ram_bytes), "shm"))
        ram = Ram("pc.ram", 0, 4096, image.spec.n_pages, image.addr, image.fd)
        machine = QemuMachine([ram], self.options, mark_dirty)
        self.stack.callback(machine.close)
        return image, machine

    def send(self) -> int:
        """Copy what is pending into the secondary's image, as a flush would: the number of pages."""
        n_pages = 0
        source, target = self.primary_image.view, self.secondary_image.view
        while runs := self.sender.take():
            for run in runs:
                pages = slice(run.first_pfn, run.first_pfn + run.n_pages)
                target[pages] = source[pages]
                n_pages += run.n_pages
        return n_pages

    def checkpoint(self) -> LoadReport:
        """One epoch; both run afterwards."""
        self.primary.sync_dirty_log(self.sender)
        if self.secondary._process is not None:
            self.secondary.pause()
        self.primary.pause()
        self.primary.sync_dirty_log(self.sender)
        state = self.primary.save_device_state(with_hashes=True)
        self.primary.sync_dirty_log(self.sender)
        self.secondary.check_device_state(state)
        self.send()
        self.sender.received()
        report = self.secondary.load_device_state(state)
        self.primary.resume()
        self.secondary.resume()
        return report

    def close(self) -> None:
        self.stack.close()


def run_on(machine: QemuMachine, steps: int = 200) -> None:
    """Let a running machine do some more steps."""
    goal = machine.steps + steps
    wait_until(lambda: machine.steps >= goal)
