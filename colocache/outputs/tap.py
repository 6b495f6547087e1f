# SPDX-License-Identifier: Apache-2.0
"""The network's front: a TAP device of this host. What is let out of the queue is a packet on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import threading
from collections.abc import Callable

from colocache.errors import ArgumentError
from colocache.outputs.front import NoFront
from colocache.outputs.piece import CARD

TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_TUN_EXCL = 0x0002, 0x1000, 0x8000
PACKET_BYTES_MAX = 1 << 16
NAME = re.compile(r"tap:([^\s/:]{1,15})")


def tap_name(net: str) -> str:
    """The device's name in `tap:NAME`. ArgumentError."""
    found = NAME.fullmatch(net)
    if found is None:
        raise ArgumentError(f"--net {net}: give tap:NAME, with a name of at most 15 characters")
    return found[1]


class TapFront(NoFront):
    """A TAP device, made if there is none of that name: that needs root. One that was made for a user needs none.

    Packets that come before this side is shown are read and thrown away.
    """

    def __init__(self, name: str) -> None:
        try:
            self._fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ArgumentError(f"--net tap:{name}: {TUN} can't be opened: {error.strerror}") from error
        try:
            fcntl.ioctl(self._fd, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TAP | IFF_NO_PI))
        except OSError as error:
            os.close(self._fd)
            raise ArgumentError(
                f"--net tap:{name}: {error.strerror}; as root, or first "
                f"`ip tuntap add dev {name} mode tap user $USER`, and one process for each device"
            ) from error
        self._shown = False
        self._on_packet: Callable[[bytes], None] = lambda _: None
        self._stop, self._stopping = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read, name="colocache-tap", daemon=True)
        self._thread.start()

    def show(self) -> None:
        """See Front."""
        self._shown = True

    def listen(self, on_packet: Callable[[bytes], None]) -> None:
        """See Front."""
        self._on_packet = on_packet

    def emit(self, channel: int, data: bytes) -> None:
        """See Front. A device that is down or full loses a packet, as networks do."""
        if channel == CARD:
            with contextlib.suppress(OSError):
                os.write(self._fd, data)

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop, select.POLLHUP)
        while all(fd != self._stop for fd, _ in poll.poll()):
            try:
                packet = os.read(self._fd, PACKET_BYTES_MAX)
            except BlockingIOError:
                continue
            except OSError:
                if self._stopped(0.1):  # the device is down
                    return
                continue
            if self._shown:
                self._on_packet(packet)

    def _stopped(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._stop, select.POLLHUP)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """See Front."""
        os.close(self._stopping)
        self._thread.join()
        os.close(self._stop)
        os.close(self._fd)
