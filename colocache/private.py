# SPDX-License-Identifier: Apache-2.0
"""Private pages of a mapping, as the kernel counts them: what a machine on bounded memory has written."""

from __future__ import annotations

from colocache._native import check, ffi, lib


def private_bytes(pid: int, addr: int, len_bytes: int) -> int:
    """Bytes of [addr, addr + len_bytes) that are private copies, in memory or swapped, in process `pid` (0: this one).

    Addresses and length are multiples of 4096. SystemCallError: that process may not be looked at, or is gone.
    """
    n_bytes = ffi.new("uint64_t *")
    check(lib.colocache_private_bytes(pid, ffi.cast("void *", addr), len_bytes, n_bytes))
    return int(n_bytes[0])


def private_write_back(pid: int, addr: int, len_bytes: int, fd: int, offset: int) -> int:
    """Write them into the file `fd`, where `addr` is byte `offset`; how many bytes. Whoever uses the mapping stands.

    NoMemoryError: its file system is full, and the mapping is what it was. SystemCallError.
    """
    n_bytes = ffi.new("uint64_t *")
    check(lib.colocache_private_write_back(pid, ffi.cast("void *", addr), len_bytes, fd, offset, n_bytes))
    return int(n_bytes[0])


def private_forget(addr: int, len_bytes: int) -> None:
    """Drop them, in this process, while whoever uses the mapping stands: it shows the file again."""
    check(lib.colocache_private_forget(ffi.cast("void *", addr), len_bytes))
