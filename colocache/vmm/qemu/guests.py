# SPDX-License-Identifier: Apache-2.0
"""Which guest a QEMU runs: the user's own command line, or the small guest that needs only a QEMU."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from colocache.errors import ArgumentError
from colocache.vmm.machine import Ram, VerifyReport
from colocache.vmm.qemu import guest_oracle
from colocache.vmm.qemu.availability import PROGRAM
from colocache.vmm.qemu.command_line import CommandLine, read_command_line
from colocache.vmm.qemu.cpu_time import cpu_microseconds
from colocache.vmm.qemu.disk import disks_of
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.guest_image import GuestImage, guest_image
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.wiring import fd_path
from colocache.vmm.workload import PAGE, GuestOptions

RAM = "pc.ram"


@dataclass
class QemuGuest:
    """A command line, and if it is the small guest's what its memory must hold. close() forgets its files."""

    line: CommandLine
    image: GuestImage | None = None

    def steps(self, process: QemuProcess) -> int:
        """Of the small guest; of another, microseconds of CPU time that its process took. 0: it has ended."""
        try:
            if not process.alive:
                return 0
            if self.image is None:
                return cpu_microseconds(process.pid)
            return int.from_bytes(process.guest_memory(guest_oracle.STEP_ADDR, 8), "little")
        except QemuError:
            return 0  # just now

    def verify(self, process: QemuProcess, ram: Ram) -> VerifyReport:
        """Of the small guest: what its own history says. Nothing is known of another's memory: 0 pages."""
        begin = time.perf_counter()
        if self.image is None:
            return VerifyReport(0, (), 0.0)
        memory = np.frombuffer(process.guest_memory(0, ram.len_bytes), dtype=np.uint64)
        found = guest_oracle.check(memory.reshape(-1, PAGE // 8), self.image)
        return VerifyReport(found.n_pages, tuple((ram.name, page) for page in found.wrong), time.perf_counter() - begin)

    def close(self) -> None:
        while self.line.descriptors:
            os.close(self.line.descriptors.pop())


def guest_ram(rams: Sequence[Ram]) -> Ram:
    """The one block of a QEMU's guest memory. ArgumentError: these are others."""
    if len(rams) != 1 or rams[0].name != RAM or rams[0].page_size != PAGE or rams[0].fd < 0:
        given = ", ".join(f"{ram.name} (pages of {ram.page_size}, descriptor {ram.fd})" for ram in rams)
        raise ArgumentError(f"a QEMU takes one block {RAM} with pages of {PAGE} bytes in a file, not {given}")
    return rams[0]


def guest_of(options: GuestOptions, ram_bytes: int) -> QemuGuest:
    """The guest that `options` ask for. Without a command line: the small guest, with ram_bytes bytes."""
    if options.command:
        line = read_command_line(options.command)
        line.card = options.card
        line.disks = disks_of(options.disks)
        line.disk_folder = options.disk_log
        return QemuGuest(line)
    accel = options.accel if options.accel != "auto" else best_accelerator()
    image = guest_image(ram_bytes, options, kvm=accel == "kvm")
    kernel = os.memfd_create("colocache-kernel", os.MFD_CLOEXEC)
    try:
        os.write(kernel, image.kernel)
        # A firmware that only loads a kernel: the usual one takes seconds where KVM emulates it.
        words = ["-machine", "pc", "-m", f"{ram_bytes}B", "-accel", accel, "-nodefaults", "-bios", "qboot.rom"]
        line = read_command_line([PROGRAM, *words, "-kernel", fd_path(kernel)])
    except BaseException:
        os.close(kernel)
        raise
    line.descriptors.append(kernel)
    line.files[:] = [("kernel", image.name)]  # what it is asked to do need not be the same on both hosts
    return QemuGuest(line, image)


def linux_command(ram_bytes: int, accel: str, parts: Mapping[str, str]) -> tuple[str, ...]:
    """A command line that boots a kernel: parts of kernel, initrd and append."""
    words = [PROGRAM, "-m", f"{ram_bytes}B", "-accel", "tcg" if accel == "auto" else accel, "-nodefaults"]
    for name, value in parts.items():
        words += [f"-{name}", value]
    return tuple(words)


def best_accelerator() -> str:
    """kvm if this user may use it, else tcg."""
    return "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"
