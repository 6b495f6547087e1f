# SPDX-License-Identifier: Apache-2.0
"""Memory that a guest gives back comes back to its host."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from colocache import BlockSpec, Cache, Memory, OrderError, RangeError, SealedError, UnsupportedError


def test_pages_given_back_take_no_memory_and_are_written_to_nobody_but_a_sparse_block(
    make_memory: Callable[..., Memory],
) -> None:
    memory = make_memory((BlockSpec("ram", 1 << 20),), reserve=False, backing="shm")
    guest = memory.images[0].guest_fd
    with Cache.create(memory) as cache:
        for pfn in range(16):
            cache.receive(1, "ram", pfn, b"x" * 4096)
        cache.receive_zero(1, "ram", 16, 240)
        cache.device_state_buffer(1, 0)
        with pytest.raises(OrderError):
            cache.give_back("ram", 0)
        cache.seal(1)
        with pytest.raises(SealedError, match="loaded"):
            cache.give_back("ram", 0)
        cache.flush()
        cache.loaded()
        assert os.fstat(guest).st_blocks * 512 == 16 * 4096
        cache.give_back("ram", 4, 8)
        assert os.fstat(guest).st_blocks * 512 == 8 * 4096
        with pytest.raises(RangeError):
            cache.give_back("ram", 250, 7)
    with (
        Cache.create(make_memory((BlockSpec("ram", 1 << 20),), backing="shm")) as cache,
        pytest.raises(UnsupportedError, match="sparse"),
    ):
        cache.give_back("ram", 0)


def test_the_initial_copy_of_bounded_memory_takes_what_the_guest_uses(region_name: str) -> None:
    with (
        Memory.create(
            region_name, [BlockSpec("ram", 1 << 20)], backing="shm", reserve=False, memory_mode="bounded"
        ) as memory,
        Cache.create(memory) as cache,
    ):
        cache.receive(1, "ram", 5, b"x" * 4096)
        cache.receive_zero(1, "ram", 6, 250)
        cache.device_state_buffer(1, 0)
        cache.seal(1)
        cache.flush()
        cache.loaded()
        assert os.fstat(memory.images[0].guest_fd).st_blocks * 512 == 4096
        with pytest.raises(UnsupportedError, match="bounded"):
            cache.give_back("ram", 0)
