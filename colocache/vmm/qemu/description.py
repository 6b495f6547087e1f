# SPDX-License-Identifier: Apache-2.0
"""What machine a command line makes, asked of a QEMU that is started for it and stopped again.

Both sides of a pair must make the same one. Its firmware is kept too: a process that waits for a device state has none
(QEMU leaves that to its own migration), and a guest that reboots after a takeover needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from colocache.vmm.qemu import memory_access
from colocache.vmm.qemu.availability import OLDEST
from colocache.vmm.qemu.command_line import CommandLine
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.process import QemuProcess

FIRMWARE = "pc.bios"
FIRMWARE_END = 1 << 32  # guest-physical: it ends here
RAM_BLOCK = re.compile(r"^\s*(\S+)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)", re.MULTILINE)
ADDRESS = re.compile(r"is (0x[0-9a-f]+)")


@dataclass(frozen=True)
class Description:
    """A machine, as far as it must be the same on both sides.

    version     QEMU's own, with its package
    machine     its versioned type
    cpu         model, and a hash of the features that it really has on this host
    kvm         whether KVM runs it
    blocks      (name, bytes) of its RAM blocks
    files       (option, hash) of kernel, initrd, firmware
    firmware    the bytes of its firmware block
    card        MAC address of its network card
    """

    version: str
    machine: str
    cpu: str
    kvm: bool
    blocks: tuple[tuple[str, int], ...]
    files: tuple[tuple[str, str], ...]
    firmware: bytes = field(repr=False)
    card: str = ""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is compared, by name."""
        return {
            "QEMU": self.version,
            "machine": self.machine,
            "CPU": self.cpu,
            "accelerator": "kvm" if self.kvm else "tcg",
            "RAM blocks": ", ".join(f"{name} {n_bytes}" for name, n_bytes in self.blocks),
            "files": ", ".join(f"-{option} {digest}" for option, digest in self.files),
            "card": self.card,
            "firmware": hashlib.sha256(self.firmware).hexdigest()[:16],
        }

    def __str__(self) -> str:
        """One line of at most 200 bytes that is the same only for the same machine."""
        head = (
            f"{self.version.split()[0]} {self.facts['accelerator']} {self.machine.removesuffix('-machine')} {self.cpu}"
        )
        rest = {name: self.facts[name] for name in ("QEMU", "RAM blocks", "files", "card", "firmware")}
        return head[:120] + "".join(
            f", {name} {hashlib.sha256(str(value).encode()).hexdigest()[:8]}" for name, value in rest.items()
        )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that are the same only for the same machine."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).digest()


def describe(line: CommandLine) -> Description:
    """Start the machine, look at it, end it. QemuError if it does not come up or is too old."""
    image = os.memfd_create("colocache-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(image, line.ram_bytes)  # sparse: it runs no guest
        process = QemuProcess(line, image, shared=True)
        try:
            return _look(process, line)
        finally:
            process.kill()
    finally:
        os.close(image)


def _look(process: QemuProcess, line: CommandLine) -> Description:
    qmp = process.qmp
    version = qmp.execute("query-version")
    numbers = version["qemu"]
    if (numbers["major"], numbers["minor"]) < OLDEST:
        raise QemuError(
            f"{line.program} is QEMU {numbers['major']}.{numbers['minor']}; {OLDEST[0]}.{OLDEST[1]} is needed"
        )
    blocks = ram_blocks(process)
    return Description(
        version=f"{numbers['major']}.{numbers['minor']}.{numbers['micro']} {version['package']}".strip(),
        machine=str(qmp.execute("qom-get", path="/machine", property="type")),
        cpu=_cpu(process),
        kvm=bool(qmp.execute("query-kvm")["enabled"]),
        blocks=tuple(blocks.items()),
        files=tuple((option, _file_digest(path)) for option, path in line.files),
        firmware=read_firmware(process, blocks.get(FIRMWARE, 0)),
        card=line.card,
    )


def _cpu(process: QemuProcess) -> str:
    cpus = process.qmp.execute("query-cpus-fast")
    path = cpus[0]["qom-path"]
    model = process.qmp.execute("qom-get", path=path, property="type")
    words = process.qmp.execute("qom-get", path=path, property="feature-words")
    features = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]
    return f"{len(cpus)} x {model} {features}"


def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return path  # one of QEMU's own, by its name


def ram_blocks(process: QemuProcess) -> dict[str, int]:
    """Name and length in bytes of each RAM block."""
    return {name: int(used, 16) for name, used, _ in RAM_BLOCK.findall(process.monitor("info ramblock"))}


def read_firmware(process: QemuProcess, len_bytes: int) -> bytes:
    """What the firmware block holds."""
    return (
        bytes(memory_access.read(process.pid, _firmware_address(process, len_bytes), len_bytes)) if len_bytes else b""
    )


def write_firmware(process: QemuProcess, firmware: bytes) -> None:
    """Give a process that waits for a device state the firmware that it would not have."""
    if firmware:
        memory_access.write(process.pid, _firmware_address(process, len(firmware)), firmware)


def _firmware_address(process: QemuProcess, len_bytes: int) -> int:
    found = ADDRESS.search(process.monitor(f"gpa2hva {FIRMWARE_END - len_bytes:#x}"))
    if found is None:
        raise QemuError(f"QEMU (process {process.pid}) does not tell where its firmware is")
    return int(found.group(1), 16)
