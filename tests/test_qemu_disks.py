# SPDX-License-Identifier: Apache-2.0
"""A QEMU's disks: what may be asked for, the mirror, the overlay and its fold, on a real QEMU; and a Linux whose files
are whole after its primary was killed."""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import linux_guest
import pytest
from qemu_support import QEMU, guest, image_file, needs_qemu, wait_until
from test_demo import command, demo, report_of

from colocache.disks.export import Export
from colocache.disks.mirrored import MirroredDisks
from colocache.disks.nbd_client import Reader, ReadError
from colocache.disks.write import Kind, Write
from colocache.errors import ArgumentError
from colocache.replication.conversation import Meeting, meet
from colocache.replication.hello import Hello, HelloBlock
from colocache.vmm.qemu import mirror
from colocache.vmm.qemu.disk import CLUSTER, DiskSpec, Nodes, disks_of, node_of, write_overlay
from colocache.vmm.qemu.errors import QemuError
from colocache.vmm.qemu.process import QemuProcess

pytestmark = needs_qemu
SIZE = 3 << 20


@pytest.fixture
def made() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def disk(path: Path, size: int = SIZE) -> DiskSpec:
    path.write_bytes(random.Random(size).randbytes(size))
    return DiskSpec.of(str(path))


def qemu(made: ExitStack, nodes: Nodes, *, incoming: bool = False) -> QemuProcess:
    image = made.enter_context(image_file())
    process = QemuProcess(guest(), image, shared=not incoming, incoming=incoming, nodes=nodes)
    made.callback(process.kill)
    return process


def guest_does(process: QemuProcess, number: int, command: str) -> None:
    """Through the guest's device: whatever is between it and its disk sees it."""
    process.monitor(f'qemu-io -d /machine/peripheral/colocache-disk{number}/virtio-backend "{command}"')


# ---- what may be asked for ----


def test_a_disk_is_a_file_and_a_format(tmp_path: Path) -> None:
    path = tmp_path / "a,b"
    path.write_bytes(bytes(SIZE))
    found = DiskSpec.of(f"{tmp_path}/a,,b")
    assert (found.path, found.format, found.size) == (str(path), "raw", SIZE)
    with path.open("r+b") as file:
        write_overlay(file.fileno(), 5 << 30)
    with pytest.raises(ArgumentError, match="begins like a qcow2 file"):
        DiskSpec.of(f"{tmp_path}/a,,b")
    assert DiskSpec.of(f"{tmp_path}/a,,b,format=qcow2").size == 5 << 30
    assert DiskSpec.of(f"{tmp_path}/a,,b,format=raw").size == path.stat().st_size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "give FILE"),
        ("{}/disk,cache=none", "give FILE"),
        ("{}/disk,format=vmdk", "raw or qcow2"),
        ("{}/disk,format=qcow2", "is no qcow2 file"),
        ("{}/none", "truncate -s 1G"),
        ("{}", "can't be read"),
        ("{}/odd", "multiple of 512"),
    ],
)
def test_what_is_no_disk_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    (tmp_path / "odd").write_bytes(bytes(1000))
    with pytest.raises(ArgumentError, match=words):
        DiskSpec.of(text.format(tmp_path))


def test_a_disk_twice_and_too_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with pytest.raises(ArgumentError, match="twice"):
        disks_of([str(path), f"{path},format=raw"])
    with pytest.raises(ArgumentError, match="at most 16"):
        disks_of([str(path)] * 17)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("secondary", "--guest", "process", "--listen", "127.0.0.1:0", "--disk", "x"), "--disk is for --guest qemu"),
        (("demo", "--guest", "qemu", "--disk", "x"), "--disk needs a guest that uses it"),
        (("demo", "--guest", "qemu", "--disk", "/none", "--", QEMU), "the disk /none can't be read"),
        (("demo", "--guest", "qemu", "--", QEMU, "-hda", "x"), "`--disk FILE` adds one"),
        (("demo", "--guest", "qemu", "--", QEMU, "-snapshot"), "`--disk FILE` adds one"),
        (("demo", "--guest", "qemu", "--", QEMU, "-drive", "file=x,if=floppy"), "`--disk FILE` adds one"),
    ],
)
def test_a_disk_that_cannot_be_of_the_epoch_is_refused_by_name(args: tuple[str, ...], words: str) -> None:
    ran = subprocess.run(command(*args), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode != 0
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("image", "more", "words"),
    [
        (SIZE, ("--disk-log-limit", "16M"), "give --disk-log-limit 33M or more"),
        (0, (), "has 0 bytes"),
        (SIZE, ("--disk-log", "/none"), "--disk-log names another folder"),
    ],
)
def test_a_secondary_whose_disk_can_not_be_says_so(
    tmp_path: Path, image: int, more: tuple[str, ...], words: str
) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(image))
    line = (QEMU, "-m", "32", "-accel", "tcg", "-nodefaults")
    where = ("secondary", "--guest", "qemu", "--listen", f"unix:{tmp_path}/s", "--disk", str(path))
    ran = subprocess.run(command(*where, *more, "--", *line), capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode != 0
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


def test_disks_of_another_size_are_no_pair_and_both_are_told_the_sizes() -> None:
    blocks = (HelloBlock("pc.ram", 4096, 4096),)
    own = Hello("primary", "x", None, 0, 0, False, "same", blocks, disks=(SIZE, 4096))
    for disks, words in [
        ((SIZE, 8192), "disk 1 has 8192 bytes at the peer and 4096 here"),
        ((SIZE,), "no bytes at the peer"),
    ]:
        peer = Hello("secondary", "x", bytes(16), 0, 0, False, "other", blocks, disks=disks)
        meeting, sentence = meet(own, peer)
        assert meeting is Meeting.REFUSED
        assert words in sentence


# ---- on a QEMU ----


@pytest.mark.parametrize("size", [512, SIZE, (1 << 40) + 512])
def test_an_overlay_shows_the_image_and_keeps_what_is_written_to_it(made: ExitStack, tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"\x11" * 512)
    os.truncate(path, size)
    process = qemu(made, Nodes.of_secondary([DiskSpec.of(str(path))], ""))
    nodes = {node["node-name"]: node for node in process.qmp.execute("query-named-block-nodes")}
    assert nodes[node_of(0)]["image"]["virtual-size"] == size
    guest_does(process, 0, f"write -P 0x22 {size - 512} 512")
    where = str(tmp_path / "nbd")
    mirror.serve(process, 1, where)
    with Reader(where, node_of(0)) as reader:
        assert reader.read(size - 512, 512) == b"\x22" * 512
        if size > 512:
            assert reader.read(0, 1024) == b"\x11" * 512 + bytes(512)
    mirror.serve(process, 1, "")
    with path.open("rb") as file:
        file.seek(size - 512)
        assert file.read() == (b"\x11" if size == 512 else b"\0") * 512, "the image stays what it is"
    assert [one.name for one in tmp_path.iterdir()] == ["image"], "it has no name"


def test_a_disk_is_mirrored_and_each_write_comes_before_the_guest_hears_of_it(made: ExitStack, tmp_path: Path) -> None:
    spec = disk(tmp_path / "disk")
    process = qemu(made, Nodes.of_primary([spec]))
    copy = bytearray(SIZE)
    disks = MirroredDisks([SIZE])

    def send(write: Write) -> None:
        copy[write.offset : write.offset + write.length] = (
            bytes(write.data) if write.kind is Kind.WRITE else bytes(write.length)
        )

    disks.connect(send)
    export = Export(disks.exported(0))
    made.callback(export.close)
    assert mirror.states(process, 1)[0].trouble
    mirror.begin(process, 0, export.client)
    export.given()
    wait_until(lambda: mirror.states(process, 1)[0].ready)
    assert bool(copy == Path(spec.path).read_bytes())  # bool: no minutes of telling how megabytes differ
    for n in range(1, 9):
        guest_does(process, 0, f"write -P {n} {n * 70_144} 4096")
        assert copy[n * 70_144 : n * 70_144 + 4096] == bytes([n]) * 4096
    assert bool(copy == Path(spec.path).read_bytes())  # bool: no minutes of telling how megabytes differ
    guest_does(process, 0, "write -z 0 128k")
    assert not any(copy[: 128 << 10])
    mirror.end(process, 1)
    mirror.end(process, 1)
    guest_does(process, 0, "write -P 99 0 512")
    assert not any(copy[:512]), "it is mirrored no more"
    assert Path(spec.path).read_bytes()[:512] == bytes([99]) * 512


def test_a_mirror_that_lost_its_export_says_so_and_the_guest_goes_on(made: ExitStack, tmp_path: Path) -> None:
    spec = disk(tmp_path / "disk")
    process = qemu(made, Nodes.of_primary([spec]))
    disks = MirroredDisks([SIZE])
    export = Export(disks.exported(0))
    mirror.begin(process, 0, export.client)
    export.given()
    wait_until(lambda: mirror.states(process, 1)[0].ready)
    export.close()
    guest_does(process, 0, "write -P 7 0 512")
    assert Path(spec.path).read_bytes()[:512] == bytes([7]) * 512
    wait_until(lambda: bool(mirror.states(process, 1)[0].trouble))
    mirror.end(process, 1)
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(QemuError):
        mirror.begin(process, 0, theirs)


def test_a_disk_is_read_through_qemu_whatever_its_format(made: ExitStack, tmp_path: Path) -> None:
    raw = disk(tmp_path / "raw")
    path = tmp_path / "qcow2"
    with path.open("wb") as file:
        write_overlay(file.fileno(), SIZE)
    process = qemu(made, Nodes.of_primary([raw, DiskSpec.of(f"{path},format=qcow2")]))
    guest_does(process, 1, f"write -P 5 {CLUSTER} 1024")
    for _ in range(2):
        where = str(tmp_path / "nbd")
        mirror.serve(process, 2, where)
        with Reader(where, node_of(0)) as reader:
            assert reader.size == SIZE
            assert bool(reader.read(70_000, 300_000) == Path(raw.path).read_bytes()[70_000:370_000])
            with pytest.raises(ReadError, match="can't be read"):
                reader.read(SIZE, 512)
        with Reader(where, node_of(1)) as reader:
            assert reader.read(CLUSTER - 512, 2048) == bytes(512) + bytes([5]) * 1024 + bytes(512)
        mirror.serve(process, 2, "")
    with pytest.raises(ReadError):
        Reader(where, node_of(0))


def test_after_a_takeover_an_overlay_becomes_part_of_its_image(made: ExitStack, tmp_path: Path) -> None:
    spec = disk(tmp_path / "image")
    before = Path(spec.path).read_bytes()
    process = qemu(made, Nodes.of_secondary([spec], ""))
    guest_does(process, 0, "write -P 3 512 4096")
    assert Path(spec.path).read_bytes() == before
    mirror.begin_fold(process, 0)
    wait_until(lambda: mirror.fold_step(process, 0))
    assert bool(Path(spec.path).read_bytes() == before[:512] + bytes([3]) * 4096 + before[4608:])
    (device,) = [one for one in process.qmp.execute("query-block") if one.get("inserted")]
    assert device["inserted"]["node-name"] == "colocache.image0", "the guest runs on it alone"


# ---- a Linux ----


@pytest.mark.slow
@pytest.mark.parametrize("run", range(int(os.environ.get("COLOCACHE_LINUX_RUNS", "1"))))
@pytest.mark.parametrize("point", ["running", "receiving", "sealed", "random"])
def test_the_files_of_a_linux_are_whole_after_the_takeover(tmp_path: Path, point: str, run: int) -> None:
    """By hand: COLOCACHE_LINUX_RUNS=20."""
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 64 << 20)
    told = files_over_a_kill(tmp_path, point, str(path))
    assert set(told) == {"vda"}, run
    assert {one.name for one in tmp_path.iterdir()} == {"console", "disk", "initrd"}


@pytest.mark.slow
def test_two_disks_of_two_formats_are_of_one_epoch(tmp_path: Path) -> None:
    raw, other = tmp_path / "raw", tmp_path / "other"
    raw.touch()
    os.truncate(raw, 48 << 20)
    with other.open("wb") as file:
        write_overlay(file.fileno(), 64 << 20)
    assert set(files_over_a_kill(tmp_path, "random", str(raw), f"{other},format=qcow2")) == {"vda", "vdb"}


def files_over_a_kill(tmp_path: Path, point: str, *disks: str) -> dict[str, tuple[int, int]]:
    """What the guest told of its files, by disk, over the kill of its primary; none was bad."""
    console = tmp_path / "console"
    line = linux_guest.command(tmp_path, init=linux_guest.DISK)
    linux_guest.need_module("virtio_blk")
    args = ["--guest", "qemu", "--checkpoints", "12", "--interval", "0.6", "--run-on", "8", "--console", str(console)]
    for one in disks:
        args += ["--disk", one]
    report = report_of(demo(*args, "--kill-primary-at", point, "--json", "--", *line, timeout=300))
    assert report["wrong_pages"] == 0
    told = linux_guest.reports(console.read_bytes())
    for n, bad in told.values():
        assert bad == 0
        assert n >= 5, "it has checked none of its files yet"
    return told
