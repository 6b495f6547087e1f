# SPDX-License-Identifier: Apache-2.0
"""Where everything of the guest lies: its two RAM blocks, their memory slots, and what the boot block holds.

    guest-physical          block, pages                        slot
    0                       boot, all                           0
    8 MiB                   (the mailbox: no RAM block)         3
    16 MiB                  pc.ram, up to the split             1
    4 GiB and a bit         pc.ram, from the split              2

As in a PC, pc.ram is cut by a hole below 4 GiB, so that one block is two slots; here the cut lies inside any size of
RAM and at a page that is no multiple of 64. Addresses the guest uses are guest-physical ones, mapped one to one by
2 MiB pages.

Boot block: page 0 nothing; page tables; code; "firmware", which nobody writes; last page the device shadow.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from colocache.errors import ArgumentError
from colocache.vmm.history import Words, mix, page_words
from colocache.vmm.workload import PAGE

BOOT, RAM = "boot", "pc.ram"  # names of the two blocks, in this order

MIB, GIB = 1 << 20, 1 << 30
MAILBOX_ADDR = 8 * MIB
MAILBOX_BYTES = 4 * PAGE  # the struct, then the stack
LOW_ADDR = 16 * MIB
HOLE_ADDR = 3 * GIB
HIGH_ADDR = 4 * GIB
HUGE = 2 * MIB

PML4_PAGE, PDPT_PAGE, FIRST_PD_PAGE = 1, 2, 3
CODE_PAGES = 2
PROGRAM_OFFSET = 32  # in the code pages; the stub lies before it
BOOT_PAGES_MIN = 131  # so that the block's bitmap has a word that is all its own, and a tail
RAM_PAGES_MIN = 128
EXIT_PORT = 0x10

PRESENT_WRITE_USER, LARGE, ACCESSED_DIRTY = 0x7, 0x80, 0x60


@dataclass(frozen=True)
class Layout:
    """Sizes in pages of a guest whose two blocks hold boot_pages and ram_pages pages."""

    boot_pages: int
    ram_pages: int
    split_page: int
    n_tables: int  # page directories, one a GiB

    @property
    def code_page(self) -> int:
        return FIRST_PD_PAGE + self.n_tables

    @property
    def code_addr(self) -> int:
        return self.code_page * PAGE

    @property
    def shadow_page(self) -> int:
        """The page of `boot` that the load of a device state writes."""
        return self.boot_pages - 1

    @property
    def high_addr(self) -> int:
        """Where pc.ram goes on after the hole: as far into 2 MiB as in the block, so that huge pages can stay huge."""
        return HIGH_ADDR + self.split_page * PAGE % HUGE


def layout_for(ram_bytes: int) -> Layout:
    """The layout of a guest with ram_bytes bytes in both blocks together."""
    if ram_bytes % PAGE or ram_bytes < (BOOT_PAGES_MIN + RAM_PAGES_MIN) * PAGE:
        raise ArgumentError(
            f"{ram_bytes} bytes of guest RAM: it must be a multiple of {PAGE} and at least "
            f"{(BOOT_PAGES_MIN + RAM_PAGES_MIN) * PAGE}"
        )
    n_tables = (HIGH_ADDR + ram_bytes + HUGE - 1) // GIB + 1
    if n_tables > 512:
        raise ArgumentError(f"{ram_bytes} bytes of guest RAM: the guest's page tables reach {507 * GIB}")
    # An odd number is no multiple of 64.
    boot = max(BOOT_PAGES_MIN, FIRST_PD_PAGE + n_tables + CODE_PAGES + 2) | 1
    ram = ram_bytes // PAGE - boot
    split = min(ram * 5 // 8, (HOLE_ADDR - LOW_ADDR) // PAGE - 64) // 64 * 64 + 37
    return Layout(boot, ram, split, n_tables)


def stub(program_offset: int) -> bytes:
    """rdi := mailbox; call the program; tell the VMM; again."""
    load = b"\x48\xbf" + struct.pack("<Q", MAILBOX_ADDR)
    call = b"\xe8" + struct.pack("<i", program_offset - len(load) - 5)
    out = b"\xe6" + bytes([EXIT_PORT])
    back = -(len(load) + len(call) + len(out) + 2)
    return load + call + out + b"\xeb" + struct.pack("<b", back)


def boot_image(layout: Layout, program: bytes) -> Words:
    """What the boot block holds from the first instruction on, shape (boot_pages, 512), its shadow page zero."""
    if PROGRAM_OFFSET + len(program) > CODE_PAGES * PAGE:
        raise ArgumentError(f"the guest program is {len(program)} bytes, more than its {CODE_PAGES} pages")
    n_firmware = layout.boot_pages - layout.code_page - CODE_PAGES - 1
    image = np.zeros((layout.boot_pages, PAGE // 8), dtype=np.uint64)
    image[PML4_PAGE, 0] = PDPT_PAGE * PAGE | PRESENT_WRITE_USER | ACCESSED_DIRTY
    tables = np.arange(layout.n_tables, dtype=np.uint64)
    flags = np.uint64(PRESENT_WRITE_USER | ACCESSED_DIRTY)
    # Accessed and dirty are set beforehand: a CPU that set them would write, and dirty, this block.
    image[PDPT_PAGE, : layout.n_tables] = (tables + np.uint64(FIRST_PD_PAGE)) * np.uint64(PAGE) | flags
    entries = np.arange(layout.n_tables * 512, dtype=np.uint64) * np.uint64(HUGE) | flags | np.uint64(LARGE)
    image[FIRST_PD_PAGE : layout.code_page] = entries.reshape(layout.n_tables, 512)
    head = stub(PROGRAM_OFFSET)
    code = image[layout.code_page : layout.code_page + CODE_PAGES].reshape(-1).view(np.uint8)
    code[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    code[PROGRAM_OFFSET : PROGRAM_OFFSET + len(program)] = np.frombuffer(program, dtype=np.uint8)
    firmware = np.arange(n_firmware, dtype=np.uint64) + np.uint64(0xB007)
    image[layout.code_page + CODE_PAGES : layout.shadow_page] = page_words(mix(firmware))
    return image


def shadow_words(loads: int, nonce: int) -> Words:
    """The shadow page, shape (512,), after the load number `loads` of a device state, which drew `nonce`; 0: zeros."""
    if loads == 0:
        return np.zeros(PAGE // 8, dtype=np.uint64)
    seed = mix(mix(np.array([nonce], dtype=np.uint64)) + np.uint64(loads))
    words: Words = page_words(seed)[0]
    return words
