# SPDX-License-Identifier: Apache-2.0
"""preload.c inside a QEMU: what brings it there, and what it does for whoever holds the other end of its socket."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

from colocache.vmm.qemu.errors import QemuError

PRELOAD = Path(__file__).with_name("preload.so")
ANSWER = struct.Struct("=i")  # errno or 0
MAP_ORDER = struct.Struct("=QQQ")  # address, length, offset in the file that comes with it

BLOCKS_ANSWER = struct.Struct("=ii")  # errno or 0, and the bytes of the listing that follows
BLOCKS_BYTES_MAX = 1 << 16


def environment(handoff: int, image: os.stat_result) -> tuple[dict[str, str], list[int]]:
    """The environment of a QEMU that preloads it, and descriptors that it must inherit, now the caller's; handoff: its
    end of the socket."""
    if not PRELOAD.is_file():
        raise QemuError(f"{PRELOAD} is missing", hint="install the package with `pip install .`")
    preload, needed = str(PRELOAD), []
    if set(preload) & set(" :$"):  # the dynamic linker would take the path apart
        needed = [os.open(PRELOAD, os.O_RDONLY | os.O_CLOEXEC)]
        preload = f"/proc/self/fd/{needed[0]}"
    before = os.environ.get("LD_PRELOAD")
    words = {
        **os.environ,
        "LD_PRELOAD": f"{preload}:{before}" if before else preload,
        "COLOCACHE_QEMU": f"{handoff} {os.getpid()} {image.st_dev} {image.st_ino}",
    }
    return words, needed


def take_userfault(connection: socket.socket) -> int:
    """The descriptor of a userfaultfd of QEMU's memory, the first thing it says. EOFError: it ended; QemuError."""
    message, fds, _, _ = socket.recv_fds(connection, ANSWER.size, 1)
    error = _error_of(message)
    if error or not fds:
        raise QemuError(
            f"the log of QEMU's memory is unavailable: userfaultfd failed with {os.strerror(error)}",
            hint="it needs Linux 6.7 or newer, and a container that allows userfaultfd",
        )
    return fds[0]


def map_shared(connection: socket.socket, image: int, addr: int, offset: int, len_bytes: int) -> None:
    """Let it map this part of the image shared, at the same address: copies of its own are gone. It stands.

    EOFError, OSError: it ended. QemuError.
    """
    socket.send_fds(connection, [MAP_ORDER.pack(addr, len_bytes, offset)], [image])
    error = _error_of(connection.recv(ANSWER.size))
    if error:
        raise QemuError(f"QEMU could not map its memory anew: {os.strerror(error)}")


def ram_blocks(connection: socket.socket) -> list[tuple[str, int, int]]:
    """(name, bytes used, address) of each RAM block. EOFError, OSError: it ended. QemuError: it can't tell."""
    connection.sendall(MAP_ORDER.pack(0, 0, 0))
    error, n_bytes = BLOCKS_ANSWER.unpack(_whole(connection, BLOCKS_ANSWER.size))
    if error:
        raise QemuError(
            f"this QEMU does not tell where its RAM blocks are: {os.strerror(error)}", hint="version 8.0 and newer do"
        )
    if not 0 <= n_bytes <= BLOCKS_BYTES_MAX:
        raise QemuError(f"QEMU tells of its RAM blocks in {n_bytes} bytes")
    lines = _whole(connection, n_bytes).decode(errors="replace").splitlines()
    return [(name, int(used, 16), int(address, 16)) for used, address, name in (line.split(" ", 2) for line in lines)]


def _whole(connection: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        came = connection.recv(n_bytes - len(data))
        if not came:
            raise EOFError
        data += came
    return data


def _error_of(message: bytes) -> int:
    if len(message) != ANSWER.size:
        raise EOFError
    return int(ANSWER.unpack(message)[0])
