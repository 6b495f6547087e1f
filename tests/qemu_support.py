# SPDX-License-Identifier: Apache-2.0
"""What the tests of the QEMU guest share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from colocache.vmm.qemu.command_line import CommandLine, read_command_line

QEMU = "qemu-system-x86_64"
needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}: apt install qemu-system-x86")
RAM_BYTES = 32 << 20


def guest(*more: str, accel: str = "tcg") -> CommandLine:
    """A machine with 32 MiB that boots into its firmware."""
    return read_command_line([QEMU, "-m", "32", "-accel", accel, *more])


@contextmanager
def image_file(len_bytes: int = RAM_BYTES) -> Iterator[int]:
    """A descriptor of reserved memory of that size."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, len_bytes)
        yield fd
    finally:
        os.close(fd)


def content(fd: int) -> bytes:
    """All that a file holds."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Come back when the condition holds; fails after a long time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
