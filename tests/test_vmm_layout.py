# SPDX-License-Identifier: Apache-2.0
"""Guest memory is laid out as the promises about odd sizes need it; the boot block maps what the program touches."""

from __future__ import annotations

import numpy as np
import pytest

from colocache import BlockSpec
from colocache.errors import ArgumentError
from colocache.vmm import blocks_for
from colocache.vmm.base import program_bytes
from colocache.vmm.layout import (
    CODE_PAGES,
    HIGH_ADDR,
    HOLE_ADDR,
    LOW_ADDR,
    MAILBOX_ADDR,
    MAILBOX_BYTES,
    PROGRAM_OFFSET,
    boot_image,
    layout_for,
    shadow_words,
)

MIB, GIB = 1 << 20, 1 << 30
SIZES = [259 * 4096, 2 * MIB, 3 * MIB + 4096, 64 * MIB, 256 * MIB, 3 * GIB, 4 * GIB - 4096, 5 * GIB, 500 * GIB]


@pytest.mark.parametrize("ram_bytes", SIZES)
def test_two_blocks_whose_sizes_and_split_are_no_multiples_of_64_pages(ram_bytes: int) -> None:
    boot, ram = blocks_for(ram_bytes)
    assert (boot.name, ram.name) == ("boot", "pc.ram")
    assert isinstance(boot, BlockSpec)
    assert boot.len_bytes + ram.len_bytes == ram_bytes
    assert boot.n_pages % 2 == 1
    layout = layout_for(ram_bytes)
    assert 0 < layout.split_page < layout.ram_pages
    assert layout.split_page % 64 != 0
    assert boot.len_bytes <= MAILBOX_ADDR
    assert MAILBOX_ADDR + MAILBOX_BYTES <= LOW_ADDR
    assert LOW_ADDR + layout.split_page * 4096 <= HOLE_ADDR
    assert layout.high_addr >= HIGH_ADDR
    assert (layout.high_addr - layout.split_page * 4096) % (2 * MIB) == 0


@pytest.mark.parametrize("ram_bytes", [0, 4096, 258 * 4096, 256 * MIB + 1, 512 * GIB, -4096])
def test_sizes_no_guest_can_have_are_refused(ram_bytes: int) -> None:
    with pytest.raises(ArgumentError, match="bytes of guest RAM"):
        blocks_for(ram_bytes)


def walk(image: np.ndarray, addr: int) -> tuple[int, int]:
    """Follow the page tables of the boot block: (physical address, flags or-ed down)."""
    table, flags = 1, ~0
    for shift in (39, 30):
        entry = int(image[table, addr >> shift & 511])
        flags &= entry & 0xFFF
        table = entry >> 12
    entry = int(image[table, addr >> 21 & 511])
    assert entry & 0x80
    return (entry & ~0x1FFFFF) + (addr & 0x1FFFFF), flags & entry & 0xFFF


@pytest.mark.parametrize("ram_bytes", SIZES)
def test_every_address_the_program_uses_is_mapped_to_itself_for_level_3(ram_bytes: int) -> None:
    layout = layout_for(ram_bytes)
    image = boot_image(layout, program_bytes())
    high_end = layout.high_addr + (layout.ram_pages - layout.split_page) * 4096 - 8
    low_end = LOW_ADDR + layout.split_page * 4096 - 8
    for addr in (layout.code_addr, MAILBOX_ADDR, MAILBOX_ADDR + MAILBOX_BYTES - 8, LOW_ADDR, low_end, high_end):
        # present, writable, user, accessed, dirty: the CPU has nothing to write into the tables
        assert walk(image, addr) == (addr, 0x67 & walk(image, addr)[1])
        assert walk(image, addr)[1] & 0x27 == 0x27
    assert walk(image, layout.high_addr)[0] == layout.high_addr


def test_the_boot_block_holds_the_program_and_an_empty_shadow_page() -> None:
    layout, program = layout_for(256 * MIB), program_bytes()
    image = boot_image(layout, program)
    code = image[layout.code_page : layout.code_page + CODE_PAGES].tobytes()
    assert code[PROGRAM_OFFSET : PROGRAM_OFFSET + len(program)] == program
    call = code[10:15]
    assert call[0] == 0xE8
    assert 15 + int.from_bytes(call[1:], "little", signed=True) == PROGRAM_OFFSET
    assert code[17] == 0xEB
    assert 19 + int.from_bytes(code[18:19], "little", signed=True) == 0
    assert not image[layout.shadow_page].any()
    assert image[layout.code_page + CODE_PAGES : layout.shadow_page].all()


def test_a_program_too_long_for_its_pages_is_refused() -> None:
    with pytest.raises(ArgumentError, match="8192 bytes"):
        boot_image(layout_for(256 * MIB), bytes(8192))


def test_each_load_has_its_own_shadow_page() -> None:
    pages = [shadow_words(0, 0), shadow_words(1, 5), shadow_words(1, 6), shadow_words(2, 5)]
    assert not pages[0].any()
    assert len({page.tobytes() for page in pages}) == 4
