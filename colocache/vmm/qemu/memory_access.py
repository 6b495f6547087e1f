# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the memory of a QEMU at the addresses of its process."""

from __future__ import annotations

import os

from colocache.vmm.qemu.errors import QemuDiedError, QemuError


def read(pid: int, address: int, len_bytes: int) -> bytearray:
    """len_bytes from `address` of process `pid`."""
    data = bytearray(len_bytes)
    _each(pid, os.O_RDONLY, address, memoryview(data), os.preadv)
    return data


def write(pid: int, address: int, data: bytes) -> None:
    """Put `data` at `address` of process `pid`."""
    _each(pid, os.O_WRONLY, address, memoryview(data), os.pwritev)


def _each(pid: int, mode: int, address: int, data: memoryview, transfer: object) -> None:
    assert callable(transfer)  # noqa: S101 -- for mypy
    try:
        fd = os.open(f"/proc/{pid}/mem", mode | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise QemuDiedError(f"QEMU (process {pid}) has ended") from error
    except PermissionError as error:
        raise QemuError(f"the memory of process {pid} is closed to this one: {error.strerror}") from error
    try:
        done = 0
        while done < len(data):
            n = transfer(fd, [data[done:]], address + done)
            if n <= 0:
                raise QemuDiedError(f"QEMU (process {pid}) has ended")
            done += n
    except OSError as error:
        raise QemuError(f"{len(data)} bytes at {address:#x} of process {pid}: {error.strerror}") from error
    finally:
        os.close(fd)
