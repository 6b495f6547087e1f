# SPDX-License-Identifier: Apache-2.0
"""Reading a disk that a QEMU of ours serves: the client's side of NBD, as far as that needs it."""

from __future__ import annotations

import socket
import struct

from colocache.disks import nbd
from colocache.errors import ColocacheError

READ_SECONDS = 30.0
OPTION_REPLY_BYTES_MAX = 4096


class ReadError(ColocacheError):
    """The disk could not be read."""


class Reader:
    """The export `name` at the socket `path`. Context manager; one thread. ReadError."""

    def __init__(self, path: str, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._cookie = 0
        self.size = 0
        try:
            self._socket.settimeout(READ_SECONDS)
            self._socket.connect(path)
            self._greet(name.encode())
        except (OSError, struct.error) as error:
            self._socket.close()
            raise ReadError(f"the disk {name} can't be read through {path}: {error}") from error
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _take(self, n_bytes: int) -> bytearray:
        found, done = bytearray(n_bytes), 0
        while done < n_bytes:
            n = self._socket.recv_into(memoryview(found)[done:])
            if n == 0:
                raise ReadError("the server of the disk closed the connection")
            done += n
        return found

    def _greet(self, name: bytes) -> None:
        magic, option_magic, flags = struct.unpack(">8s8sH", self._take(18))
        if (magic, option_magic) != (nbd.MAGIC, nbd.OPTION_MAGIC) or not flags & nbd.FIXED_NEWSTYLE:
            raise ReadError("the server of the disk speaks another protocol")
        option = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">I", nbd.FIXED_NEWSTYLE | (flags & nbd.NO_ZEROES)))
        self._socket.sendall(nbd.OPTION_MAGIC + struct.pack(">II", nbd.GO, len(option)) + option)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._take(20))
            if length > OPTION_REPLY_BYTES_MAX:
                raise ReadError(f"the server of the disk answers with {length} bytes")
            data = self._take(length)
            if kind == nbd.ACK:
                return
            if kind != nbd.INFORMATION:
                raise ReadError(f"the server of the disk refused it with {kind:#x}")
            if length >= 10 and data[:2] == b"\0\0":
                (self.size,) = struct.unpack_from(">Q", data, 2)

    def read(self, offset: int, length: int) -> bytearray:
        """These bytes of the disk, as the guest sees them now."""
        self._cookie += 1
        request = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.READ, self._cookie, offset, length)
        try:
            self._socket.sendall(request)
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack(self._take(nbd.SIMPLE_REPLY.size))
            if (magic, cookie) != (nbd.SIMPLE_REPLY_MAGIC, self._cookie):
                raise ReadError("the server of the disk answers another question")
            if error:
                raise ReadError(f"{length} bytes at {offset} of the disk can't be read: error {error}")
            return self._take(length)
        except OSError as error:
            raise ReadError(f"{length} bytes at {offset} of the disk can't be read: {error}") from error
