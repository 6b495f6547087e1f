# SPDX-License-Identifier: Apache-2.0
"""Which guest a QEMU runs: the user's own command line, or the small guest that needs only a QEMU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from colocache.vmm.qemu.availability import PROGRAM
from colocache.vmm.qemu.command_line import CommandLine, read_command_line
from colocache.vmm.qemu.guest_image import GuestImage, guest_image
from colocache.vmm.qemu.wiring import fd_path
from colocache.vmm.workload import GuestOptions


@dataclass
class QemuGuest:
    """A command line, and if it is the small guest's what its memory must hold. close() forgets its files."""

    line: CommandLine
    image: GuestImage | None = None

    def close(self) -> None:
        while self.line.descriptors:
            os.close(self.line.descriptors.pop())


def guest_of(options: GuestOptions, ram_bytes: int) -> QemuGuest:
    """The guest that `options` ask for. Without a command line: the small guest, with ram_bytes bytes."""
    if options.command:
        line = read_command_line(options.command)
        line.card = options.card
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
