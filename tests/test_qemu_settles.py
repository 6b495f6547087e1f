# SPDX-License-Identifier: Apache-2.0
"""A guest that stands sends nothing more: what its devices had begun to send is in the output of the epoch, and their
state is that of its memory. With a Linux guest that answers as fast as it can, and a host that reads slowly."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import linux_guest
import pytest
from qemu_support import Pair, needs_qemu, wait_until

from colocache.vmm.workload import GuestOptions

CARD, GUEST_ADDRESS = "52:54:00:12:34:56", bytes((10, 9, 0, 2))
ARP, HOST, HOST_ADDRESS = b"\x08\x06", bytes.fromhex("525400000001"), bytes((10, 9, 0, 1))
FLOOD = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci \
  failover net_failover virtio_net; do
  [ -e /m/$module.ko ] && insmod /m/$module.ko
done
ip link set lo up; ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
echo FLOOD
while true; do echo "a line that the console has to say as fast as it can"; done
"""


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def question() -> bytes:
    """An ICMP echo request of the host's."""
    icmp = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + bytes(1000)
    icmp = icmp[:2] + struct.pack("!H", checksum(icmp)) + icmp[4:]
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 1, 0, 64, 1, 0, HOST_ADDRESS, GUEST_ADDRESS)
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return bytes.fromhex(CARD.replace(":", "")) + HOST + b"\x08\x00" + ip + icmp


QUESTION = question()


class Flood:
    """A pair whose guest says what it can, answers each question of the host's, and is read slowly, or not at all."""

    def __init__(self, folder: Path) -> None:
        command = linux_guest.command(folder, init=FLOOD)
        self.pair = Pair(GuestOptions(command=command, card=CARD), 96 << 20)
        self.said, self.packets = bytearray(), list[int]()
        self.unread = False
        self._done = threading.Event()
        self._asking = threading.Thread(target=self._ask)
        primary = self.pair.primary
        primary.on_output, primary.on_packet, primary.output_full = self._hear, self._answer, lambda: self.unread

    def begin(self) -> None:
        self.pair.primary.boot()
        self.pair.primary.resume()
        wait_until(lambda: b"FLOOD" in self.said)
        self._asking.start()
        wait_until(lambda: len(self.packets) > 100)

    def _hear(self, data: bytes) -> None:
        self.said.extend(data)
        self._be_slow(0.001)

    def _answer(self, packet: bytes) -> None:
        self.packets.append(len(packet))
        self._be_slow(0.0005)
        if packet[12:14] == ARP and packet[38:42] == HOST_ADDRESS:
            answer = packet[6:12] + HOST + packet[12:20] + b"\0\2" + HOST + packet[38:42] + packet[22:32]
            self.pair.primary.give_packet(answer)

    def _be_slow(self, seconds: float) -> None:
        if not self.unread:  # else it is read while the machine stands, faster than QEMU sends on: not all at once
            time.sleep(seconds)

    def _ask(self) -> None:
        while not self._done.is_set():
            self.pair.primary.give_packet(QUESTION)

    @property
    def heard(self) -> tuple[int, int]:
        return len(self.said), len(self.packets)

    def close(self) -> None:
        self._done.set()
        if self._asking.ident:
            self._asking.join()
        self.pair.close()


@pytest.fixture(scope="module")
def flood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flood]:
    if not (linux_guest.folder() / "modules" / "virtio_net.ko").is_file():
        pytest.skip("the folder COLOCACHE_LINUX has no modules/virtio_net.ko")
    flood = Flood(tmp_path_factory.mktemp("flood"))
    try:
        flood.begin()
        yield flood
    finally:
        flood.close()


@needs_qemu
def test_a_machine_that_stands_sends_nothing_and_its_state_loads(flood: Flood) -> None:
    for _ in range(15):
        time.sleep(0.1)
        flood.pair.primary.pause()
        before = flood.heard
        time.sleep(0.05)
        assert flood.heard == before, "it stands"
        flood.pair.primary.resume()
    for _ in range(6):
        flood.pair.checkpoint()  # QemuLoadError, if its memory is ahead of its devices


@needs_qemu
def test_what_devices_had_begun_to_send_to_a_host_that_did_not_read_is_sent_before_the_state_is_saved(
    flood: Flood,
) -> None:
    """Its socket is full, and so is the card's ring: as the machine stands there is room, and the card sends on."""
    for _ in range(3):
        time.sleep(0.2)
        flood.unread = True
        before = flood.heard
        time.sleep(0.5)
        flood.pair.primary.pause()
        flood.unread = False
        after = flood.heard
        assert after[1] > before[1] + 20, "more than there is room for in a socket: it was waiting"
        time.sleep(0.05)
        assert flood.heard == after, "it stands"
        flood.pair.primary.resume()
        flood.unread = True
        time.sleep(0.3)
        flood.pair.checkpoint()  # QemuLoadError, if its memory is ahead of its devices
        flood.unread = False
