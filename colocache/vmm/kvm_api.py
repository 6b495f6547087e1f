# SPDX-License-Identifier: Apache-2.0
"""As much of the kernel's KVM interface as the reference machine uses: numbers, structs, a class per file descriptor.

x86-64 only. The names of structs and fields are those of the kernel's documentation (virt/kvm/api).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any

from colocache.errors import reason_of
from colocache.vmm.errors import MachineError

API_VERSION = 12
GET_API_VERSION = 0xAE00
CREATE_VM = 0xAE01
CHECK_EXTENSION = 0xAE03
GET_VCPU_MMAP_SIZE = 0xAE04
GET_SUPPORTED_CPUID = 0xC008AE05
CREATE_VCPU = 0xAE41
SET_USER_MEMORY_REGION = 0x4020AE46
SET_TSS_ADDR = 0xAE47
RUN = 0xAE80
GET_REGS = 0x8090AE81
SET_REGS = 0x4090AE82
GET_SREGS = 0x8138AE83
SET_SREGS = 0x4138AE84
SET_SIGNAL_MASK = 0x4004AE8B
SET_CPUID2 = 0x4008AE90
ENABLE_CAP = 0x4068AEA3

CAP_USER_MEMORY = 3
CAP_SYNC_REGS = 74
CAP_IMMEDIATE_EXIT = 136
CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
MANUAL_PROTECT_ENABLE = 1  # without INITIALLY_SET: a new slot's log is empty

SYNC_REGS = 1 | 2  # registers, and special ones, are in the run page after each run

MEM_LOG_DIRTY_PAGES = 1

EXIT_IO = 2
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17
EXIT_NAMES = {
    0: "unknown", 1: "exception", 2: "io", 5: "hlt", 6: "mmio", 8: "shutdown", 9: "fail entry", 10: "intr",
    17: "internal error",
}  # fmt: skip


def fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    """Fields of one type after each other."""
    return [(name, kind) for name in names.split()]


class Regs(ctypes.Structure):
    _fields_ = fields("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags", c_uint64)


class Segment(ctypes.Structure):
    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *fields("type present dpl db s l g avl unusable padding", c_uint8),
    ]


class Table(ctypes.Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(ctypes.Structure):
    _fields_ = [
        *fields("cs ds es fs gs ss tr ldt", Segment),
        ("gdt", Table),
        ("idt", Table),
        *fields("cr0 cr2 cr3 cr4 cr8 efer apic_base", c_uint64),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class MemoryRegion(ctypes.Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class Cap(ctypes.Structure):
    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64)]


class Cpuid(ctypes.Structure):
    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", c_uint8 * (40 * 256))]


class SignalMask(ctypes.Structure):
    _fields_ = [("len", c_uint32), ("sigset", c_uint8 * 8)]


class IoExit(ctypes.Structure):
    _fields_ = [
        ("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32), ("data_offset", c_uint64),
    ]  # fmt: skip


class RunPage(ctypes.Structure):
    """struct kvm_run: its head, the two exits that the machine looks into, and registers."""

    class Exit(ctypes.Union):
        _fields_ = [("io", IoExit), ("suberror", c_uint32), ("padding", c_uint8 * 256)]

    _fields_ = [
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("exit", Exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("regs", Regs),
        ("sregs", Sregs),
    ]


class KvmUnusableError(MachineError):
    """KVM can't be used here; the hint says what helps."""


class Kvm:
    """/dev/kvm, an empty VM and what this kernel's KVM can do. KvmUnusableError: the cause, and what helps."""

    def __init__(self) -> None:
        try:
            self.fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise KvmUnusableError(
                "there is no /dev/kvm",
                hint="`sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`; in a VM, allow it nested virtualisation",
            ) from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise KvmUnusableError(
                    f"/dev/kvm does not open: {reason_of(error)}",
                    hint="enable virtualisation in the firmware, or use --guest process",
                ) from None
            raise KvmUnusableError(
                "this user may not open /dev/kvm", hint="`sudo usermod -aG kvm $USER`, then log in again"
            ) from None
        self.vm = -1
        try:
            self._probe()
            self.vm = fcntl.ioctl(self.fd, CREATE_VM, 0)
        except OSError as error:
            self.close()
            raise KvmUnusableError(
                f"KVM makes no VM: {reason_of(error)}",
                hint="stop other hypervisors that hold the CPU's virtualisation, or use --guest process",
            ) from None
        except KvmUnusableError:
            self.close()
            raise

    def _probe(self) -> None:
        version = fcntl.ioctl(self.fd, GET_API_VERSION, 0)
        lacking = [cap for cap in (CAP_USER_MEMORY, CAP_IMMEDIATE_EXIT) if not self.extension(cap)]
        if version != API_VERSION or lacking:
            raise KvmUnusableError(
                f"this KVM is too old: API version {version}, wanted {API_VERSION}; capabilities missing: {lacking}",
                hint="use a kernel from 4.13 on, or --guest process",
            )

    def extension(self, cap: int) -> int:
        return fcntl.ioctl(self.fd, CHECK_EXTENSION, cap)

    def enable_manual_protect(self) -> bool:
        """Two calls instead of one for the dirty log: get, then clear. False where this KVM has only the one."""
        if not self.extension(CAP_MANUAL_DIRTY_LOG_PROTECT2) & MANUAL_PROTECT_ENABLE:
            return False
        cap = Cap(cap=CAP_MANUAL_DIRTY_LOG_PROTECT2)
        cap.args[0] = MANUAL_PROTECT_ENABLE
        fcntl.ioctl(self.vm, ENABLE_CAP, cap)
        return True

    def set_slot(self, slot: int, guest_addr: int, addr: int, len_bytes: int, *, logged: bool) -> None:
        flags = MEM_LOG_DIRTY_PAGES if logged else 0
        fcntl.ioctl(self.vm, SET_USER_MEMORY_REGION, MemoryRegion(slot, flags, guest_addr, len_bytes, addr))

    def close(self) -> None:
        for fd in (self.vm, self.fd):
            if fd >= 0:
                os.close(fd)
        self.vm = self.fd = -1


class Vcpu:
    """The one vCPU of a VM, with its run page mapped."""

    def __init__(self, kvm: Kvm) -> None:
        self.fd = fcntl.ioctl(kvm.vm, CREATE_VCPU, 0)
        self._map = mmap.mmap(self.fd, fcntl.ioctl(kvm.fd, GET_VCPU_MMAP_SIZE, 0))
        self.page = RunPage.from_buffer(self._map)
        self._synced = False  # the registers in the run page are the vCPU's
        if kvm.extension(CAP_SYNC_REGS) & SYNC_REGS == SYNC_REGS:
            self.page.kvm_valid_regs = SYNC_REGS
        cpuid = Cpuid(nent=256)
        fcntl.ioctl(kvm.fd, GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(self.fd, SET_CPUID2, cpuid)

    def run(self) -> None:
        self._synced = bool(self.page.kvm_valid_regs)
        fcntl.ioctl(self.fd, RUN, 0)

    def block_signals_but(self, signal_number: int) -> None:
        """While the guest runs no signal is delivered but this one, which ends the run and stays pending."""
        mask = (1 << 64) - 1 & ~(1 << (signal_number - 1))
        sigset = (c_uint8 * 8)(*mask.to_bytes(8, "little"))
        fcntl.ioctl(self.fd, SET_SIGNAL_MASK, SignalMask(8, sigset))

    def regs(self) -> Regs:
        regs = Regs()
        fcntl.ioctl(self.fd, GET_REGS, regs)
        return regs

    def sregs(self) -> Sregs:
        sregs = Sregs()
        fcntl.ioctl(self.fd, GET_SREGS, sregs)
        return sregs

    def all_registers(self) -> bytes:
        """Regs, then Sregs. Of a vCPU that ran since they were set from its run page, if this KVM puts them there: the
        two calls take 70 us in a pause."""
        if self._synced:
            return bytes(self.page.regs) + bytes(self.page.sregs)
        return bytes(self.regs()) + bytes(self.sregs())

    def set_regs(self, regs: Regs) -> None:
        self._synced = False
        fcntl.ioctl(self.fd, SET_REGS, regs)

    def set_sregs(self, sregs: Sregs) -> None:
        self._synced = False
        fcntl.ioctl(self.fd, SET_SREGS, sregs)

    def close(self) -> None:
        if self.fd >= 0:
            del self.page
            self._map.close()
            os.close(self.fd)
            self.fd = -1
