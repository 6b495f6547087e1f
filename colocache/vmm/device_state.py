# SPDX-License-Identifier: Apache-2.0
"""The device state of the reference machine as bytes: everything of it that is not RAM.

Little-endian, in this order: header; a record per RAM block; the history; the vCPU's registers (KVM guests); if asked
for, a hash per page of every block; the hash of all that. Version 2. Whoever reads it trusts nothing: parse() takes no
memory it has not bounded and refuses, with one sentence, whatever this machine could not have written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from colocache.vmm._native import ffi, lib
from colocache.vmm.errors import DeviceStateError
from colocache.vmm.history import ENTRIES_MAX, STEPS_MAX, Words
from colocache.vmm.workload import Workload

MAGIC = b"COLOVMST"
VERSION = 2
HEADER = struct.Struct("<8sI12sQIIIIQQQQQQQQQ")  # the 12 bytes: the kind of guest by name
BLOCK = struct.Struct("<32sQII")
CHECKSUM = struct.Struct("<Q")
WITH_HASHES = 1
REGISTERS_MAX = 4096


@dataclass(frozen=True)
class Shape:
    """What both machines of a pair have in common, and a device state must therefore name.

    program: the hash of the boot block as the program starts, so of the build's guest program too.
    blocks: (name, pages, page size in bytes) of each RAM block.
    """

    kind: str
    program: int
    blocks: tuple[tuple[str, int, int], ...]

    @property
    def n_pages(self) -> int:
        return sum(n for _, n, _ in self.blocks)


@dataclass(frozen=True)
class DeviceState:
    """A device state taken apart. `hashes` is one u64 per page of all blocks in their order, or None."""

    step: int
    work: Workload
    loads: int
    nonce: int
    history: Words
    registers: bytes
    hashes: Words | None


def hash_bytes(data: bytes) -> int:
    """The hash that guards a device state; data of any length is filled up with zeros to 8 bytes."""
    padded = data + bytes(-len(data) % 8)
    with ffi.from_buffer(padded) as at:
        value: int = lib.guest_hash(at, len(padded))
    return value


def pack(shape: Shape, state: DeviceState) -> bytes:
    """The bytes of `state`."""
    registers = state.registers + bytes(-len(state.registers) % 8)
    parts = [BLOCK.pack(name.encode(), n_pages, page_size, 0) for name, n_pages, page_size in shape.blocks]
    parts += [state.history.tobytes(), registers]
    if state.hashes is not None:
        parts.append(state.hashes.tobytes())
    work = state.work
    header = HEADER.pack(
        MAGIC, VERSION, shape.kind.encode(), HEADER.size + sum(map(len, parts)) + CHECKSUM.size,
        WITH_HASHES if state.hashes is not None else 0, len(shape.blocks), len(state.history), len(registers),
        shape.program, state.step, state.loads, state.nonce,
        work.first_page, work.n_pages, work.run_pages, work.rewrite_below, work.run_below,
    )  # fmt: skip
    body = b"".join([header, *parts])
    return body + CHECKSUM.pack(hash_bytes(body))


def parse(shape: Shape, state: bytes, *, ram_pages: int) -> DeviceState:
    """Take `state` apart; raises DeviceStateError if it is not one of a machine of this shape."""
    if len(state) < HEADER.size + CHECKSUM.size:
        raise DeviceStateError(f"the device state is {len(state)} bytes, shorter than its header")
    (magic, version, kind, total, flags, n_blocks, n_history, n_registers, program, step, loads, nonce, *numbers) = (
        HEADER.unpack_from(state)
    )
    if magic != MAGIC:
        raise DeviceStateError(f"the device state begins with {magic!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise DeviceStateError(f"the device state is of version {version}, this machine reads version {VERSION}")
    if total != len(state):
        raise DeviceStateError(f"the device state says it is {total} bytes and is {len(state)}")
    if CHECKSUM.unpack_from(state, total - CHECKSUM.size)[0] != hash_bytes(state[: -CHECKSUM.size]):
        raise DeviceStateError(f"the checksum of the device state ({total} bytes) does not hold")
    theirs = kind.rstrip(b"\0").decode("ascii", "replace")
    if theirs != shape.kind:
        raise DeviceStateError(
            f"the device state is of a guest of kind {theirs}, this one is {shape.kind}",
            hint="start both machines with the same --guest",
        )
    if flags not in (0, WITH_HASHES) or n_blocks != len(shape.blocks):
        raise DeviceStateError(f"the device state has flags {flags} and {n_blocks} RAM blocks, not {len(shape.blocks)}")
    if n_history > ENTRIES_MAX or n_registers > REGISTERS_MAX or n_registers % 8:
        raise DeviceStateError(f"the device state counts {n_history} resumes and {n_registers} bytes of registers")
    n_hashes = shape.n_pages if flags & WITH_HASHES else 0
    want = HEADER.size + n_blocks * BLOCK.size + n_history * 16 + n_registers + n_hashes * 8 + CHECKSUM.size
    if total != want:
        raise DeviceStateError(f"the device state is {total} bytes, its counts make {want}")
    at = HEADER.size
    for name, n_pages, page_size in shape.blocks:
        block = BLOCK.unpack_from(state, at)
        if block != (name.encode().ljust(32, b"\0"), n_pages, page_size, 0):
            raise DeviceStateError(
                f"the device state has block {block[0].rstrip(bytes(1))!r} of {block[1]} pages of {block[2]} bytes "
                f"where this machine has {name} of {n_pages} of {page_size}"
            )
        at += BLOCK.size
    if program != shape.program:
        raise DeviceStateError(
            f"the device state is of another guest program ({program:#x}, here {shape.program:#x})",
            hint="run the same build of colocache on both hosts",
        )
    work = Workload(*numbers)
    if not work.fits(ram_pages):
        raise DeviceStateError(f"the device state has a guest that does not fit its {ram_pages} pages: {work}")
    history = np.frombuffer(state, dtype="<u8", count=2 * n_history, offset=at).reshape(n_history, 2)
    at += 16 * n_history
    firsts = history[:, 0]
    if step >= STEPS_MAX or (n_history and (firsts[-1] > step or bool((firsts[1:] < firsts[:-1]).any()))):
        raise DeviceStateError(f"the history in the device state is in no order, or step {step} is before its end")
    if step and not n_history:
        raise DeviceStateError(f"the device state is at step {step} and has no history")
    if bool(loads) != bool(nonce):
        raise DeviceStateError(f"the device state counts {loads} loads and has nonce {nonce:#x}: both or neither are 0")
    registers = state[at : at + n_registers]
    at += n_registers
    hashes = np.frombuffer(state, dtype="<u8", count=n_hashes, offset=at) if n_hashes else None
    return DeviceState(step, work, loads, nonce, history, registers, hashes)
