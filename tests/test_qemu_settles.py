# SPDX-License-Identifier: Apache-2.0
"""A guest that stands sends nothing more: what its devices had begun to send is in the output of the epoch, and their
state is that of its memory. With a Linux guest that answers as fast as it can, and a host that reads slowly."""

from __future__ import annotations

import struct
import threading
import time
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


@needs_qemu
def test_a_machine_that_stands_sends_nothing_and_its_state_loads(tmp_path: Path) -> None:
    if not (linux_guest.folder() / "modules" / "virtio_net.ko").is_file():
        pytest.skip("the folder COLOCACHE_LINUX has no modules/virtio_net.ko")
    command = linux_guest.command(tmp_path, init=FLOOD)
    pair = Pair(GuestOptions(command=command, card=CARD), 96 << 20)
    said, packets = bytearray(), []

    def on_output(data: bytes) -> None:
        said.extend(data)
        time.sleep(0.001)

    def on_packet(packet: bytes) -> None:
        packets.append(len(packet))
        time.sleep(0.0005)
        if packet[12:14] == ARP and packet[38:42] == HOST_ADDRESS:
            answer = packet[6:12] + HOST + packet[12:20] + b"\0\2" + HOST + packet[38:42] + packet[22:32]
            pair.primary.give_packet(answer)

    def ask() -> None:
        while not done.is_set():
            pair.primary.give_packet(QUESTION)

    done = threading.Event()
    asking = threading.Thread(target=ask)
    try:
        pair.primary.on_output, pair.primary.on_packet = on_output, on_packet
        pair.primary.boot()
        pair.primary.resume()
        wait_until(lambda: b"FLOOD" in said)
        asking.start()
        wait_until(lambda: len(packets) > 100)
        for _ in range(15):
            time.sleep(0.1)
            pair.primary.pause()
            before = len(said), len(packets)
            time.sleep(0.05)
            assert (len(said), len(packets)) == before, "it stands"
            pair.primary.resume()
        for _ in range(6):
            pair.checkpoint()  # QemuLoadError, if its memory is ahead of its devices
    finally:
        done.set()
        if asking.ident:
            asking.join()
        pair.close()
