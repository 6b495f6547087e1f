# SPDX-License-Identifier: Apache-2.0
"""The guest's disks as QEMU's block nodes: what a user asks for with --disk, and what each QEMU of a pair is given.

primary     the user's file, in its own format; a mirror job copies every write to an export of ours (mirror.py)
secondary   an overlay over the raw image of the newest committed epoch: its own writes die with its process
probe       of description.py: nothing of the right size
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from colocache.disks.write import DISKS_MAX, SECTOR
from colocache.errors import ArgumentError, reason_of
from colocache.vmm.qemu.option_strings import parse

FORMATS = ("raw", "qcow2")
QCOW2 = b"QFI\xfb"
QCOW2_SIZE = struct.Struct(">4sI16xQ")  # magic, version, bytes of the disk
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


@dataclass(frozen=True)
class DiskSpec:
    """A disk: the file that holds it, how, and how many bytes the guest sees."""

    path: str
    format: str
    size: int

    @classmethod
    def of(cls, text: str) -> DiskSpec:
        """By what stands after --disk: FILE[,format=raw|qcow2]. ArgumentError."""
        pairs = parse(text, "file")
        strange = set(pairs) - {"file", "format"}
        if strange or not pairs.get("file"):
            raise ArgumentError(f"--disk {text}: give FILE or FILE,format=qcow2; a comma in a name is written twice")
        path, kind = str(Path(pairs["file"]).absolute()), pairs.get("format", "")
        if kind not in ("", *FORMATS):
            raise ArgumentError(f"--disk {text}: the format is raw or qcow2; `qemu-img convert` makes one of another")
        try:
            with Path(path).open("rb") as file:
                head = file.read(QCOW2_SIZE.size)
                raw_size = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ArgumentError(
                f"the disk {path} can't be read: {reason_of(error)}", hint=f"`truncate -s 1G {path}` makes an empty one"
            ) from error
        looks_like_qcow2 = head.startswith(QCOW2) and len(head) == QCOW2_SIZE.size
        if looks_like_qcow2 and not kind:
            # A guest may write such a head to a raw disk, and must not choose what is opened on its host.
            raise ArgumentError(f"the disk {path} begins like a qcow2 file: give {path},format=qcow2 or ,format=raw")
        if kind == "qcow2" and not looks_like_qcow2:
            raise ArgumentError(f"the disk {path} is no qcow2 file")
        size = QCOW2_SIZE.unpack(head)[2] if kind == "qcow2" else raw_size
        if not size or size % SECTOR:
            raise ArgumentError(f"the disk {path} has {size} bytes: a disk has a multiple of {SECTOR}")
        return cls(path, kind or "raw", size)


def disks_of(texts: Sequence[str]) -> tuple[DiskSpec, ...]:
    """Those that a user asked for, in their order. ArgumentError."""
    if len(texts) > DISKS_MAX:
        raise ArgumentError(f"{len(texts)} disks: a pair has at most {DISKS_MAX}")
    found = tuple(DiskSpec.of(text) for text in texts)
    if len({one.path for one in found}) < len(found):
        raise ArgumentError("the same disk twice")
    return found


def node_of(disk: int) -> str:
    """The node that the guest's device number `disk` is connected to when a machine is made."""
    return f"colocache.disk{disk}"


def image_of(disk: int) -> str:
    """The node of the raw image beneath a secondary's overlay."""
    return f"colocache.image{disk}"


@dataclass
class Nodes:
    """Options for a QEMU's disks, and what it must inherit for them. close() forgets these."""

    words: list[str] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def _add(self, disk: int, *nodes: dict[str, object]) -> None:
        for node in nodes:
            self.words += ["-blockdev", json.dumps(node)]
        self.words += ["-device", f"virtio-blk-pci,drive={node_of(disk)},id=colocache-disk{disk}"]

    @classmethod
    def of_primary(cls, disks: Sequence[DiskSpec]) -> Nodes:
        """The files themselves. QEMU opens them by their names: a qcow2 file may name others beside it."""
        made = cls()
        for number, disk in enumerate(disks):
            file = {"driver": "file", "filename": disk.path}
            made._add(number, {"driver": disk.format, "node-name": node_of(number), "file": file})
        return made

    @classmethod
    def of_secondary(cls, disks: Sequence[DiskSpec], folder: str) -> Nodes:
        """An overlay each, without a name, in `folder` ("" = beside the first image)."""
        made = cls()
        try:
            for number, disk in enumerate(disks):
                if disk.format != "raw":
                    raise ArgumentError(f"a secondary's disk is a raw image, and {disk.path} is {disk.format}")
                image = _open(disk.path)
                made.descriptors.append(image)
                overlay = make_overlay(disk.size, folder or str(Path(disks[0].path).parent))
                made.descriptors.append(overlay)
                # It is ours, and locked by us: QEMU's own locks would keep one process of ours from another.
                below = {"driver": "file", "filename": f"/proc/self/fd/{image}", "locking": "off"}
                above = {"driver": "file", "filename": f"/proc/self/fd/{overlay}", "locking": "off"}
                made._add(
                    number,
                    {"driver": "raw", "node-name": image_of(number), "read-only": True, "file": below},
                    {"driver": "qcow2", "node-name": node_of(number), "file": above, "backing": image_of(number)},
                )
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def of_probe(cls, disks: Sequence[DiskSpec]) -> Nodes:
        """Disks that hold nothing."""
        made = cls()
        for number, disk in enumerate(disks):
            made._add(number, {"driver": "null-co", "node-name": node_of(number), "size": disk.size})
        return made

    def close(self) -> None:
        """The process has inherited what it needs."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ArgumentError(f"the image {path} can't be opened: {reason_of(error)}") from error


def make_overlay(size: int, folder: str) -> int:
    """An empty qcow2 file of this size, without a name, which is gone with the last process that has it open."""
    try:
        with tempfile.TemporaryFile(prefix="colocache.overlay-", dir=folder) as file:
            write_overlay(file.fileno(), size)
            return os.dup(file.fileno())
    except OSError as error:
        raise ArgumentError(
            f"no overlay can be made in {folder}: {reason_of(error)}", hint="--disk-log names another folder"
        ) from error


def write_overlay(fd: int, size: int) -> None:
    """The head of an empty qcow2 file (docs/interop/qcow2.txt of QEMU tells the format): header, a table of reference
    counts and one block of it, and an empty first-level table. No cluster has data: all of it is the image's below."""
    l1_entries = -(-size // (CLUSTER * (CLUSTER // 8)))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    header = HEADER.pack(
        QCOW2, 3, 0, 0, CLUSTER_BITS, size, 0, l1_entries, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, HEADER.size
    )
    os.ftruncate(fd, (3 + l1_clusters) * CLUSTER)
    os.pwrite(fd, header, 0)
    os.pwrite(fd, struct.pack(">Q", 2 * CLUSTER), CLUSTER)
    os.pwrite(fd, struct.pack(">H", 1) * (3 + l1_clusters), 2 * CLUSTER)
