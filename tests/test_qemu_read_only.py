# SPDX-License-Identifier: Apache-2.0
"""Disks that nobody writes: both sides must hold the same, and a pair that does not is told the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qemu_support import QEMU, needs_qemu

from colocache.replication.conversation import Meeting, meet
from colocache.replication.hello import MACHINE_BYTES_MAX, Hello, HelloBlock
from colocache.vmm.qemu.command_line import read_command_line
from colocache.vmm.qemu.description import Description, describe
from colocache.vmm.qemu.read_only import PART, SAMPLES

pytestmark = needs_qemu
FACTS: dict[str, Any] = {
    "version": "7.2.0", "machine": "pc", "cpu": "1 x cpu", "kvm": False, "blocks": (), "files": (), "others": (),
}  # fmt: skip


def test_read_only_disks_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    big, other, small = tmp_path / "big", tmp_path / "other", tmp_path / "small"
    with big.open("wb") as file:
        file.truncate(PART * (SAMPLES + 40))
    shutil.copy(big, other)
    small.write_bytes(b"x" * 5000)
    node = f'{{"driver":"raw","node-name":"n","read-only":true,"file":{{"driver":"file","filename":"{small}"}}}}'
    line = read_command_line(
        [QEMU, "-drive", f"file={big},format=raw,readonly=on,id=data", "-cdrom", str(other), "-blockdev", node,
         "-drive", "if=none,media=cdrom"]
    )  # fmt: skip
    assert [(one.name, one.path) for one in line.read_only] == [
        ("data", str(big)),
        ("cdrom", str(other)),
        ("n", str(small)),
        ("drive 3", ""),
    ]
    prints = [one.fingerprint() for one in line.read_only]
    assert prints[0] == prints[1] != prints[2]
    assert prints[3] == "empty"
    with other.open("r+b") as file:
        file.seek(PART * (SAMPLES + 40) - 1)
        file.write(b"y")
    assert line.read_only[1].fingerprint() != prints[0], "the last byte of a large one"
    small.write_bytes(b"x" * 4999 + b"y")
    assert line.read_only[2].fingerprint() != prints[2], "any byte of a small one"


def test_a_file_whose_name_looks_like_a_description_is_a_file(tmp_path: Path) -> None:
    odd = "{odd"
    (tmp_path / odd).write_bytes(b"x")
    line = read_command_line([QEMU, "-drive", f"file={odd},format=raw,readonly=on,id=data"])
    assert [(one.name, one.path) for one in line.read_only] == [("data", odd)]


def test_a_pair_whose_read_only_disks_differ_is_told_the_disk() -> None:
    here = Description(**FACTS, read_only=(("cd, \u00e4", "1 bytes a"), ("data", "2 bytes b")))
    there = Description(**FACTS, read_only=(("cd, \u00e4", "1 bytes a"), ("data", "2 bytes c")))
    assert here.digest != there.digest
    blocks = (HelloBlock("pc.ram", 4096, 4096),)
    own = Hello("primary", "x", None, 0, 0, False, str(here), blocks)
    meeting, sentence = meet(own, Hello("secondary", "x", bytes(16), 0, 0, False, str(there), blocks))
    assert meeting is Meeting.REFUSED
    assert "they differ in read-only disk data;" in sentence
    many = Description(**FACTS, read_only=tuple((f"disk{n}", "1 bytes a") for n in range(30)))
    assert len(str(many).encode()) <= MACHINE_BYTES_MAX


def test_a_machine_is_another_when_its_read_only_disk_is(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    words = [
        QEMU,
        "-m",
        "16",
        "-accel",
        "tcg",
        "-nodefaults",
        "-drive",
        f"file={path},format=raw,if=virtio,readonly=on,id=data",
    ]
    before = describe(read_command_line(words))
    path.write_bytes(b"x" + bytes((1 << 20) - 1))
    after = describe(read_command_line(words))
    assert {name for name in before.facts if before.facts[name] != after.facts[name]} == {"read-only disk data"}
