# SPDX-License-Identifier: Apache-2.0
"""Our ends of a guest's console and network card; QEMU has the others. What comes out of them readers.py takes."""

from __future__ import annotations

import contextlib
import select
import socket

from colocache.vmm.qemu.errors import QemuDiedError

ROOM_BYTES = 16 << 10  # of a socket, for console input that QEMU has not read
UNREAD_BYTES = 1 << 20  # more than that
PACKET_SECONDS = 0.2  # to wait for room for a packet


class Console:
    """Owns nothing: `ours` and `theirs`, a connected pair, are closed by whoever made them, who says so by close()."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_BYTES)
        ours.setblocking(False)
        self._ours: socket.socket | None = ours
        self._theirs: socket.socket | None = theirs  # QEMU's end, also here

    def write(self, data: bytes) -> int:
        """Give the guest console input: the number of bytes taken, which may be fewer. QemuDiedError."""
        ours = self._ours
        if ours is None:
            raise QemuDiedError("this QEMU was closed")
        try:
            return ours.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise QemuDiedError(f"QEMU ended: its console takes nothing ({error.strerror})") from error

    def take_back(self) -> bytes:
        """What it was given and has not read: it never will. The rest is in its devices, and in their state.

        In one call: QEMU has read what came before it, and finds nothing after.
        """
        theirs = self._theirs
        if theirs is None:
            return b""
        try:
            return theirs.recv(UNREAD_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return b""

    def close(self) -> None:
        self._ours = self._theirs = None


class Card:
    """Owns nothing: see Console."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours: socket.socket | None = ours

    def give(self, packet: bytes) -> None:
        """It receives this, if there is room soon: packets may be lost. A socket takes ten, and a QEMU that stands
        none: without a wait most of a burst would be."""
        ours = self._ours
        if ours is not None:
            with contextlib.suppress(OSError, ValueError):  # the socket may be closed just now
                try:
                    ours.send(packet)
                except BlockingIOError:
                    if select.select([], [ours], [], PACKET_SECONDS)[1]:
                        ours.send(packet)

    def close(self) -> None:
        self._ours = None
