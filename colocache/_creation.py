# SPDX-License-Identifier: Apache-2.0
"""What create and attach hand to the C library: options, images, a lock's descriptor; and who owns a busy region."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colocache._arguments import u64
from colocache._callbacks import LogSink
from colocache._native import error_from, ffi, lib, struct
from colocache.choices import MEMORY_MODES
from colocache.errors import ArgumentError, BusyError, ColocacheError, ForeignImageError
from colocache.holders import lock_holders
from colocache.inspection import inspect
from colocache.memory import Memory
from colocache.results import COPY_NAMES
from colocache.spec import Images


@contextlib.contextmanager
def lock_descriptor(memory: Memory, options: Any) -> Iterator[None]:
    """The owner's lock needs an open file description of its own, which C gets through /proc: without it, by name."""
    if Path("/proc/self/fd").exists():
        yield
        return
    options.lock_fd = memory.open_control_again()
    try:
        yield
    finally:
        os.close(options.lock_fd)


def options_of(
    memory: Memory, threads: int, copy: str, device_state_max: int, log: LogSink | None
) -> tuple[Any, list[Any]]:
    """The C struct, and what must live as long as the handle."""
    if copy not in COPY_NAMES:
        raise ArgumentError(f"copy is {copy!r}, known are {', '.join(COPY_NAMES)}")
    if not 0 <= threads < 1 << 16:
        raise ArgumentError(f"threads is {threads}: from 0 (as many as cores) to {(1 << 16) - 1}")
    options = struct("colocache_options", n_threads=threads, copy_variant=COPY_NAMES[copy])
    options.device_state_max_bytes = u64(device_state_max, "device_state_max")
    options.memory_mode = MEMORY_MODES.index(memory.memory_mode)
    options.spill_fd = max(0, memory.spill_fd)
    keep: list[Any] = []
    if log is not None:
        keep.append(ffi.new_handle(log))
        options.log, options.log_context = lib.colocache_py_log, keep[0]
    return options, keep


def images_of_region(memory: Memory) -> tuple[Images, ...]:
    """Of a memory's images those of blocks that its region has: an add_block may have come to nothing when it died."""
    try:
        names = {block.name for block in inspect(memory).blocks}
    except ColocacheError:
        return memory.images  # attach says what is wrong
    return tuple(one for one in memory.images if one.spec.name in names)


def images_array(images: Sequence[Images]) -> tuple[Any, Sequence[Any]]:
    """The C array of images, and the names that it points to."""
    array = ffi.new("struct colocache_images[]", len(images))
    names = []
    for c, one in zip(array, images, strict=True):
        names.append(ffi.new("char[]", one.spec.name.encode()))
        c.struct_size = ffi.sizeof("struct colocache_images")
        c.name, c.len_bytes, c.page_size = names[-1], one.spec.len_bytes, one.spec.page_size
        c.sparse = int(one.sparse)
        c.guest_fd, c.guest_offset = one.guest_fd, one.guest_offset
        c.cache_fd, c.cache_offset = one.cache_fd, one.cache_offset
    return array, names


def check_owned(code: int, control_fd: int) -> None:
    if code >= 0:
        return
    error = error_from(code)
    if isinstance(error, BusyError):  # the region names its owner; after a fork another process may hold the lock
        holders = lock_holders(control_fd)
        if holders and os.getpid() not in holders:
            error.sentence += f"; held by process {', '.join(map(str, holders))}"
    raise error


def check_attached(code: int, memory: Memory) -> None:
    """The engine knows no paths: where the spill file was is said here."""
    try:
        check_owned(code, memory.control_fd)
    except ForeignImageError as error:
        if memory.spill_path is not None and "spill file" in error.sentence:
            gone = "" if memory.spill_path.exists() else ", which is gone"
            error.sentence += f"; it was {memory.spill_path}{gone}"
        raise
