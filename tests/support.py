# SPDX-License-Identifier: Apache-2.0
"""Small things that several tests use."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import colocache
from colocache import ArgumentError, BlockSpec, Cache, spill

PAGE = 4096
# Lengths that are no multiple of 64 pages, one of them tiny, are the normal case.
BLOCKS = (BlockSpec("boot", 13 * PAGE), BlockSpec("pc.ram", 1000 * PAGE))


def ours(name: str) -> bool:
    """Made by this test process: names given by the fixtures, and the free names that Memory chooses."""
    return name.startswith((f"t{os.getpid()}-", f"{os.getpid()}-"))


def files_of(name: str) -> list[Path]:
    """The names that a region of memory has in file systems."""
    return [path for region in colocache.list_regions() if region.name == name for path in region.files]


def page(value: int) -> bytes:
    """A page of one byte, again and again."""
    return bytes([value]) * PAGE


def checkpoint(cache: Cache, epoch: int, state: bytes = b"regs", **seal: object) -> colocache.SealResult:
    """Device state, seal, flush, loaded."""
    cache.device_state_buffer(epoch, len(state))[:] = state
    result = cache.seal(epoch, **seal)  # type: ignore[arg-type]
    cache.flush()
    assert cache.loaded() is False
    return result


@contextmanager
def child(code: str, *args: str, pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code`; it is killed at the end if it still runs."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=pass_fds
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that a child prints; what it wrote to stderr is the error if there is none."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        _, errors = process.communicate(timeout=60)
        raise AssertionError(errors)
    return line


def disk_folder(folder: Path) -> Path:
    """The same, if it is on a disk."""
    try:
        return spill.check_folder(folder)
    except ArgumentError as error:
        pytest.skip(str(error))
