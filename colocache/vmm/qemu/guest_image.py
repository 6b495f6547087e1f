# SPDX-License-Identifier: Apache-2.0
"""The small guest as a multiboot kernel, and where everything of it lies in guest RAM (guest_kernel.h)."""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from colocache.errors import ArgumentError
from colocache.vmm.errors import MachineError
from colocache.vmm.history import Words
from colocache.vmm.qemu._guest import ffi, lib
from colocache.vmm.workload import PAGE, GuestOptions, Workload, workload_for

LOAD = 0x100000
CONTROL_PAGE, GDT_PAGE, TABLES_PAGE, CODE_PAGE, MAILBOX_PAGE, STACK_PAGE, RING_PAGE = 1, 2, 3, 9, 17, 18, 20
CODE_PAGES, STACK_PAGES, RING_PAGES = 8, 2, 64
END_PAGE = RING_PAGE + RING_PAGES
CONSTANT_PAGES = [0, *range(GDT_PAGE, CODE_PAGE + CODE_PAGES)]  # the guest writes none of these
RING_ENTRIES = RING_PAGES * PAGE // 16

WORK_ADDR = 16 << 20  # the working set lies from here on
TOP_FREE = 2 << 20  # bytes at the end of RAM that are the firmware's
RAM_MIN, RAM_MAX = 20 << 20, 3 << 30  # above it QEMU cuts RAM in two

CONTROL = struct.Struct("<12Q")
MAILBOX = struct.Struct("<14Q")  # struct guest_mailbox
MAILBOX_ADDR = LOAD + MAILBOX_PAGE * PAGE
BATCHES_PER_SECOND = 100
BATCH_STEPS_FLAT_OUT = 2048
LINES_PER_SECOND = 4

PRESENT_WRITE_USER, LARGE, ACCESSED_DIRTY = 0x7, 0x80, 0x60
GDT = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF]
GDT_POINTER = 0xF00  # offset in its page


@dataclass(frozen=True)
class GuestImage:
    """A kernel for `-kernel`: the bytes of the file."""

    kernel: bytes

    @property
    def name(self) -> str:
        """The same for the same code, whatever it is asked to do."""
        code = b"".join(self.pages[page].tobytes() for page in CONSTANT_PAGES)
        return f"small guest {hashlib.sha256(code).hexdigest()[:16]}"

    @property
    def pages(self) -> Words:
        """The kernel where QEMU loads it, shape (n, 512)."""
        whole = self.kernel + bytes(-len(self.kernel) % PAGE)
        return np.frombuffer(whole, dtype=np.uint64).reshape(-1, PAGE // 8)


def guest_image(ram_bytes: int, options: GuestOptions, *, kvm: bool) -> GuestImage:
    """The small guest for a machine with ram_bytes bytes."""
    if not RAM_MIN <= ram_bytes <= RAM_MAX or ram_bytes % PAGE:
        raise ArgumentError(
            f"{ram_bytes} bytes of RAM: the small guest takes {RAM_MIN >> 20} MiB to {RAM_MAX >> 30} GiB, "
            f"a multiple of {PAGE} bytes"
        )
    boot, text, entry = _code()
    room = (ram_bytes - WORK_ADDR - TOP_FREE) // PAGE
    inside = workload_for(options, room, room // 2)
    first = WORK_ADDR // PAGE + inside.first_page
    work = Workload(first, inside.n_pages, inside.run_pages, inside.rewrite_below, inside.run_below)
    memory = bytearray(RING_PAGE * PAGE)
    head = bytearray(boot)
    # The multiboot header's addresses: itself, load, end of what is in the file, end of what is cleared, entry.
    struct.pack_into("<II", head, 20, LOAD + RING_PAGE * PAGE, LOAD + RING_PAGE * PAGE)
    memory[: len(head)] = head
    _put(memory, CONTROL_PAGE, _control(entry, options, ram_bytes, kvm=kvm))
    _put(memory, GDT_PAGE, struct.pack(f"<{len(GDT)}Q", *GDT))
    struct.pack_into("<HI", memory, GDT_PAGE * PAGE + GDT_POINTER, len(GDT) * 8 - 1, LOAD + GDT_PAGE * PAGE)
    _put(memory, TABLES_PAGE, _tables())
    _put(memory, CODE_PAGE, text)
    box = (0, 0, 0, 0, work.first_page, work.n_pages, work.run_pages,
           work.rewrite_below, work.run_below, 1 << 40, 0, 0, 0, 0)  # fmt: skip
    _put(memory, MAILBOX_PAGE, MAILBOX.pack(*box))
    return GuestImage(bytes(memory))


def _put(memory: bytearray, page: int, data: bytes) -> None:
    memory[page * PAGE : page * PAGE + len(data)] = data


def _code() -> tuple[bytes, bytes, int]:
    """Boot code, all other code, and the offset of its entry."""
    length, entry = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    boot = bytes(ffi.buffer(lib.guest_kernel_boot(length), length[0]))
    text = bytes(ffi.buffer(lib.guest_kernel_text(length, entry), length[0]))
    if not boot:
        raise MachineError(
            "the small QEMU guest is x86-64 code", hint="give a kernel, or a whole command line after --"
        )
    if len(boot) > PAGE or len(text) > CODE_PAGES * PAGE:
        raise MachineError(f"the small guest is {len(boot)} and {len(text)} bytes, more than its pages")
    return boot, text, entry[0]


def _control(entry: int, options: GuestOptions, ram_bytes: int, *, kvm: bool) -> bytes:
    rate = options.steps_per_second
    steps = max(1, round(rate / BATCHES_PER_SECOND)) if rate else BATCH_STEPS_FLAT_OUT
    pace = round(ticks_per_second() * steps / rate) if rate else 0
    return CONTROL.pack(
        LOAD + CODE_PAGE * PAGE + entry,
        LOAD + (STACK_PAGE + STACK_PAGES) * PAGE - 8,  # as after a call
        int(kvm and not hardware_virtualization()),
        MAILBOX_ADDR,
        LOAD + RING_PAGE * PAGE,
        steps,
        pace,
        round(ticks_per_second() / LINES_PER_SECOND),
        WORK_ADDR,
        ram_bytes - TOP_FREE,
        0,
        0,
    )


def _tables() -> bytes:
    """4 GiB mapped one to one by 2 MiB pages, for level 3; accessed and dirty set, so that no CPU writes them."""
    flags = PRESENT_WRITE_USER | ACCESSED_DIRTY
    words = np.zeros((6, 512), dtype=np.uint64)
    first = LOAD + TABLES_PAGE * PAGE
    words[0, 0] = first + PAGE | flags
    words[1, :4] = [first + (2 + i) * PAGE | flags for i in range(4)]
    words[2:] = (np.arange(2048, dtype=np.uint64) * np.uint64(2 << 20) | np.uint64(flags | LARGE)).reshape(4, 512)
    return words.tobytes()


def hardware_virtualization() -> bool:
    """Whether this CPU has what KVM builds on. Without it, a KVM emulates privilege level 0 and can't do IRETQ."""
    words = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    return bool(words & {"vmx", "svm"})


@cache
def ticks_per_second() -> float:
    """The rate of this CPU's time stamp counter, measured."""
    begin, ticks = time.perf_counter(), lib.guest_kernel_ticks()
    time.sleep(0.02)
    end, later = time.perf_counter(), lib.guest_kernel_ticks()
    return float(max(1, later - ticks) / (end - begin))
