# SPDX-License-Identifier: Apache-2.0
"""Dirty logs that the kernel keeps: KVM's, and that of 4 KiB mappings of this process or of another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from colocache._arguments import HasFileno, fd_of, u64
from colocache._handle import Handle
from colocache._native import check, ffi, lib
from colocache.errors import ArgumentError


@dataclass(frozen=True)
class KvmSlot:
    """A KVM memory slot that holds `n_pages` of a block from `first_pfn` on; slots may begin at any page."""

    slot: int
    block: int
    first_pfn: int
    n_pages: int


@dataclass(frozen=True)
class KvmRing:
    """The dirty ring of one vCPU: its descriptor, from which it is mapped, or the address where it already is."""

    vcpu_fd: int = -1
    addr: int = 0


@dataclass(frozen=True)
class UffdRange:
    """Memory at `addr` of the process that writes it, which holds `n_pages` of a block from `first_pfn` on."""

    block: int
    first_pfn: int
    n_pages: int
    addr: int


class DirtyLog:
    """A source for Cache.sync_dirty_log and Sender.sync_dirty_log. Context manager; a second close is fine."""

    def __init__(self, handle: Handle) -> None:
        """Not for users: see KvmDirtyLog and UffdDirtyLog."""
        self._handle = handle

    def discard(self) -> None:
        """Get, clear and throw away: before the VM first runs."""
        with self._handle as source:
            check(lib.colocache_source_discard(source))

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> DirtyLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.leave()


class _SlotsThatChange(DirtyLog):
    """A log of KVM slots."""

    @contextlib.contextmanager
    def changing(self, slots: Sequence[KvmSlot]) -> Iterator[None]:
        """`with log.changing(new_slots):` change the VM's slots inside, vCPUs standing; nothing logged is lost.

        The new slots are probed at the end, as when the log was made. If that fails, or the block raises, the change
        is still under way (sync raises OrderError): call `changed` with the slots that there are.
        """
        with self._handle as source:
            check(lib.colocache_source_change_begin(source))
        yield
        self.changed(slots)

    def changed(self, slots: Sequence[KvmSlot]) -> None:
        """End a change with the slots that there are now."""
        with self._handle as source:
            check(lib.colocache_source_change_end(source, _slots(slots), len(slots)))


class KvmDirtyLog(_SlotsThatChange):
    """KVM's log of a VM whose slots have KVM_MEM_LOG_DIRTY_PAGES and 4096-byte pages.

    Each slot is probed: ArgumentError (no VM, no such slot, no log), LengthError, UnsupportedError (rings). The
    descriptor stays the caller's. `manual_protect` is not looked at any more: the log is got and cleared either way.
    """

    def __init__(self, vm_fd: int | HasFileno, slots: Sequence[KvmSlot], manual_protect: bool = False) -> None:
        array = _slots(slots)
        out = ffi.new("struct colocache_source **")
        check(lib.colocache_source_kvm(fd_of(vm_fd), array, len(slots), int(manual_protect), out))
        super().__init__(_source_handle("KVM dirty log", out[0]))


class KvmDirtyRing(_SlotsThatChange):
    """KVM's dirty rings, one per vCPU, of `ring_bytes` each, as KVM_CAP_DIRTY_LOG_RING was given before the vCPUs.

    It is the only reader of the rings, from before the first vCPU runs. A vCPU that comes out with a full ring may have
    this log synced in its own thread at any time, besides the sync with all vCPUs stopped before each seal.
    """

    def __init__(
        self, vm_fd: int | HasFileno, slots: Sequence[KvmSlot], rings: Sequence[KvmRing], ring_bytes: int
    ) -> None:
        if not 0 <= ring_bytes < 1 << 32:
            raise ArgumentError(f"a dirty ring of {ring_bytes} bytes")
        array = ffi.new("struct colocache_kvm_ring[]", len(rings))
        for c, ring in zip(array, rings, strict=True):
            c.vcpu_fd, c.addr = ring.vcpu_fd, ffi.cast("void *", u64(ring.addr, "address"))
        out = ffi.new("struct colocache_source **")
        count = len(slots)
        check(lib.colocache_source_kvm_ring(fd_of(vm_fd), _slots(slots), count, array, len(rings), ring_bytes, out))
        super().__init__(_source_handle("KVM dirty rings", out[0]))


class UffdDirtyLog(DirtyLog):
    """The kernel's log of what this process writes to its own mappings (userfaultfd write-protect, PAGEMAP_SCAN).

    For a machine that lives in this process, without KVM or beside it: `ranges` say where guest RAM is mapped, for
    example UffdRange(block.index, 0, block.n_pages, block.guest_addr). The mappings stay until it is closed; one that
    is unmapped earlier raises LogLostError at the next sync. Every write through these addresses is seen, also the
    kernel's and KVM's; writes through another mapping are not. It begins to log when it is made: discard() just before
    the machine first runs. Needs no privilege, and Linux 6.7: UnsupportedError before, and for a range that is not
    mapped. On hugetlb it sees 2 MiB at a time.
    """

    def __init__(self, ranges: Sequence[UffdRange]) -> None:
        array = _ranges(ranges)
        out = ffi.new("struct colocache_source **")
        check(lib.colocache_source_uffd(array, len(ranges), out))
        super().__init__(_source_handle("dirty log of this process", out[0]))


class ProcessDirtyLog(DirtyLog):
    """The same log of another process's memory.

    uffd      a userfaultfd that that process made and handed over; nothing was done with it yet
    pagemap   its /proc/PID/pagemap
    kvm_maps_it  whether a KVM of it has this memory on 4 KiB pages: then what was not written stays mapped there

    Both descriptors stay the caller's. Once that process has ended, a sync raises LogLostError.
    """

    def __init__(
        self, uffd: int | HasFileno, pagemap: int | HasFileno, ranges: Sequence[UffdRange], *, kvm_maps_it: bool
    ) -> None:
        array = _ranges(ranges)
        out = ffi.new("struct colocache_source **")
        fds = fd_of(uffd), fd_of(pagemap)
        check(lib.colocache_source_uffd_process(*fds, int(kvm_maps_it), array, len(ranges), out))
        super().__init__(_source_handle("dirty log of another process", out[0]))


def _ranges(ranges: Sequence[UffdRange]) -> Any:
    array = ffi.new("struct colocache_uffd_range[]", len(ranges))
    for c, one in zip(array, ranges, strict=True):
        c.block, c.addr = u64(one.block, "block"), ffi.cast("void *", u64(one.addr, "address"))
        c.first_pfn, c.n_pages = u64(one.first_pfn, "first page"), u64(one.n_pages, "number of pages")
    return array


def _slots(slots: Sequence[KvmSlot]) -> Any:
    array = ffi.new("struct colocache_kvm_slot[]", len(slots))
    for c, slot in zip(array, slots, strict=True):
        c.slot, c.block = u64(slot.slot, "slot"), u64(slot.block, "block")
        c.first_pfn, c.n_pages = u64(slot.first_pfn, "first page"), u64(slot.n_pages, "number of pages")
    return array


def _source_handle(what: str, source: Any) -> Handle:
    return Handle(what, source, lib.colocache_source_close)
