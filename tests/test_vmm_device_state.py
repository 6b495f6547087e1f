# SPDX-License-Identifier: Apache-2.0
"""A device state is taken whole or refused with a sentence; nothing that comes over a wire gets further."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocache.vmm.device_state import CHECKSUM, HEADER, DeviceState, Shape, hash_bytes, pack, parse
from colocache.vmm.errors import DeviceStateError
from colocache.vmm.workload import Workload

SHAPE = Shape("kvm", 0xABCDEF, (("boot", 3, 4096), ("pc.ram", 130, 4096)))
RAM_PAGES = 130


def state(**changes: object) -> DeviceState:
    facts: dict[str, object] = {
        "step": 700,
        "work": Workload(1, 100, 16, 4096, 8192),
        "loads": 2,
        "nonce": 99,
        "history": np.array([[0, 11], [300, 12], [700, 13]], dtype=np.uint64),
        "registers": bytes(range(200)) * 2,
        "hashes": np.arange(133, dtype=np.uint64),
    }
    return DeviceState(**(facts | changes))  # type: ignore[arg-type]


def again(data: bytes) -> DeviceState:
    return parse(SHAPE, data, ram_pages=RAM_PAGES)


def signed(body: bytes) -> bytes:
    return body + CHECKSUM.pack(hash_bytes(body))


@pytest.mark.parametrize("hashes", [np.arange(133, dtype=np.uint64), None], ids=["with hashes", "without"])
def test_what_was_packed_is_parsed(hashes: np.ndarray | None) -> None:
    was = state(hashes=hashes)
    got = again(pack(SHAPE, was))
    assert (got.step, got.work, got.loads, got.nonce, got.registers) == (700, was.work, 2, 99, was.registers)
    assert np.array_equal(got.history, was.history)
    assert (got.hashes is None) == (hashes is None)
    assert hashes is None or np.array_equal(got.hashes, hashes)


def test_a_state_at_its_very_beginning_is_one_too() -> None:
    got = again(pack(SHAPE, state(step=0, loads=0, nonce=0, history=np.zeros((0, 2), np.uint64), registers=b"")))
    assert len(got.history) == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"work": Workload(31, 100, 16, 0, 0)}, "does not fit its 130 pages"),
        ({"work": Workload(0, 0, 16, 0, 0)}, "does not fit"),
        ({"work": Workload(0, 1 << 40, 16, 0, 0)}, "does not fit"),
        ({"work": Workload((1 << 64) - 1, 2, 16, 0, 0)}, "does not fit"),
        ({"work": Workload(0, 10, 5000, 0, 0)}, "does not fit"),
        ({"work": Workload(0, 10, 16, 9, 8)}, "does not fit"),
        ({"work": Workload(0, 10, 16, 0, 65537)}, "does not fit"),
        ({"step": 699}, "no order"),
        ({"step": 1 << 62}, "no order"),
        ({"history": np.array([[0, 1], [5, 1], [4, 1]], dtype=np.uint64)}, "no order"),
        ({"history": np.zeros((0, 2), dtype=np.uint64)}, "at step 700 and has no history"),
        ({"nonce": 0}, "both or neither"),
        ({"registers": bytes(4104)}, "4104 bytes of registers"),
    ],
)
def test_what_this_machine_could_not_be_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(DeviceStateError, match=sentence):
        again(pack(SHAPE, state(**changes)))


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        (Shape("process", 0xABCDEF, SHAPE.blocks), "kind process, this one is kvm"),
        (Shape("kvm", 0xABCDEE, SHAPE.blocks), "another guest program"),
        (Shape("kvm", 0xABCDEF, (("boot", 3, 4096), ("pc.ram", 131, 4096))), "131 of 4096|131 pages"),
        (Shape("kvm", 0xABCDEF, (("boot", 3, 4096), ("pc.rom", 130, 4096))), "pc.rom"),
        (Shape("kvm", 0xABCDEF, SHAPE.blocks[:1]), "1 RAM blocks, not 2"),
    ],
)
def test_a_state_of_another_machine_is_refused_by_what_differs(theirs: Shape, sentence: str) -> None:
    with pytest.raises(DeviceStateError, match=sentence):
        again(pack(theirs, state(hashes=None)))


def test_another_version_and_a_wrong_beginning_are_said_before_the_checksum() -> None:
    data = pack(SHAPE, state())
    with pytest.raises(DeviceStateError, match="version 1, this machine reads version 2"):
        again(data[:8] + struct.pack("<I", 1) + data[12:])
    with pytest.raises(DeviceStateError, match="begins with"):
        again(b"QEVM" + data[4:])


def test_every_shorter_and_longer_state_is_refused() -> None:
    data = pack(SHAPE, state())
    for length in [*range(300), *range(300, len(data), 37), len(data) - 1]:
        with pytest.raises(DeviceStateError):
            again(data[:length])
    with pytest.raises(DeviceStateError):
        again(data + bytes(8))


def test_every_flipped_bit_is_noticed() -> None:
    data = pack(SHAPE, state())
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(DeviceStateError):
            again(bytes(damaged))


def refused_or_in_bounds(data: bytes) -> None:
    try:
        got = again(data)
    except DeviceStateError:
        return
    assert got.work.fits(RAM_PAGES)
    assert len(got.registers) <= 4096
    assert got.hashes is None or len(got.hashes) == SHAPE.n_pages
    assert len(got.history) * 16 + len(got.registers) < len(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_refused_or_in_bounds(data: bytes) -> None:
    refused_or_in_bounds(data)
    refused_or_in_bounds(data + CHECKSUM.pack(hash_bytes(data)))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, HEADER.size // 4 - 1),
            st.sampled_from([0, 1, 2, 3, 7, 8, 100, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damage_that_comes_with_a_good_checksum_is_refused_or_in_bounds(patches: list[tuple[int, int]]) -> None:
    body = bytearray(pack(SHAPE, state())[: -CHECKSUM.size])
    for word, value in patches:
        struct.pack_into("<I", body, 4 * word, value)
    refused_or_in_bounds(signed(bytes(body)))
