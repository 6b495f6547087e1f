# SPDX-License-Identifier: Apache-2.0
"""Anybody may put anything under a region's name: it is refused in one sentence, and never hides the other regions."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import colocache
from colocache import Cache, Memory
from colocache import backing as bk
from colocache.cli import cli
from colocache.names import file_name

from support import checkpoint


def folder(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def junk(path: Path) -> None:
    path.write_bytes(b"\xff" * 300_000)


def empty(path: Path) -> None:
    path.touch()


def holes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("/no/such/file")


def link_to_a_file(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


PLANTS = [folder, fifo, junk, empty, holes, link_to_nothing, link_to_a_file, link_to_itself, a_socket]


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@pytest.fixture
def planted(region_name: str) -> Iterator[Callable[[Callable[[Path], None], str], str]]:
    """Plants something as a part of a region; its name."""
    made: list[Path] = []

    def plant(what: Callable[[Path], None], part: str) -> str:
        name = f"{region_name}-planted-{len(made)}"
        made.append(bk.SHM_DIR / file_name(name, part))
        what(made[-1])
        return name

    yield plant
    for path in made:
        remove(path)


@pytest.mark.parametrize("part", ["control", "guest.0"])
@pytest.mark.parametrize("what", PLANTS, ids=lambda one: one.__name__)
def test_what_is_planted_under_a_regions_name_stops_no_listing(
    memory: Memory, planted: Callable[..., str], what: Callable[[Path], None], part: str
) -> None:
    runner = CliRunner(catch_exceptions=False)
    name = planted(what, part)
    with Cache.create(memory, threads=1) as cache:
        checkpoint(cache, 1)
        ran = runner.invoke(cli, ["inspect", "--json"])
        assert ran.exit_code == 0, ran.output
        shown = {one["name"]: one for one in json.loads(ran.output.splitlines()[-1])["regions"]}
        assert shown[memory.name]["sealed_epoch"] == 1
        for command in ("inspect", "recover"):
            ran = runner.invoke(cli, [command, name])
            assert ran.exit_code == 1
            assert len(ran.output.splitlines()) == 1
            assert ran.output.startswith("Error: ")
        ran = runner.invoke(cli, ["clean", name])
        assert "Traceback" not in ran.output
        assert memory.name in [one.name for one in colocache.list_regions()]
    # What was planted is no more in the way of the one that comes after it.
    memory.close()
    report = colocache.clean()
    assert memory.name in [one.name for one in report.removed]


@pytest.mark.parametrize("what", [fifo, junk, empty, holes, link_to_nothing, a_socket], ids=lambda one: one.__name__)
def test_clean_removes_what_is_planted_if_it_may(planted: Callable[..., str], what: Callable[[Path], None]) -> None:
    name = planted(what, "control")
    assert [one.name for one in colocache.clean(name).removed] == [name]
    assert name not in [one.name for one in colocache.list_regions()]


FULL = """
    import os, sys
    import colocache
    from colocache import BlockSpec, Cache, Memory, backing as bk
    from colocache.names import file_name

    blocks = [BlockSpec("ram", 1 << 20)]
    with Memory.create("whole", blocks, backing="shm") as memory:
        with Cache.create(memory, threads=1, device_state_max=1 << 16) as cache:
            cache.device_state_buffer(1, 40000)[:] = bytes(40000)
            cache.seal(1); cache.flush(); cache.loaded()
        data = open(bk.SHM_DIR / file_name("whole", "control"), "rb").read()
        for part in sys.argv[1].split(","):
            # The same region again, as `cp --sparse` would have it: what is zero is a hole.
            path = bk.SHM_DIR / file_name("whole", part)
            fd = os.open(path, os.O_RDWR)
            for at in range(4096 if part == "control" else 0, os.fstat(fd).st_size, 4096):
                if os.pread(fd, 4096, at) == bytes(min(4096, os.fstat(fd).st_size - at)):
                    os.system(f"fallocate -p -o {at} -l 4096 {path}")
        with open(bk.SHM_DIR / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        print(colocache.inspect("whole"))
        for again in range(2):
            try:
                with Memory.open("whole") as opened, Cache.attach(opened) as cache:
                    print("attached", cache.status().sealed_epoch)
            except colocache.NoMemoryError as error:
                print("refused:", error)
            os.unlink(bk.SHM_DIR / "filler") if again == 0 else None
"""


@pytest.mark.parametrize("parts", ["control", "guest.0", "cache.0", "control,guest.0,cache.0"])
def test_a_region_with_holes_on_a_full_file_system_is_refused_and_works_when_there_is_room(parts: str) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    script = 'mount -t tmpfs -o size=8M none /dev/shm && exec "$0" -c "$1" "$2"'
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, textwrap.dedent(FULL), parts],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert "epoch 1 sealed" in lines[0]
    assert lines[-2].startswith("refused: ")
    assert lines[-1] == "attached 1"
