# SPDX-License-Identifier: Apache-2.0
"""A QEMU's device state as it travels: what QEMU saved, in an envelope that can be checked before the seal.

QEMU itself accepts a garbled state: one flipped bit, an extra device. So the envelope has a checksum over all of it,
the digest of the machine that it is of, and the lengths of its parts; and what QEMU saved begins and ends as such a
stream does. What only the load can show (a device that does not take its section) costs one process, not the secondary.

Little-endian: header; what QEMU saved, filled up to 8 bytes; pages of RAM blocks beside guest memory that are other
than in a fresh process, each with the numbers of its block and page; if asked for, a hash per page of guest RAM and of
those blocks; the hash of all that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from colocache.vmm.device_state import hash_bytes
from colocache.vmm.errors import DeviceStateError
from colocache.vmm.history import Words
from colocache.vmm.workload import PAGE

MAGIC = b"COLOQEMU"
VERSION = 2
# magic, version, flags, bytes in all, machine, bytes of the state, pages carried, pages hashed
HEADER = struct.Struct("<8sIIQ32sQQQ")
CARRIED = struct.Struct("<II")  # before each page that is carried
RECORD_BYTES = CARRIED.size + PAGE
CHECKSUM = struct.Struct("<Q")
WITH_HASHES = 1
STREAM_MAGIC = b"QEVM\x00\x00\x00\x03"
STREAM_END = b"\x00"  # no description of the format after it: see wiring.py


@dataclass(frozen=True)
class CarriedPage:
    """A page of a RAM block beside guest memory, by the numbers of both."""

    block: int
    page: int
    data: bytes


@dataclass(frozen=True)
class SavedState:
    """A device state taken apart. `hashes` is one u64 per page of guest RAM and of the blocks beside it, or None."""

    stream: bytes
    hashes: Words | None
    carried: tuple[CarriedPage, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What a device state must be of: the digest of the machine's description, the pages of guest RAM, and those of
    each block beside it."""

    machine: bytes
    n_pages: int
    others: tuple[int, ...]

    @property
    def n_hashes(self) -> int:
        return self.n_pages + sum(self.others)


def pack(machine: bytes, state: SavedState) -> bytes:
    """The bytes of `state`; machine: the digest of its description."""
    hashes = b"" if state.hashes is None else state.hashes.tobytes()
    padded = state.stream + bytes(-len(state.stream) % 8)
    carried = b"".join(CARRIED.pack(one.block, one.page) + one.data for one in state.carried)
    total = HEADER.size + len(padded) + len(carried) + len(hashes) + CHECKSUM.size
    flags = 0 if state.hashes is None else WITH_HASHES
    counts = len(state.stream), len(state.carried), len(hashes) // 8
    body = HEADER.pack(MAGIC, VERSION, flags, total, machine, *counts) + padded + carried + hashes
    return body + CHECKSUM.pack(hash_bytes(body))


def parse(shape: Shape, state: bytes) -> SavedState:
    """Take `state` apart; DeviceStateError if it is none of a machine of this shape."""
    if len(state) < HEADER.size + CHECKSUM.size:
        raise DeviceStateError(f"the device state is {len(state)} bytes, shorter than its header")
    magic, version, flags, total, theirs, n_bytes, n_carried, n_hashes = HEADER.unpack_from(state)
    if magic != MAGIC:
        raise DeviceStateError(f"the device state begins with {magic!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise DeviceStateError(f"the device state is of version {version}, this machine reads version {VERSION}")
    if total != len(state):
        raise DeviceStateError(f"the device state says it is {total} bytes and is {len(state)}")
    if CHECKSUM.unpack_from(state, total - CHECKSUM.size)[0] != hash_bytes(state[: -CHECKSUM.size]):
        raise DeviceStateError(f"the checksum of the device state ({total} bytes) does not hold")
    if theirs != shape.machine:
        raise DeviceStateError(
            "the device state is of another machine", hint="start both QEMUs with the same command line and version"
        )
    if flags not in (0, WITH_HASHES) or n_hashes != (shape.n_hashes if flags else 0):
        raise DeviceStateError(f"the device state has flags {flags} and {n_hashes} hashes for {shape.n_hashes} pages")
    carried_at = HEADER.size + -(-n_bytes // 8) * 8
    hashes_at = carried_at + n_carried * RECORD_BYTES
    if total != hashes_at + n_hashes * 8 + CHECKSUM.size:
        raise DeviceStateError(
            f"the device state is {total} bytes, its parts are {n_bytes}, {n_carried} pages and {n_hashes} hashes"
        )
    stream = state[HEADER.size : HEADER.size + n_bytes]
    if not stream.startswith(STREAM_MAGIC) or not stream.endswith(STREAM_END):
        raise DeviceStateError(f"the {n_bytes} bytes in the device state are no stream of QEMU's")
    carried = tuple(_carried(shape, state, carried_at + n * RECORD_BYTES) for n in range(n_carried))
    hashes = np.frombuffer(state, dtype="<u8", count=n_hashes, offset=hashes_at) if flags else None
    return SavedState(stream, hashes, carried)


def _carried(shape: Shape, state: bytes, at: int) -> CarriedPage:
    block, page = CARRIED.unpack_from(state, at)
    if block >= len(shape.others) or page >= shape.others[block]:
        raise DeviceStateError(f"the device state carries page {page} of RAM block {block}, which is not there")
    return CarriedPage(block, page, state[at + CARRIED.size : at + RECORD_BYTES])
