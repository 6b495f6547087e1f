# SPDX-License-Identifier: Apache-2.0
"""The spill file of a bounded secondary: pages beyond its limit lie on a disk, are found again by whoever attaches, and
the file goes with its region. What it costs a pair, and by the kernel's figure, is test_memory_limit.py's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import colocache
from colocache import ArgumentError, Cache, ForeignImageError, Memory, NoMemoryError, spill
from colocache import backing as bk
from colocache.cli import cli
from colocache.names import file_name

from support import disk_folder, files_of

PAGE = 4096
LIMIT = 4
N = 30
DYING = """
import os, signal, sys
from colocache import Cache, Memory
import numpy as np
memory = Memory.create(sys.argv[1], ({block},), backing="shm", memory_mode="bounded", spill=sys.argv[2])
cache = Cache.create(memory)
"""


def fill(cache: Cache, epoch: int, n: int = N, first: int = 0) -> None:
    data = np.full((n, PAGE), epoch, np.uint8)
    for pfn in range(first, first + n):
        cache.receive(epoch, "pc.ram", pfn, data[pfn - first])


def seal(cache: Cache, epoch: int) -> None:
    cache.device_state_buffer(epoch, 0)
    cache.seal(epoch)


def begin(cache: Cache) -> None:
    """Epoch 1 is loaded, and all of epoch 2 has come, more than may be staged."""
    fill(cache, 1)
    seal(cache, 1)
    cache.flush()
    cache.loaded()
    cache.limit_staged(LIMIT * PAGE)
    fill(cache, 2)


@pytest.fixture
def spilling(make_memory: Callable[..., Memory], tmp_path: Path) -> Memory:
    return make_memory(memory_mode="bounded", spill=disk_folder(tmp_path))


def sealed_and_dead(memory: Memory) -> str:
    """Epoch 2 is sealed with most of its pages in the file, and nobody owns the region; its name."""
    with Cache.create(memory) as cache:
        begin(cache)
        assert cache.status().spilled_bytes == (N - LIMIT) * PAGE
        seal(cache, 2)
    memory.close()
    return memory.name


def test_an_epoch_larger_than_the_limit_is_flushed_from_memory_and_from_the_file(spilling: Memory) -> None:
    with Cache.create(spilling) as cache:
        begin(cache)
        seal(cache, 2)
        flushed = cache.flush()
        assert (flushed.n_pages, flushed.spilled_pages) == (N, N - LIMIT)
        assert (cache.blocks["pc.ram"].guest[:N] == 2).all()
        cache.loaded()
        cache.free_staged()
        assert cache.status().spilled_bytes == 0
        assert spilling.spill_path is not None
        assert spilling.spill_path.stat().st_size == 0


def test_whoever_attaches_finds_the_spilled_pages_without_being_told_where(spilling: Memory) -> None:
    name = sealed_and_dead(spilling)
    said = CliRunner().invoke(cli, ["inspect", name])
    assert f"{N * PAGE} bytes in the spill file" not in said.output
    assert f"{(N - LIMIT) * PAGE} bytes in the spill file" in said.output
    assert f"spill file {spilling.spill_path}: " in said.output
    recovered = CliRunner().invoke(cli, ["recover", name])
    assert recovered.exit_code == 0, recovered.output
    memory = Memory.open(name)
    try:
        assert memory.spill_path == spilling.spill_path
        with Cache.attach(memory) as cache:
            assert (cache.blocks["pc.ram"].guest[:N] == 2).all()
            cache.limit_staged(LIMIT * PAGE)
            fill(cache, 3)
            assert cache.status().spilled_bytes
    finally:
        memory.close()


def test_an_attach_without_the_file_names_it_harms_nothing_and_works_when_it_is_back(
    spilling: Memory, tmp_path: Path
) -> None:
    name, path = sealed_and_dead(spilling), spilling.spill_path
    assert path is not None
    os.link(path, tmp_path / "kept")
    path.unlink()
    assert "which is gone" in CliRunner().invoke(cli, ["inspect", name]).output
    failed = CliRunner().invoke(cli, ["recover", name])
    assert failed.exit_code == 1
    assert f"epoch 2 was sealed with {N - LIMIT} pages in a spill file" in failed.output
    assert f"it was {path}, which is gone" in failed.output.replace("\n", " ")
    path.write_bytes(bytes(1 << 20))
    memory = Memory.open(name)
    with pytest.raises(ForeignImageError, match=f"another spill file .* it was {path}"):
        Cache.attach(memory)
    memory.close()
    path.unlink()
    os.link(tmp_path / "kept", path)
    assert CliRunner().invoke(cli, ["recover", name]).exit_code == 0


def test_a_committed_epoch_needs_no_spill_file_and_another_may_be_made(spilling: Memory, tmp_path: Path) -> None:
    name, path = sealed_and_dead(spilling), spilling.spill_path
    assert CliRunner().invoke(cli, ["recover", name]).exit_code == 0
    assert path is not None
    path.unlink()
    memory = Memory.open(name)
    try:
        assert memory.spill_fd < 0
        memory.add_spill(tmp_path)
        with Cache.attach(memory) as cache:
            cache.limit_staged(LIMIT * PAGE)
            fill(cache, 3)
            assert cache.status().spilled_bytes == (N - LIMIT) * PAGE
        memory.unlink()
    finally:
        memory.close()


def test_a_disk_that_has_become_read_only_keeps_nobody_from_the_region(
    spilling: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed epoch is attached without its spill file, and the names go though that stays."""
    name, path = sealed_and_dead(spilling), spilling.spill_path
    assert CliRunner().invoke(cli, ["recover", name]).exit_code == 0
    assert path is not None
    refused = []

    def refuses(call: Callable[..., Any], where: Any, *given: Any, **more: Any) -> Any:
        if Path(where) == path:
            refused.append(call.__name__)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return call(where, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", partial(refuses, os.open))
        patch.setattr(os, "unlink", partial(refuses, os.unlink))
        memory = Memory.open(name)
        try:
            assert memory.spill_fd < 0
            with Cache.attach(memory) as cache:
                assert (cache.blocks["pc.ram"].guest[:N] == 2).all()
            memory.unlink()
        finally:
            memory.close()
    assert refused == ["open", "unlink"]
    assert files_of(name) == []
    assert path.exists()


def test_clean_removes_the_file_of_a_dead_region_and_its_link(region_name: str, tmp_path: Path) -> None:
    folder = disk_folder(tmp_path)
    block = 'BlockSpec("pc.ram", 1 << 20)'
    code = "from colocache import BlockSpec\n" + DYING.format(block=block) + "os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, region_name, str(folder)], check=False)
    path, link = folder / file_name(region_name, "spill"), bk.SHM_DIR / file_name(region_name, "spill")
    assert path.exists()
    assert link.is_symlink()
    assert colocache.clean(region_name).removed
    assert not path.exists()
    assert not link.is_symlink()


def test_a_link_that_leads_anywhere_else_is_not_followed(region_name: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    link = bk.SHM_DIR / file_name(region_name, "spill")
    for target in (precious, Path("relative") / link.name, tmp_path / file_name("another", "spill")):
        link.symlink_to(target)
        assert spill.target_of(link) is None
        colocache.clean(region_name)
        assert not link.is_symlink()
    assert precious.read_text() == "mine"


def test_a_folder_in_memory_or_none_at_all_is_refused_with_the_reason(tmp_path: Path) -> None:
    blocks = (colocache.BlockSpec("pc.ram", 1 << 20),)
    with pytest.raises(ArgumentError, match="which is memory"):
        Memory.create(None, blocks, memory_mode="bounded", backing="shm", spill=bk.SHM_DIR)
    with pytest.raises(ArgumentError, match="No such file"):
        Memory.create(None, blocks, memory_mode="bounded", backing="shm", spill=tmp_path / "none")
    with pytest.raises(ArgumentError, match="only bounded memory"):
        Memory.create(None, blocks, memory_mode="mirror", backing="shm", spill=tmp_path)


def test_the_callers_own_file_does_as_well(spilling: Memory, tmp_path: Path) -> None:
    fd = os.open(disk_folder(tmp_path), os.O_TMPFILE | os.O_RDWR)
    control = os.memfd_create("control")
    images = []
    for one in spilling.images:
        pair = [os.memfd_create(side) for side in ("guest", "cache")]
        for image in pair:
            os.ftruncate(image, one.spec.len_bytes)
        images.append(colocache.Images(one.spec, pair[0], 0, pair[1], 0, False))
    memory = Memory.from_fds(control, images, spill_fd=fd)
    memory.memory_mode = "bounded"
    try:
        with Cache.create(memory) as cache:
            fill(cache, 1)
            seal(cache, 1)
            cache.flush()
            cache.loaded()
            cache.limit_staged(PAGE)
            fill(cache, 2)
            assert cache.status().spilled_bytes == (N - 1) * PAGE
            with pytest.raises(NoMemoryError, match="can't be spilled"), cache.receive_in_place(2, "pc.ram", N, 5):
                pass
    finally:
        memory.close()
        for number in (fd, control, *(n for one in images for n in (one.guest_fd, one.cache_fd))):
            os.close(number)
