# SPDX-License-Identifier: Apache-2.0
"""A QEMU's device state as it travels: what QEMU saved, in an envelope that can be checked before the seal.

QEMU itself accepts a garbled state: one flipped bit, an extra device. So the envelope has a checksum over all of it,
the digest of the machine that it is of, and the lengths of its parts; and what QEMU saved begins and ends as such a
stream does. What only the load can show (a device that does not take its section) costs one process, not the secondary.

Little-endian: header; what QEMU saved, filled up to 8 bytes; if asked for, a hash per page of guest RAM; the hash of
all that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from colocache.vmm.device_state import hash_bytes
from colocache.vmm.errors import DeviceStateError
from colocache.vmm.history import Words

MAGIC = b"COLOQEMU"
VERSION = 1
HEADER = struct.Struct("<8sIIQ32sQQ")  # magic, version, flags, bytes in all, machine, bytes of the state, pages hashed
CHECKSUM = struct.Struct("<Q")
WITH_HASHES = 1
STREAM_MAGIC = b"QEVM\x00\x00\x00\x03"
STREAM_END = b"\x00"  # no description of the format after it: see wiring.py


@dataclass(frozen=True)
class SavedState:
    """A device state taken apart. `hashes` is one u64 per page of guest RAM, or None."""

    stream: bytes
    hashes: Words | None


def pack(machine: bytes, state: SavedState) -> bytes:
    """The bytes of `state`; machine: the digest of its description."""
    hashes = b"" if state.hashes is None else state.hashes.tobytes()
    padded = state.stream + bytes(-len(state.stream) % 8)
    total = HEADER.size + len(padded) + len(hashes) + CHECKSUM.size
    flags = 0 if state.hashes is None else WITH_HASHES
    body = HEADER.pack(MAGIC, VERSION, flags, total, machine, len(state.stream), len(hashes) // 8) + padded + hashes
    return body + CHECKSUM.pack(hash_bytes(body))


def parse(machine: bytes, state: bytes, n_pages: int) -> SavedState:
    """Take `state` apart; DeviceStateError if it is none of this machine with n_pages pages of guest RAM."""
    if len(state) < HEADER.size + CHECKSUM.size:
        raise DeviceStateError(f"the device state is {len(state)} bytes, shorter than its header")
    magic, version, flags, total, theirs, n_bytes, n_hashes = HEADER.unpack_from(state)
    if magic != MAGIC:
        raise DeviceStateError(f"the device state begins with {magic!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise DeviceStateError(f"the device state is of version {version}, this machine reads version {VERSION}")
    if total != len(state):
        raise DeviceStateError(f"the device state says it is {total} bytes and is {len(state)}")
    if CHECKSUM.unpack_from(state, total - CHECKSUM.size)[0] != hash_bytes(state[: -CHECKSUM.size]):
        raise DeviceStateError(f"the checksum of the device state ({total} bytes) does not hold")
    if theirs != machine:
        raise DeviceStateError(
            "the device state is of another machine", hint="start both QEMUs with the same command line and version"
        )
    if flags not in (0, WITH_HASHES) or n_hashes != (n_pages if flags else 0):
        raise DeviceStateError(f"the device state has flags {flags} and {n_hashes} hashes for {n_pages} pages")
    if n_bytes > total or total != HEADER.size + -(-n_bytes // 8) * 8 + n_hashes * 8 + CHECKSUM.size:
        raise DeviceStateError(f"the device state is {total} bytes, its parts are {n_bytes} and {n_hashes} hashes")
    stream = state[HEADER.size : HEADER.size + n_bytes]
    if not stream.startswith(STREAM_MAGIC) or not stream.endswith(STREAM_END):
        raise DeviceStateError(f"the {n_bytes} bytes in the device state are no stream of QEMU's")
    at = HEADER.size + -(-n_bytes // 8) * 8
    return SavedState(stream, np.frombuffer(state, dtype="<u8", count=n_hashes, offset=at) if flags else None)
