# SPDX-License-Identifier: Apache-2.0
"""The server's side of the NBD protocol, as far as a mirror job needs it: over a connected socket, for one client.

Newstyle fixed handshake; WRITE, WRITE_ZEROES, TRIM, FLUSH, DISC. A READ is refused: what a mirror writes to is not what
anybody reads from. Every size is bounded before a byte of it is read; what is malformed ends the conversation, and
never more than that.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md has the numbers.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Protocol

from colocache.disks.write import DATA_BYTES_MAX, SECTOR

MAGIC, OPTION_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x3E889045565A9, 0x25609513, 0x67446698
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPTION_BYTES_MAX, OPTIONS_MAX = 4096, 64
HANDSHAKE_SECONDS = 30.0
ROOM_BYTES = 2 * DATA_BYTES_MAX  # of a client's bytes that are read at once

EXPORT_NAME, ABORT, LIST, INFO, GO = 1, 2, 3, 6, 7
ACK, SERVER, INFORMATION = 1, 2, 3
UNSUPPORTED, INVALID, UNKNOWN = 0x80000001, 0x80000003, 0x80000006
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES = 1, 4, 32, 64
TRANSMISSION_FLAGS = HAS_FLAGS | SEND_FLUSH | SEND_TRIM | SEND_WRITE_ZEROES
NO_HOLE = 2  # of WRITE_ZEROES
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")


class Disk(Protocol):
    """What is served. Whatever a call raises becomes an input/output error for the client."""

    size: int

    def write(self, offset: int, data: memoryview) -> None:
        """`data` is valid during the call only."""

    def zero(self, offset: int, length: int) -> None: ...

    def trim(self, offset: int, length: int) -> None: ...


class NbdError(Exception):
    """The client does not keep to the protocol, or is gone."""


class Session:
    """One client from its first byte to its last. `serve` comes back when it is over."""

    def __init__(self, client: socket.socket, disk: Disk) -> None:
        self._client = client
        self._disk = disk
        self._room = memoryview(bytearray(ROOM_BYTES))
        self._first = self._end = 0  # what is in the room and not taken yet

    def serve(self) -> str:
        """Until the client says that it goes, or is gone: why it is over, in a sentence."""
        try:
            self._client.settimeout(HANDSHAKE_SECONDS)
            if not self._handshake():
                return "the client gave up in the handshake"
            self._client.settimeout(None)
            while self._request():
                pass
        except NbdError as error:
            return str(error)
        except OSError as error:
            return f"the connection broke: {error}"
        return "the client went in order"

    def _receive(self, n_bytes: int) -> memoryview:
        """The next bytes, until more are asked for. A request's head and its data come with one call, if they can."""
        if self._first + n_bytes > len(self._room):
            n_left = self._end - self._first
            self._room[:n_left] = self._room[self._first : self._end]
            self._first, self._end = 0, n_left
        while self._end - self._first < n_bytes:
            n = self._client.recv_into(self._room[self._end :])
            if n == 0:
                raise NbdError("the client closed the connection")
            self._end += n
        found = self._room[self._first : self._first + n_bytes]
        self._first += n_bytes
        if self._first == self._end:
            self._first = self._end = 0
        return found

    # ---- handshake ----

    def _handshake(self) -> bool:
        """True: transmission begins."""
        self._client.sendall(MAGIC + OPTION_MAGIC + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES))
        (flags,) = struct.unpack(">I", self._receive(4))
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise NbdError(f"the client has flags {flags:#x}, of which some do not exist")
        for _ in range(OPTIONS_MAX):
            magic, option, length = struct.unpack(">8sII", self._receive(16))
            if magic != OPTION_MAGIC:
                raise NbdError("an option does not begin as one")
            if length > OPTION_BYTES_MAX:
                raise NbdError(f"option {option} has {length} bytes, at most {OPTION_BYTES_MAX} are taken")
            data = bytes(self._receive(length))
            if option == EXPORT_NAME:
                if data:
                    raise NbdError(f"there is no export {data!r}")
                padding = b"" if flags & NO_ZEROES else bytes(124)
                self._client.sendall(struct.pack(">QH", self._disk.size, TRANSMISSION_FLAGS) + padding)
                return True
            if option == ABORT:
                self._reply(option, ACK)
                return False
            if self._answer(option, data):
                return True
        raise NbdError(f"more than {OPTIONS_MAX} options")

    def _answer(self, option: int, data: bytes) -> bool:
        if option == LIST and not data:
            self._reply(option, SERVER, bytes(4))
            self._reply(option, ACK)
        elif option in (INFO, GO):
            return self._inform(option, data)
        else:
            self._reply(option, INVALID if option == LIST else UNSUPPORTED)
        return False

    def _inform(self, option: int, data: bytes) -> bool:
        name_bytes = int.from_bytes(data[:4], "big")
        n_infos = int.from_bytes(data[4 + name_bytes : 6 + name_bytes], "big")
        if len(data) != 6 + name_bytes + 2 * n_infos:
            self._reply(option, INVALID)
            return False
        if name_bytes:
            self._reply(option, UNKNOWN)
            return False
        export = struct.pack(">HQH", INFO_EXPORT, self._disk.size, TRANSMISSION_FLAGS)
        self._reply(option, INFORMATION, export)
        self._reply(option, INFORMATION, struct.pack(">HIII", INFO_BLOCK_SIZE, SECTOR, 4096, DATA_BYTES_MAX))
        self._reply(option, ACK)
        return option == GO

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._client.sendall(struct.pack(">QIII", REPLY_MAGIC, option, kind, len(data)) + data)

    # ---- transmission ----

    def _request(self) -> bool:
        """Do one; False: the client goes."""
        magic, flags, kind, cookie, offset, length = REQUEST.unpack(self._receive(REQUEST.size))
        if magic != REQUEST_MAGIC:
            raise NbdError("a request does not begin as one")
        if kind == DISC:
            return False
        data = memoryview(b"")
        if kind == WRITE:
            if length > DATA_BYTES_MAX:
                raise NbdError(f"a write of {length} bytes, at most {DATA_BYTES_MAX} are taken at once")
            data = self._receive(length)
        failure = self._refusal(kind, flags, offset, length)
        if not failure:
            try:
                self._do(kind, offset, length, data)
            except Exception:  # noqa: BLE001 -- the client must hear of it, whatever it is
                failure = errno.EIO
        self._client.sendall(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, failure, cookie))
        return True

    def _refusal(self, kind: int, flags: int, offset: int, length: int) -> int:
        """The number of the error that this request is; 0 if it can be done."""
        if kind not in (WRITE, TRIM, WRITE_ZEROES, FLUSH):
            return errno.ENOTSUP if kind == READ else errno.EINVAL
        if flags & ~(NO_HOLE if kind == WRITE_ZEROES else 0):
            return errno.EINVAL
        if kind == FLUSH:
            return errno.EINVAL if offset or length else 0
        if not length:
            return errno.EINVAL
        return 0 if offset + length <= self._disk.size else errno.ENOSPC

    def _do(self, kind: int, offset: int, length: int, data: memoryview) -> None:
        if kind == WRITE:
            self._disk.write(offset, data)
        elif kind == WRITE_ZEROES:
            self._disk.zero(offset, length)
        elif kind == TRIM:
            self._disk.trim(offset, length)
