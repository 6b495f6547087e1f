# SPDX-License-Identifier: Apache-2.0
"""What machine a command line makes, asked of a QEMU that is started for it and stopped again.

Both sides of a pair must make the same one. What lies in its RAM blocks beside guest memory is kept too: see
ram_blocks.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from colocache.vmm.qemu.availability import OLDEST
from colocache.vmm.qemu.command_line import CommandLine
from colocache.vmm.qemu.disk import Nodes
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.ram_blocks import Content, all_blocks, contents
from colocache.vmm.qemu.state import Shape

LINE_BYTES_MAX = 250


@dataclass(frozen=True)
class Description:
    """A machine, as far as it must be the same on both sides.

    version     QEMU's own, with its package
    machine     its versioned type
    cpu         model, and a hash of the features that it really has on this host
    kvm         whether KVM runs it
    blocks      (name, bytes) of its RAM blocks
    files       (option, hash) of kernel, initrd, firmware
    others      its RAM blocks beside guest memory, as a fresh process has them
    card        MAC address of its network card
    disks       bytes of each disk
    read_only   (name, fingerprint) of each disk that nobody writes
    """

    version: str
    machine: str
    cpu: str
    kvm: bool
    blocks: tuple[tuple[str, int], ...]
    files: tuple[tuple[str, str], ...]
    others: tuple[Content, ...] = field(repr=False)
    card: str = ""
    disks: tuple[int, ...] = ()
    read_only: tuple[tuple[str, str], ...] = ()

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
            "disks": ", ".join(map(str, self.disks)),
            **{f"read-only disk {name}": fingerprint for name, fingerprint in self.read_only},
            "firmware": ", ".join(f"{one.name} {hashlib.sha256(one.data).hexdigest()[:16]}" for one in self.others),
        }

    def __str__(self) -> str:
        """One line of at most LINE_BYTES_MAX bytes that is the same only for the same machine."""
        head = (
            f"{self.version.split()[0]} {self.facts['accelerator']} {self.machine.removesuffix('-machine')} {self.cpu}"
        )
        rest = {name: self.facts[name] for name in ("QEMU", "RAM blocks", "files", "card", "disks", "firmware")}
        named = [(f"read-only disk {_plain(name)}", fingerprint) for name, fingerprint in self.read_only]
        line = _line(head[:100], [*rest.items(), *named])
        if len(line) > LINE_BYTES_MAX:
            line = _line(head[:100], [*rest.items(), ("read-only disks", str(self.read_only))])
        return line

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that are the same only for the same machine."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).digest()

    def shape(self, n_pages: int) -> Shape:
        """What a device state of this machine, with n_pages pages of guest RAM, is checked by."""
        return Shape(self.digest, n_pages, tuple(one.n_pages for one in self.others))


def _plain(name: str) -> str:
    """For a part of the line, whose parts stand between commas and end with a hash."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)[:30]


def _line(head: str, facts: list[tuple[str, Any]]) -> str:
    return head + "".join(f", {name} {hashlib.sha256(str(value).encode()).hexdigest()[:8]}" for name, value in facts)


def describe(line: CommandLine) -> Description:
    """Start the machine, look at it, end it. QemuError if it does not come up or is too old."""
    image = os.memfd_create("colocache-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(image, line.ram_bytes)  # sparse: it runs no guest
        process = QemuProcess(line, image, shared=True, nodes=Nodes.of_probe(line.disks))
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
    return Description(
        version=f"{numbers['major']}.{numbers['minor']}.{numbers['micro']} {version['package']}".strip(),
        machine=str(qmp.execute("qom-get", path="/machine", property="type")),
        cpu=_cpu(process),
        kvm=bool(qmp.execute("query-kvm")["enabled"]),
        blocks=all_blocks(process),
        files=tuple((option, _file_digest(path)) for option, path in line.files),
        others=contents(process),
        card=line.card,
        disks=tuple(disk.size for disk in line.disks),
        read_only=tuple((disk.name, disk.fingerprint()) for disk in line.read_only),
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
