# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the memory of a QEMU at the addresses of its process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from colocache.vmm.qemu.errors import QemuDiedError, QemuError


def read(pid: int, address: int, len_bytes: int) -> bytearray:
    """len_bytes from `address` of process `pid`."""
    data = bytearray(len_bytes)
    read_into(pid, [(address, memoryview(data))])
    return data


def read_into(pid: int, parts: Sequence[tuple[int, memoryview]]) -> None:
    """Fill each buffer with what lies at its address of process `pid`."""
    _each(pid, os.O_RDONLY, parts, os.preadv)


def write(pid: int, address: int, data: bytes) -> None:
    """Put `data` at `address` of process `pid`."""
    _each(pid, os.O_WRONLY, [(address, memoryview(data))], os.pwritev)


def _each(pid: int, mode: int, parts: Sequence[tuple[int, memoryview]], transfer: Callable[..., int]) -> None:
    try:
        fd = os.open(f"/proc/{pid}/mem", mode | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:  # the second while it is being taken apart
        raise QemuDiedError(f"QEMU (process {pid}) has ended") from error
    except PermissionError as error:
        raise QemuError(f"the memory of process {pid} is closed to this one: {error.strerror}") from error
    try:
        for address, data in parts:
            done = 0
            while done < len(data):
                try:
                    n = transfer(fd, [data[done:]], address + done)
                except OSError as error:
                    raise QemuError(f"{len(data)} bytes at {address:#x} of process {pid}: {error.strerror}") from error
                if n <= 0:
                    raise QemuDiedError(f"QEMU (process {pid}) has ended")
                done += n
    finally:
        os.close(fd)
