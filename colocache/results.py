# SPDX-License-Identifier: Apache-2.0
"""What the engine answers: frozen dataclasses with a readable str. Times are nanoseconds, lengths bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from colocache._native import ffi, lib
from colocache.choices import COPIES, MEMORY_MODES


class Phase(IntEnum):
    """Where a secondary stands; names of enum colocache_phase."""

    EMPTY = 0
    LIVE = 1
    SEALING = 2
    LOAD_FAILED = 3
    FAILED_OVER = 4


class Action(IntEnum):
    """What attach did; names of enum colocache_action."""

    NOTHING = 0
    REPLAYED = 1
    RESTART = 2
    NO_RESTART = 3


COPY_NAMES: dict[str, int] = {name: getattr(lib, f"COLOCACHE_COPY_{name.upper()}") for name in COPIES}


def _text(field: Any) -> str:
    raw: bytes = ffi.string(field)
    return raw.decode("utf-8", "replace")


@dataclass(frozen=True)
class Recovery:
    """What attach found: guest RAM and device state are exactly `epoch` (0 = none)."""

    action: Action
    epoch: int
    receiving_epoch: int
    n_pages: int
    sentence: str

    @classmethod
    def of(cls, c: Any) -> Recovery:
        return cls(Action(c.action), c.epoch, c.receiving_epoch, c.n_pages, _text(c.sentence))

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class Attachment:
    """What of an epoch lies elsewhere, as its commit record carries it: words of whoever sealed it.

    slot: 0 or 1, which of two places; the other one is the next epoch's.
    """

    slot: int = 0
    n_bytes: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class Status:
    """A secondary at one moment. Counts of bits are of this moment from `inspect`, else 0."""

    history_id: bytes
    phase: Phase
    n_blocks: int
    sealed_epoch: int
    committed_epoch: int
    receiving_epoch: int
    received_pages: int
    pvm_pages: int
    svm_pages: int
    flush_pages: int
    device_state_bytes: int
    device_state_max_bytes: int
    control_bytes: int
    owner_pid: int
    failover_pending: bool
    n_threads: int
    copy: str
    open_epoch: int = 0
    memory_mode: str = "mirror"
    staged_bytes: int = 0  # bounded: memory that the caches take now; 0 from `inspect`
    attachment_slot: int = 0  # of the sealed epoch: see `attachment`
    attachment_bytes: int = 0
    attachment_checksum: int = 0
    spilled_bytes: int = 0  # bounded: of staged pages, in the spill file; `inspect`: of the epoch that is not committed

    @classmethod
    def of(cls, c: Any) -> Status:
        return cls(
            history_id=bytes(c.history_id),
            phase=Phase(c.phase),
            n_blocks=c.n_blocks,
            sealed_epoch=c.sealed_epoch,
            committed_epoch=c.committed_epoch,
            receiving_epoch=c.receiving_epoch,
            received_pages=c.received_pages,
            pvm_pages=c.pvm_pages,
            svm_pages=c.svm_pages,
            flush_pages=c.flush_pages,
            device_state_bytes=c.device_state_bytes,
            device_state_max_bytes=c.device_state_max_bytes,
            control_bytes=c.control_bytes,
            owner_pid=c.owner_pid,
            failover_pending=bool(c.failover_pending),
            n_threads=c.n_threads,
            copy={number: name for name, number in COPY_NAMES.items()}.get(c.copy_variant, "unknown"),
            open_epoch=c.open_epoch,
            memory_mode=MEMORY_MODES[c.memory_mode],
            staged_bytes=c.staged_bytes,
            attachment_slot=c.attachment_slot,
            attachment_bytes=c.attachment_bytes,
            attachment_checksum=c.attachment_checksum,
            spilled_bytes=c.spilled_bytes,
        )

    @property
    def attachment(self) -> Attachment:
        """What of the sealed epoch lies elsewhere."""
        return Attachment(self.attachment_slot, self.attachment_bytes, self.attachment_checksum)

    def __str__(self) -> str:
        return (
            f"{self.phase.name.lower()}: epoch {self.sealed_epoch} sealed, {self.committed_epoch} committed, "
            f"{self.receiving_epoch} receiving ({self.received_pages} pages), owner {self.owner_pid}"
            + (", bounded memory" if self.memory_mode == "bounded" else "")
            + (f", {self.attachment_bytes} bytes in disk log {self.attachment_slot}" if self.attachment_bytes else "")
            + (f", {self.spilled_bytes} bytes in the spill file" if self.spilled_bytes else "")
        )


@dataclass(frozen=True)
class Stats:
    """What a handle has done since it was made, and where the time of its newest checkpoint, `epoch`, went."""

    received_pages: int  # zero pages and repeats included
    sealed_epochs: int
    aborted_epochs: int
    flushed_pages: int
    flushed_bytes: int
    flush_total_ns: int
    epoch: int  # newest epoch sealed by this handle, 0 = none; the times below are its own
    sync_ns: int  # in sync_dirty_log since the seal before
    seal_ns: int
    flush_ns: int  # 0 = not flushed yet
    load_ns: int  # from the end of the flush to loaded: the load of the device state

    @classmethod
    def of(cls, c: Any) -> Stats:
        return cls(**{name: getattr(c, name) for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        return (
            f"{self.sealed_epochs} epochs sealed, {self.aborted_epochs} aborted, {self.received_pages} pages received, "
            f"{self.flushed_pages} flushed in {self.flush_total_ns / 1e6:.3f} ms; epoch {self.epoch}: "
            f"sync {self.sync_ns / 1e6:.3f}, seal {self.seal_ns / 1e6:.3f}, flush {self.flush_ns / 1e6:.3f}, "
            f"load {self.load_ns / 1e6:.3f} ms"
        )


@dataclass(frozen=True)
class BlockInfo:
    """A RAM block of a region that is looked at, with the bits set at that moment."""

    name: str
    index: int
    len_bytes: int
    page_size: int
    n_pages: int
    sparse: bool
    pvm_pages: int
    svm_pages: int
    flush_pages: int

    @classmethod
    def of(cls, c: Any, index: int) -> BlockInfo:
        return cls(
            name=_text(c.name),
            index=index,
            len_bytes=c.len_bytes,
            page_size=c.page_size,
            n_pages=c.n_pages,
            sparse=bool(c.sparse),
            pvm_pages=c.pvm_pages,
            svm_pages=c.svm_pages,
            flush_pages=c.flush_pages,
        )

    def __str__(self) -> str:
        return (
            f"{self.index} {self.name}: {self.n_pages} pages of {self.page_size}; "
            f"PVM {self.pvm_pages}, SVM {self.svm_pages}, flush set {self.flush_pages}"
        )


@dataclass(frozen=True)
class Inspection:
    """A control region as it was when looked at; nothing was locked or written."""

    status: Status
    blocks: tuple[BlockInfo, ...]

    def __str__(self) -> str:
        return "\n".join([str(self.status), *(f"  block {block}" for block in self.blocks)])


@dataclass(frozen=True)
class SealResult:
    """An epoch that is sealed, with the pages by who wrote them."""

    epoch: int
    pvm_pages: int  # the PVM only
    svm_pages: int  # the SVM only
    both_pages: int
    flush_pages: int  # the sum of the three
    check_ns: int
    union_ns: int
    commit_ns: int
    clear_ns: int

    @classmethod
    def of(cls, c: Any) -> SealResult:
        return cls(**{name: getattr(c, name) for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch} sealed: {self.flush_pages} pages to flush "
            f"(PVM {self.pvm_pages}, SVM {self.svm_pages}, both {self.both_pages})"
        )


@dataclass(frozen=True)
class FlushResult:
    """Guest RAM is `epoch`: what was copied, and how long it took."""

    epoch: int
    n_pages: int
    n_runs: int
    n_bytes: int
    copy_ns: int
    commit_ns: int
    n_threads: int
    forget_ns: int = 0  # bounded memory: dropping the VM's private pages
    spilled_pages: int = 0  # of n_pages, those that came from the spill file

    @classmethod
    def of(cls, c: Any) -> FlushResult:
        return cls(**{name: getattr(c, name) for name in cls.__dataclass_fields__})

    @property
    def gb_per_s(self) -> float:
        """Bytes copied per second of copying, in 1e9 bytes; 0 if nothing was copied."""
        return self.n_bytes / self.copy_ns if self.copy_ns else 0.0

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch} committed: {self.n_pages} pages in {self.n_runs} runs, "
            f"{self.copy_ns / 1e6:.3f} ms, {self.gb_per_s:.1f} GB/s"
        )


@dataclass(frozen=True)
class Failover:
    """The answer to failover: `now`, from the live state; else when loaded (or a failing seal) says so."""

    now: bool
    epoch: int

    def __str__(self) -> str:
        when = "now" if self.now else "as soon as the epoch under way is finished"
        return f"take over {when}; newest sealed epoch {self.epoch}"


@dataclass(frozen=True)
class SendResult:
    """Pages sent, zero pages (`n_zero`, as flags) included; bytes on the wire, headers included."""

    n_pages: int
    n_zero: int
    n_bytes: int
    n_packets: int

    @classmethod
    def of(cls, c: Any) -> SendResult:
        return cls(**{name: getattr(c, name) for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        return f"{self.n_pages} pages ({self.n_zero} zero) in {self.n_packets} packets, {self.n_bytes} bytes"


@dataclass(frozen=True)
class PageRun:
    """Pages taken to be sent: `n_pages` of block `block` from `first_pfn` on; `zero`: all of them are zero pages."""

    block: int
    first_pfn: int
    n_pages: int
    zero: bool

    @classmethod
    def of(cls, c: Any) -> PageRun:
        return cls(c.block, c.first_pfn, c.n_pages, bool(c.zero))


@dataclass(frozen=True)
class Header:
    """The 40 bytes before each message: type, epoch, length of the body in bytes, two words of the type's own."""

    type: int
    epoch: int
    body_len: int
    a: int
    b: int
