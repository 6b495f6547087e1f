# SPDX-License-Identifier: Apache-2.0
"""The KVM guest: one vCPU in 64-bit mode at privilege level 3, three logged memory slots, its program in `boot`.

It enters level 3 directly, with IOPL 3 so that OUT works there: a KVM that is itself a guest may run only that
natively. There is no interrupt table; any exception ends the guest, and the machine says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import platform
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colocache.errors import reason_of
from colocache.vmm import kvm_api
from colocache.vmm.base import ReferenceMachine
from colocache.vmm.errors import DeviceStateError, MachineError
from colocache.vmm.kvm_api import Kvm, KvmUnusableError, Regs, Segment, Sregs, Vcpu
from colocache.vmm.layout import (
    CODE_PAGES,
    EXIT_PORT,
    LOW_ADDR,
    MAILBOX_ADDR,
    MAILBOX_BYTES,
    PML4_PAGE,
)
from colocache.vmm.machine import MarkDirty, Ram
from colocache.vmm.workload import PAGE, GuestOptions

if TYPE_CHECKING:
    from colocache import Cache, KvmDirtyLog, Sender

BOOT_SLOT, LOW_SLOT, HIGH_SLOT, MAILBOX_SLOT = range(4)
KICK = signal.SIGRTMIN + 3

CR0 = 0x80050033  # paging, protection, write protection, and what goes with them
CR4 = 0x620  # PAE, SSE
EFER = 0xD01  # long mode, no-execute, syscall
RFLAGS = 0x3002  # IOPL 3
RFLAGS_CHANGE = 0x10CD5  # arithmetic flags and RF
TSS_ADDR = 12 << 20  # three free pages for KVM itself on older Intel CPUs


def kvm_trouble() -> tuple[str, str] | None:
    """What keeps a KVM guest from running here and what helps, in a sentence each; None if nothing does."""
    if platform.machine() != "x86_64":
        return f"the KVM guest is x86-64 code and this machine is {platform.machine()}", "use --guest process"
    try:
        Kvm().close()
    except KvmUnusableError as error:
        return error.sentence, error.hint or "use --guest process"
    return None


class KvmMachine(ReferenceMachine):
    """See machine.Machine."""

    kind = "kvm"

    @classmethod
    def trouble(cls) -> tuple[str, str] | None:
        return kvm_trouble()

    def __init__(self, rams: Sequence[Ram], options: GuestOptions, mark_dirty: MarkDirty) -> None:
        super().__init__(rams, options, mark_dirty)
        self._kvm: Kvm | None = None
        self._vcpu: Vcpu | None = None
        self._log: KvmDirtyLog | None = None
        try:
            self._kvm = Kvm()
            self._log = self._make_memory(self._kvm)
            self._vcpu = self._make_vcpu(self._kvm)
        except OSError as error:
            self.close()
            raise MachineError(f"KVM refuses this guest: {reason_of(error)}") from error
        except BaseException:
            self.close()
            raise

    def _make_memory(self, kvm: Kvm) -> KvmDirtyLog | None:
        from colocache import KvmDirtyLog, KvmSlot

        kvm.enable_manual_protect()  # if this KVM can: getting the log is then almost free
        with contextlib.suppress(OSError):  # only Intel CPUs have it
            fcntl.ioctl(kvm.vm, kvm_api.SET_TSS_ADDR, TSS_ADDR)
        split, ram = self.layout.split_page, self.ram
        logged = not ram.private
        high = self.layout.high_addr
        kvm.set_slot(BOOT_SLOT, 0, self.boot_ram.addr, self.boot_ram.len_bytes, logged=logged)
        kvm.set_slot(LOW_SLOT, LOW_ADDR, ram.addr, split * PAGE, logged=logged)
        kvm.set_slot(HIGH_SLOT, high, ram.addr + split * PAGE, (ram.n_pages - split) * PAGE, logged=logged)
        kvm.set_slot(MAILBOX_SLOT, MAILBOX_ADDR, self._mailbox.addr, MAILBOX_BYTES, logged=False)
        self._mailbox.place(split, LOW_ADDR, high)
        if not logged:
            return None
        slots = [
            KvmSlot(BOOT_SLOT, self.boot_ram.index, 0, self.boot_ram.n_pages),
            KvmSlot(LOW_SLOT, ram.index, 0, split),
            KvmSlot(HIGH_SLOT, ram.index, split, ram.n_pages - split),
        ]
        return KvmDirtyLog(kvm.vm, slots)

    def _make_vcpu(self, kvm: Kvm) -> Vcpu:
        vcpu = Vcpu(kvm)
        try:
            vcpu.block_signals_but(KICK)
            sregs = vcpu.sregs()
            sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0, PML4_PAGE * PAGE, CR4, EFER
            sregs.cs = Segment(0, 0xFFFFFFFF, 0x33, type=11, present=1, dpl=3, db=0, s=1, l=1, g=1)
            for name in ("ds", "es", "fs", "gs", "ss"):
                setattr(sregs, name, Segment(0, 0xFFFFFFFF, 0x2B, type=3, present=1, dpl=3, db=1, s=1, l=0, g=1))
            vcpu.set_sregs(sregs)
            # The call in the stub leaves the stack as the ABI wants it at a function's first instruction.
            stack = MAILBOX_ADDR + MAILBOX_BYTES
            vcpu.set_regs(Regs(rip=self.layout.code_addr, rflags=RFLAGS, rsp=stack))
        except BaseException:
            vcpu.close()
            raise
        return vcpu

    @property
    def dirty_source(self) -> str:
        return "kvm" if self._log is not None else "none"

    # ---- running ---------------------------------------------------------------------------------

    def _enter(self) -> None:
        vcpu, box = self._running_vcpu(), self._mailbox.box
        while True:
            try:
                vcpu.run()
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN):
                    raise MachineError(f"KVM_RUN failed: {reason_of(error)}") from error
                self._after_kick(vcpu)
                if self._thread.given_up:
                    raise MachineError(f"the guest was given up at step {self.steps}") from None
                continue
            page = vcpu.page
            if page.exit_reason == kvm_api.EXIT_IO and page.exit.io.port == EXIT_PORT:
                self._complete_io(vcpu)
                if box.stop or box.step == box.limit:
                    return
            elif page.exit_reason != kvm_api.EXIT_INTR:
                raise MachineError(self._exit_sentence(vcpu))

    def _complete_io(self, vcpu: Vcpu) -> None:
        """KVM finishes an OUT, and moves the vCPU past it, only when the vCPU is run again: run it no further."""
        vcpu.page.immediate_exit = 1
        try:
            vcpu.run()
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN):
                raise MachineError(f"KVM_RUN failed after OUT: {reason_of(error)}") from error
        self._after_kick(vcpu)

    def _after_kick(self, vcpu: Vcpu) -> None:
        vcpu.page.immediate_exit = 0
        while signal.sigtimedwait({KICK}, 0) is not None:
            pass

    def _exit_sentence(self, vcpu: Vcpu) -> str:
        reason = vcpu.page.exit_reason
        what = f"the vCPU came out with exit reason {reason} ({kvm_api.EXIT_NAMES.get(reason, 'not known here')})"
        if reason == kvm_api.EXIT_INTERNAL_ERROR:
            what += f", suberror {vcpu.page.exit.suberror}"
        if reason == kvm_api.EXIT_IO:
            what += f" on port {vcpu.page.exit.io.port:#x}"
        with contextlib.suppress(OSError):
            what += f" at address {vcpu.regs().rip:#x}"
        return f"{what}, step {self.steps}"

    def _kick(self) -> None:
        vcpu = self._vcpu
        if vcpu is not None and self._thread.alive:
            vcpu.page.immediate_exit = 1
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(self._thread.ident, KICK)

    def _running_vcpu(self) -> Vcpu:
        if self._vcpu is None:
            raise MachineError("this machine has no vCPU")
        return self._vcpu

    # ---- dirty log -------------------------------------------------------------------------------

    def sync_dirty_log(self, target: Cache | Sender) -> None:
        self._taking()
        if self._log is not None:
            target.sync_dirty_log(self._log)

    def discard_dirty_log(self) -> None:
        self._taking()
        if self._log is not None:
            self._log.discard()

    # ---- registers -------------------------------------------------------------------------------

    def _save_registers(self) -> bytes:
        return self._running_vcpu().all_registers()

    def _check_registers(self, registers: bytes) -> None:
        """Only what this guest can be: at its own code, on its own page tables, at level 3, nothing to be injected."""
        regs, sregs = split_registers(registers)
        code = self.layout.code_addr
        mine = (
            (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (CR0, PML4_PAGE * PAGE, CR4, EFER)
            and (sregs.cs.dpl, sregs.cs.l, sregs.ss.dpl) == (3, 1, 3)
            and not any(sregs.interrupt_bitmap)
            and code <= regs.rip < code + CODE_PAGES * PAGE
            and MAILBOX_ADDR < regs.rsp <= MAILBOX_ADDR + MAILBOX_BYTES
            and (regs.rflags | RFLAGS) & ~RFLAGS_CHANGE == RFLAGS
        )
        if not mine:
            raise DeviceStateError(
                f"the registers in the device state are not of this guest: rip {regs.rip:#x}, rsp {regs.rsp:#x}, "
                f"rflags {regs.rflags:#x}, cr0 {sregs.cr0:#x}, cr3 {sregs.cr3:#x}, cr4 {sregs.cr4:#x}"
            )

    def _load_registers(self, registers: bytes) -> None:
        regs, sregs = split_registers(registers)
        vcpu = self._running_vcpu()
        regs.rflags |= RFLAGS  # a KVM without hardware underneath reports IOPL 0, whatever was set
        try:
            vcpu.set_sregs(sregs)
            vcpu.set_regs(regs)
        except OSError as error:
            raise MachineError(f"KVM does not take the registers: {reason_of(error)}") from error

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._vcpu is not None:
            self._vcpu.close()
        if self._kvm is not None:
            self._kvm.close()


def split_registers(registers: bytes) -> tuple[Regs, Sregs]:
    """The two structs in the bytes of _save_registers; DeviceStateError if the length is another."""
    n_regs = len(bytes(Regs()))
    if len(registers) != n_regs + len(bytes(Sregs())):
        raise DeviceStateError(f"the device state has {len(registers)} bytes of registers, not those of an x86-64 vCPU")
    return Regs.from_buffer_copy(registers), Sregs.from_buffer_copy(registers, n_regs)
