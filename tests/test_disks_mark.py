# SPDX-License-Identifier: Apache-2.0
"""What a disk's file says of itself, at every moment of its life: nobody takes one that is ahead, or half a copy, for
another; and what a killed keeper leaves on disks is found and removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qemu_support import guest, needs_qemu

import colocache
from colocache import Attachment, scratch
from colocache.commands.clean import clean
from colocache.commands.inspect import inspect
from colocache.disk_files import DiskFiles, KeptDiskFiles, check_free, disk_files, remove_lost_logs
from colocache.disks import mark as marks
from colocache.disks.apart import ApartDisks, open_disks
from colocache.disks.mark import ATTRIBUTE, Mark, Was, can_mark, read_mark, write_mark
from colocache.disks.write import Kind, Total, Write
from colocache.errors import ArgumentError, BusyError
from colocache.vmm.qemu.disk import DiskSpec
from colocache.vmm.qemu.guest_disks import GuestDisks

SIZE = 64 << 10
OURS = Mark(Was.COPYING, "pair", region="here", region_id="id")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    if not can_mark(str(path)):
        pytest.skip("the file system has no extended attributes of users")
    return path


def opened(image: Path, mark: Mark = OURS) -> ApartDisks:
    disks = open_disks([str(image)], str(image.parent), "here", mark=mark)
    assert isinstance(disks, ApartDisks)
    return disks


def an_epoch(disks: ApartDisks, epoch: int, fill: int) -> Attachment:
    """Sealed, and not applied yet."""
    disks.lost()
    disks.come(Write(0, Kind.WRITE, 0, 512, bytes([fill]) * 512).pack())
    disks.told(Total(1, 512))
    log = disks.sealing()
    disks.epoch = epoch
    disks.sealed()
    return log


def mark_of(image: Path) -> Mark:
    found = read_mark(str(image))
    assert found is not None
    return found


def test_an_image_says_what_it_is_from_its_first_byte_to_the_takeover(image: Path) -> None:
    disks = opened(image)
    disks.attach(0, Attachment())
    assert mark_of(image).was is Was.COPYING
    an_epoch(disks, 1, 1)
    assert mark_of(image).was is Was.COPYING, "its copy is whole when its first epoch is"
    disks.apply()
    assert (mark_of(image).was, mark_of(image).epoch) == (Was.SECONDARY, 1)
    an_epoch(disks, 2, 2)
    disks.apply()
    assert str(mark_of(image)) == "is the image of region here of pair pair, epoch 2"
    assert not mark_of(image).ahead
    disks.take_over()
    assert mark_of(image).ahead
    assert "took over at epoch 2" in str(mark_of(image))
    disks.close()


def test_an_image_is_free_as_soon_as_it_is_closed_though_it_is_still_on_its_way_to_its_medium(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, go_on = [], threading.Event()

    def slow(fd: int) -> None:
        synced.append(os.stat(fd).st_ino)
        go_on.wait(20)

    disks = opened(image)
    disks.attach(0, Attachment())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slow)
        disks.take_over()
        while not synced:
            time.sleep(0.001)
        disks.close()
        opened(image).close()
        go_on.set()
    assert synced == [image.stat().st_ino]


def test_a_death_while_a_log_is_applied_is_told_and_the_next_process_goes_on(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = opened(image)
    disks.attach(0, Attachment())
    an_epoch(disks, 1, 1)
    disks.apply()
    log = an_epoch(disks, 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(disks.images[0], "apply", lambda _write: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            disks.apply()
    disks.close()
    assert "epoch 1 with a part of epoch 2" in str(mark_of(image))
    disks = opened(image)
    disks.attach(2, log)
    assert (mark_of(image).epoch, mark_of(image).applying) == (2, 0)
    assert image.read_bytes()[:512] == b"\2" * 512
    disks.close()


def test_a_death_between_the_first_seal_and_its_apply_is_no_strange_image(image: Path) -> None:
    disks = opened(image)
    disks.attach(0, Attachment())
    log = an_epoch(disks, 1, 1)
    disks.close()
    disks = opened(image)
    disks.attach(1, log)
    assert (mark_of(image).was, mark_of(image).epoch) == (Was.SECONDARY, 1)
    disks.close()


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (Mark(Was.PRIMARY, "pair", 7), "was the disk of a primary of pair pair, ahead of epoch 7 and of everybody"),
        (Mark(Was.TOOK_OVER, "pair", 1, region="here", region_id="id"), "took over at epoch 1: ahead of everybody"),
        (Mark(Was.SECONDARY, "pair", 1, region="here", region_id="of an older region of this name"), "is the image"),
        (None, "has no mark"),
    ],
)
def test_a_region_whose_epochs_are_elsewhere_takes_no_other_disk(image: Path, mark: Mark | None, words: str) -> None:
    disks = opened(image)
    disks.attach(0, Attachment())
    log = an_epoch(disks, 1, 1)
    disks.apply()
    disks.close()
    other = image.parent / "other"
    other.write_bytes(b"x" * SIZE)
    if mark:
        assert write_mark(str(other), mark)
    before = read_mark(str(other))
    for _ in range(2):
        disks = open_disks([str(other)], str(image.parent), "here", mark=OURS)  # type: ignore[assignment]
        with pytest.raises(ArgumentError, match=words) as told:
            disks.attach(1, log)
        assert "takes a whole copy" in str(told.value)
        disks.close()
    assert bool(other.read_bytes() == b"x" * SIZE)
    assert read_mark(str(other)) == before


def test_a_fresh_region_says_what_an_image_was_and_takes_a_whole_copy(image: Path) -> None:
    assert write_mark(str(image), Mark(Was.PRIMARY, "pair", 7))
    disks = opened(image)
    (was,) = disks.were
    assert was is not None
    assert was.ahead
    disks.attach(0, Attachment())
    assert mark_of(image).was is Was.COPYING, "a death in its middle leaves no disk that says it is ahead"
    disks.close()


@pytest.mark.parametrize(
    "found", [b"", b"x" * 5000, b"[]", b"{}", b"[" * 1000, b'{"was": "primary"}',
              b'{"was":"primary","pair":"p","epoch":-1,"applying":0,"region":"","region_id":"","boot":""}']
)  # fmt: skip
def test_no_attribute_is_more_than_no_mark(image: Path, found: bytes) -> None:
    if len(found) > 4000:
        with pytest.raises(OSError, match=r"."):
            os.setxattr(image, ATTRIBUTE, found)
        return
    os.setxattr(image, ATTRIBUTE, found)
    assert read_mark(str(image)) is None


def test_a_mark_of_another_run_of_the_host_says_what_may_be_lost(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mark(str(image), Mark(Was.SECONDARY, "pair", 3, region="here"))
    assert "newest start" not in str(mark_of(image))
    monkeypatch.setattr(marks, "boot_id", lambda: "another")
    assert "newest start" in str(mark_of(image))


@needs_qemu
def test_a_primarys_disks_say_so_and_what_they_said_before(image: Path) -> None:
    line = guest()
    line.disks = (DiskSpec.of(str(image)),)
    disks = GuestDisks(line, lambda: pytest.fail("no machine is asked"))
    assert disks.become_primary("pair", 0) == []
    assert disks.become_primary("pair", 5) == []
    assert str(mark_of(image)) == "was the disk of a primary of pair pair, ahead of epoch 5 and of everybody"
    was = Mark(Was.SECONDARY, "other", 3, region="there")
    write_mark(str(image), was)
    ((path, found),) = disks.become_primary("pair", 6)
    assert (path, found.was, found.epoch) == (str(image), Was.SECONDARY, 3)
    assert mark_of(image).ahead


def test_inspect_tells_whose_a_disk_was(image: Path) -> None:
    told = CliRunner().invoke(inspect, ["--disk", str(image), "--json"])
    assert "nothing tells whose it was" in told.output
    write_mark(str(image), Mark(Was.PRIMARY, "pair", 7))
    told = CliRunner().invoke(inspect, ["--disk", str(image), "--json"])
    assert "ahead of epoch 7 and of everybody" in told.output
    assert '"ahead": true' in told.output


# ---- what is left ----

KEEP = """
import sys, time
from pathlib import Path
from colocache import scratch
from colocache.disk_files import KeptDiskFiles
name, image, *logs = sys.argv[1:]
kept = KeptDiskFiles(name, [image], logs)
for log in logs: Path(log).write_bytes(b"x")
folder = scratch.folder("console")
print(folder.__enter__(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def keeper(image: Path) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    name = f"t{os.getpid()}-{secrets.token_hex(3)}"
    logs = [str(image.parent / f"{name}.disk-log.{n}") for n in (0, 1)]
    process = subprocess.Popen([sys.executable, "-c", KEEP, name, str(image), *logs], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, name, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_clean_removes_what_a_killed_keeper_left_and_nothing_of_one_that_lives(
    keeper: tuple[subprocess.Popen[str], str, Path], image: Path
) -> None:
    process, name, folder = keeper
    (folder / "console").write_bytes(b"what the guest said")
    files = disk_files(name)
    assert files is not None
    assert files.images == (str(image),)
    with pytest.raises(BusyError, match="in use"):
        colocache.regions.remove_region(name)
    assert folder not in scratch.remove_abandoned()
    assert all(Path(log).exists() for log in files.logs)
    process.kill()
    process.wait()
    told = CliRunner().invoke(clean, [name, "--json"])
    assert json.loads(told.output.splitlines()[-1])["removed"][0]["name"] == name
    assert sorted(image.parent.iterdir()) == [image]
    assert disk_files(name) is None
    assert folder in scratch.remove_abandoned()
    assert not folder.exists()


def test_a_keeper_that_ends_in_order_leaves_nothing_and_one_that_attaches_keeps_the_identity(image: Path) -> None:
    name = f"t{os.getpid()}-{secrets.token_hex(3)}"
    log = image.parent / f"{name}.disk-log.0"
    with KeptDiskFiles(name, [str(image)], [str(log)]):
        first = disk_files(name)
        log.write_bytes(b"x")
        with KeptDiskFiles(name, [str(image)], [str(log)]):
            second = disk_files(name)
    assert first is not None
    assert second == first
    assert sorted(image.parent.iterdir()) == [image]
    assert disk_files(name) is None


def test_the_file_of_a_regions_disks_is_there_whenever_the_one_that_attaches_dies(
    image: Path, region_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody would know any more that the images are this region's."""
    with KeptDiskFiles(region_name, [str(image)], ["first log", "second log"]):
        before = disk_files(region_name)
        assert before is not None
        seen: list[DiskFiles | None] = []
        looking = False

        def looks_after(call: Callable[..., Any], *given: Any, **more: Any) -> Any:
            nonlocal looking
            done = call(*given, **more)
            if not looking:
                looking = True
                seen.append(disk_files(region_name))
                looking = False
            return done

        with monkeypatch.context() as patch:
            for name in ("open", "write", "pwrite", "link", "unlink"):
                patch.setattr(os, name, partial(looks_after, getattr(os, name)))
            again = KeptDiskFiles(region_name, [str(image)], ["other"])
        after = disk_files(region_name)
        assert after is not None
        assert (after.logs, after.identity) == (("other",), before.identity)
        assert len(seen) > 1
        assert all(found in (before, after) for found in seen)
        again.__exit__(None, None, None)


def test_a_log_that_clean_removed_before_it_was_locked_is_made_anew(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = image.parent / "here.disk-log.0"
    removed: list[Path] = []

    def flock(fd: int, how: int, real: Callable[[int, int], None] = fcntl.flock) -> None:
        if log.exists():
            monkeypatch.undo()
            removed.extend(remove_lost_logs(str(image.parent), []))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    disks = opened(image)
    assert removed == [log]
    assert log.exists()
    assert remove_lost_logs(str(image.parent), []) == [], "they are locked"
    disks.close()


def test_a_file_system_with_room_for_less_than_a_mark_has_no_place_for_one(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full one may still have room for a byte beside the inode, and would refuse the mark later."""
    real = os.setxattr

    def setxattr(where: Any, name: str, value: bytes) -> None:
        if len(value) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(where, name, value)

    monkeypatch.setattr(os, "setxattr", setxattr)
    assert not can_mark(str(image))


def test_what_others_put_in_its_place_is_no_file_of_a_regions_disks_and_holds_nobody_up(region_name: str) -> None:
    path = Path("/dev/shm") / f"colocache.{region_name}.disks"
    os.mkfifo(path)
    try:
        assert disk_files(region_name) is None
        check_free(region_name)
    finally:
        path.unlink()


def test_logs_of_regions_that_a_restarted_host_has_forgotten_are_found_by_their_folder(image: Path) -> None:
    folder = image.parent
    for path in ("gone.disk-log.0", "gone.disk-log.1", "lives.disk-log.0", "gone.disk-log.2", "disk-log.0"):
        (folder / path).write_bytes(b"x")
    (folder / "link.disk-log.0").symlink_to(image)
    disks = opened(image)  # has logs of a region that is seen by nobody, as from another /dev/shm
    found = remove_lost_logs(str(folder), ["lives"])
    assert [path.name for path in found] == ["gone.disk-log.0", "gone.disk-log.1"]
    disks.close()
    assert [path.name for path in remove_lost_logs(str(folder), ["lives"])] == ["here.disk-log.0", "here.disk-log.1"]
    assert image.exists()


def test_a_folder_that_holds_what_none_of_ours_does_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    strange = tmp_path / "colocache.console-abc"
    (strange / "folder").mkdir(parents=True)
    assert scratch.remove_abandoned() == []
    assert strange.exists()
