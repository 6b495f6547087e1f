# SPDX-License-Identifier: Apache-2.0
"""The cache of a secondary, in Python words. The order of the calls, and the promise, are colocache.h's."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from colocache._arguments import Buffer, HasFileno, bytes_of, fd_of, milliseconds, put_attachment, u64, words_of
from colocache._callbacks import Asked, Check, LogSink
from colocache._creation import check_attached, check_owned, images_array, images_of_region, lock_descriptor, options_of
from colocache._handle import Handle
from colocache._native import check, error_from, ffi, lib, struct
from colocache.block import Block
from colocache.changing import ChangingBlocks
from colocache.dirty_log import DirtyLog
from colocache.errors import ArgumentError, BlockError, TimedOutError
from colocache.memory import Memory
from colocache.private import private_bytes
from colocache.results import Attachment, Failover, FlushResult, Recovery, SealResult, Stats, Status


class Cache(ChangingBlocks):
    """A secondary: its blocks with their two images each, its bitmaps and its commit record. Context manager.

    Any thread may receive, mark_dirty, ask failover or status and abort; the rest is for one thread at a time.
    """

    recovery: Recovery | None  # what attach found; None after create

    def __init__(self, handle: Handle, keep: list[Any], recovery: Recovery | None) -> None:
        """Not for users: see create and attach."""
        super().__init__(handle)
        self._keep = keep  # what C refers to as long as the handle lives
        self.recovery = recovery

    # ---- create, attach, close ----

    @classmethod
    def create(
        cls,
        memory: Memory,
        *,
        threads: int = 0,
        copy: str = "auto",
        device_state_max: int = 64 << 20,
        log: LogSink | None = None,
    ) -> Cache:
        """A new secondary in fresh memory, all of whose blocks are added. The memory stays the caller's to close.

        `threads` of the flush, 0 = as many as cores; `copy` auto, libc, avx2, avx512 or neon; `device_state_max` bytes.
        BusyError, ExistsError, NoMemoryError, UnsupportedError.
        """
        memory.check_open()
        options, keep = options_of(memory, threads, copy, device_state_max, log)
        out = ffi.new("struct colocache **")
        with lock_descriptor(memory, options):
            check_owned(lib.colocache_create(memory.control_fd, options, out), memory.control_fd)
        handle = Handle("cache", out[0], lib.colocache_close, lib.colocache_let_go)
        try:
            images, _names = images_array(memory.images)
            with handle as cc:
                for index in range(len(memory.images)):
                    check(lib.colocache_add_block(cc, images + index, ffi.NULL))
            return cls(handle, keep, None)
        except BaseException:
            handle.close()
            raise

    @classmethod
    def attach(cls, memory: Memory, *, threads: int = 0, copy: str = "auto", log: LogSink | None = None) -> Cache:
        """Take over the secondary of a process that died: what was sealed is finished first; see `.recovery`.

        Images in `memory` of blocks that the region does not have are left alone; `.blocks` are the region's.
        BusyError, NotColocacheError, LayoutError, CorruptError, ForeignImageError, BlockError, FailedOverError.
        """
        memory.check_open()
        options, keep = options_of(memory, threads, copy, 0, log)
        given = images_of_region(memory)
        images, _names = images_array(given)
        report = ffi.new("struct colocache_recovery *")
        out = ffi.new("struct colocache **")
        with lock_descriptor(memory, options):
            code = lib.colocache_attach(memory.control_fd, options, images, len(given), report, out)
            check_attached(code, memory)
        handle = Handle("cache", out[0], lib.colocache_close, lib.colocache_let_go)
        try:
            return cls(handle, keep, Recovery.of(report))
        except BaseException:
            handle.close()
            raise

    def close(self) -> None:
        """Unmap and unlock; removes nothing. BufferError, which names them, while views are alive; twice is fine.

        Leaving a `with` unlocks at once and raises nothing: memory stays mapped for views that live: read only.
        """
        self._handle.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.leave()

    # ---- receive ----

    def receive(self, epoch: int, block: Block | str | int, pfn: int, data: Buffer) -> None:
        """One page of `epoch` into the cache image. EpochError, SealedError, BlockError, RangeError, LengthError."""
        index, number, page = self._block(block), u64(epoch, "epoch"), u64(pfn, "page")
        with bytes_of(data) as source, self._handle as cc:
            check(lib.colocache_receive_page(cc, number, index, page, source, len(source)))

    def receive_zero(self, epoch: int, block: Block | str | int, first_pfn: int, n_pages: int = 1) -> None:
        """Pages of `epoch` that are all zero bytes."""
        index, number = self._block(block), u64(epoch, "epoch")
        first, count = u64(first_pfn, "first page"), u64(n_pages, "number of pages")
        with self._handle as cc:
            check(lib.colocache_receive_zero(cc, number, index, first, count))

    def receive_pages(self, epoch: int, block: Block | str | int, pfns: npt.ArrayLike, data: Buffer) -> None:
        """Pages one after the other in `data`, for pfns[0], pfns[1], ...; none is taken if one is out of range."""
        given = np.asarray(pfns)
        if given.size and (given.dtype.kind not in "iu" or (given.dtype.kind == "i" and given.min() < 0)):
            raise ArgumentError(f"page numbers are integers from 0, these are {given.dtype} from {given.min()}")
        numbers = np.ascontiguousarray(given, np.uint64)
        pointer = ffi.from_buffer("uint64_t[]", numbers)
        index, number = self._block(block), u64(epoch, "epoch")
        with bytes_of(data) as source, self._handle as cc:
            check(lib.colocache_receive_pages(cc, number, index, pointer, numbers.size, source, len(source)))

    @contextmanager
    def receive_in_place(
        self, epoch: int, block: Block | str | int, first_pfn: int, n_pages: int = 1
    ) -> Iterator[npt.NDArray[np.uint8]]:
        """Where the bytes of these pages go, (n_pages, page_size), for a transport that writes memory itself.

        Leaving the `with` sets their bits and counts them; leaving it with an error abandons them: bits, but no count,
        so that the epoch can't be sealed. Seal and abort raise ReceivingError while one is open. Any thread, several at
        once. Write nothing through the view afterwards. Same errors as receive, NoMemoryError.
        """
        where = self.blocks[self._block(block)]
        if where.leaving:
            raise BlockError(f"block {where.name} was removed: what comes of it still, receive takes")
        addr = ffi.new("void **")
        number, first, count = u64(epoch, "epoch"), u64(first_pfn, "first page"), u64(n_pages, "number of pages")
        with self._handle as cc:
            check(lib.colocache_receive_begin(cc, number, where.index, first, count, addr))
            whole = 0
            try:
                memory = self._handle.memory(addr[0], count * where.page_size, f"arriving pages of {where.name}")
                yield np.frombuffer(memory, np.uint8).reshape(-1, where.page_size)
                whole = 1
            finally:
                check(lib.colocache_receive_done(cc, number, where.index, first, count, whole))

    def receive_stream(self, fd: int | HasFileno, *, timeout: float | None, epoch: int = 0) -> tuple[bytes, int]:
        """Take PAGES packets from a stream socket until another message comes; its 40 header bytes, and pages taken.

        `timeout`: longest wait in seconds without a byte. `epoch` 0 takes the packets' own. PacketError, EpochError,
        BlockError, RangeError, PeerLostError, TimedOutError; after an error `error.n_pages` says how many were taken.
        """
        socket, wait, number = fd_of(fd), milliseconds(timeout), u64(epoch, "epoch")
        # The first wait is Python's, so that Ctrl-C is heard while nothing comes.
        poll = select.poll()
        poll.register(socket, select.POLLIN | select.POLLRDHUP)
        if not poll.poll(None if wait < 0 else wait):
            raise TimedOutError(f"no message came for {wait / 1000:g} s")
        header = ffi.new("unsigned char[]", lib.COLOCACHE_HEADER_BYTES)
        n_pages = ffi.new("uint64_t *")
        with self._handle as cc:
            _check_received(lib.colocache_receive_stream(cc, socket, wait, number, header, n_pages), n_pages)
        return bytes(ffi.buffer(header)), int(n_pages[0])

    def receive_ready(
        self, fd: int | HasFileno, *, timeout: float, epoch: int = 0, max_pages: int = 0
    ) -> tuple[bytes | None, int]:
        """The same for an event loop: takes what is there and comes back; header None: no other message has come yet.

        Call it when `fd` is readable. `max_pages`: come back when as many were taken (0 = no limit). `timeout`: longest
        wait in seconds for each part of a packet that has begun. Same errors as receive_stream.
        """
        socket, wait, number, limit = fd_of(fd), milliseconds(timeout), u64(epoch, "epoch"), u64(max_pages, "pages")
        header = ffi.new("unsigned char[]", lib.COLOCACHE_HEADER_BYTES)
        n_pages = ffi.new("uint64_t *")
        with self._handle as cc:
            code = lib.colocache_receive_ready(cc, socket, wait, number, limit, header, n_pages)
            _check_received(code, n_pages)
        return None if code else bytes(ffi.buffer(header)), int(n_pages[0])

    def receive_packets(self, data: Buffer, *, epoch: int = 0) -> tuple[int, bytes | None, int]:
        """The same from bytes that came some other way: how many were taken from the front, header, and pages taken.

        Header None: what is left is no whole packet; call again with what comes after it. Same errors.
        """
        number = u64(epoch, "epoch")
        header = ffi.new("unsigned char[]", lib.COLOCACHE_HEADER_BYTES)
        used, n_pages = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        with bytes_of(data) as source, self._handle as cc:
            code = lib.colocache_receive_packets(cc, source, len(source), number, header, used, n_pages)
            _check_received(code, n_pages)
        return int(used[0]), None if code else bytes(ffi.buffer(header)), int(n_pages[0])

    def device_state_buffer(self, epoch: int, len_bytes: int) -> memoryview:
        """Room for the device state of `epoch`, to be filled before seal; the last call before seal counts.

        Drop it before close. TooLargeError, EpochError, SealedError, NoMemoryError.
        """
        addr = ffi.new("void **")
        number, length = u64(epoch, "epoch"), u64(len_bytes, "length in bytes")
        with self._handle as cc:
            check(lib.colocache_device_state_begin(cc, number, length, addr))
            return self._handle.memory(addr[0], length, f"device state of epoch {number}")

    def device_state(self) -> bytes:
        """The device state of the newest sealed epoch. NoStateError."""
        addr, length = ffi.new("const void **"), ffi.new("uint64_t *")
        with self._handle as cc:
            check(lib.colocache_device_state(cc, addr, length))
            return bytes(ffi.buffer(addr[0], length[0])) if length[0] else b""

    # ---- the SVM's dirty log ----

    def sync_dirty_log(self, source: DirtyLog) -> None:
        """Get, OR into the SVM bitmap, clear. vCPUs stopped. LogLostError: then dirty_log_lost."""
        self._writers.mark_all()
        with self._handle as cc, source._handle as log:
            check(lib.colocache_sync_dirty_log(cc, log))

    def sync_words(
        self, block: Block | str | int, words: npt.ArrayLike, first_pfn: int = 0, n_pages: int | None = None
    ) -> None:
        """OR u64 words of any log: bit 0 of words[0] is page first_pfn. The caller clears that log. TailError."""
        self._writers.mark_all()
        one = block if isinstance(block, Block) else self.blocks[block]
        first, count = one.span(first_pfn, n_pages)
        _array, pointer = words_of(words, count)
        with self._handle as cc:
            check(lib.colocache_sync_words(cc, one.index, first, count, pointer))

    def dirty_log_lost(self) -> None:
        """The log is unknown, because its owner died: every page counts as written by the SVM."""
        with self._handle as cc:
            check(lib.colocache_dirty_log_lost(cc))

    # ---- seal, flush, abort, failover ----

    def seal(
        self,
        epoch: int,
        *,
        n_pages: int | None = None,
        check: Check | None = None,
        attachment: Attachment = Attachment(),  # noqa: B008 -- it never changes
    ) -> SealResult:
        """The commit point. vCPUs stopped, log synced, pages and device state of `epoch` there.

        `n_pages`: how many the peer says it sent (IncompleteError); `check` sees the device state, read-only, and
        refuses it by raising: VetoError, with that exception as __cause__. An error aborts the epoch; nothing is lost.
        `attachment`: of what lies elsewhere; Status tells it as long as the epoch is the newest, also after an attach.
        EpochError, SealedError, FailedOverError (take over instead), NoMemoryError.
        """
        self._writers.mark_all()
        args, result = struct("colocache_seal_args"), struct("colocache_seal_result")
        args.epoch = u64(epoch, "epoch")
        args.n_pages = lib.COLOCACHE_ANY_COUNT if n_pages is None else u64(n_pages, "number of pages")
        put_attachment(args, attachment)
        asked = Asked(self._handle, check)
        context = ffi.new_handle(asked)  # must live as long as C may call
        if check is not None:  # else the pause does without a step through Python
            args.check, args.check_context = lib.colocache_py_check, context
        with self._handle as cc:
            code = lib.colocache_seal(cc, args, result)
            if code < 0:
                error = error_from(code)
                if asked.error is None:
                    raise error
                if not isinstance(asked.error, Exception):
                    raise asked.error  # Ctrl-C or exit, not an opinion of the check
                raise error from asked.error
        self.blocks._sealed()
        return SealResult.of(result)

    def flush(self) -> FlushResult:
        """Make guest RAM the sealed epoch and say so in the commit record. May be repeated. NotSealedError."""
        result = struct("colocache_flush_result")
        with self._handle as cc:
            check(lib.colocache_flush(cc, result))
        return FlushResult.of(result)

    def loaded(self, ok: bool = True) -> bool:
        """How the load of the device state went. True: failover was asked for meanwhile, take over now.

        ok False: this VM must never run; memory and device state stay for a fresh one that attaches.
        """
        with self._handle as cc:
            return check(lib.colocache_loaded(cc, int(ok))) == 1

    def free_staged(self) -> None:
        """Bounded: give back the memory of pages whose epoch is committed or given up. Any thread.

        Call it when the machine runs again; else the first page of the next epoch does it.
        """
        with self._handle as cc:
            check(lib.colocache_free_staged(cc))

    def limit_staged(self, n_bytes: int) -> None:
        """Bounded: the most memory that staged pages may take; 0 = no limit, as at the beginning. Any thread.

        A page that would pass it goes into the spill file, if the memory has one; else, or if its disk is full, it is
        refused by NoMemoryError, and the epoch is to be aborted. UnsupportedError: mirror.
        """
        limit = u64(n_bytes, "limit of staged pages")
        with self._handle as cc:
            check(lib.colocache_limit_staged(cc, limit))

    def private_bytes(self) -> int:
        """Bounded: memory that the VM's private pages take in this process, as the kernel counts it. Any thread."""
        return sum(private_bytes(0, block.guest_addr, block.len_bytes) for block in self.blocks.values())

    def fold(self, block: Block | str | int, first_pfn: int, n_pages: int) -> int:
        """Bounded, after a takeover: private pages of this range become the image's; how many bytes they were.

        The VM stands. Its mapping of the range is shared from then on. OrderError: nobody took over yet.
        """
        where, n_bytes = self.blocks[self._block(block)], ffi.new("uint64_t *")
        first, count = where.span(first_pfn, n_pages)
        with self._handle as cc:
            check(lib.colocache_fold(cc, where.index, first, count, n_bytes))
        return int(n_bytes[0])

    def preflush(self) -> int:
        """Before epoch 1 is sealed: copy what has come to guest RAM already; how many pages. OrderError later."""
        n_pages = ffi.new("uint64_t *")
        with self._handle as cc:
            check(lib.colocache_preflush(cc, n_pages))
        return int(n_pages[0])

    def abort(self, epoch: int, reason: str) -> bool:
        """Give up the open epoch; its number is not used again, bits and cache stay. EpochError, SealedError.

        True: failover was asked for at the same moment, take over now.
        """
        text = ffi.new("char[]", reason.replace("\0", " ").encode())
        number = u64(epoch, "epoch")
        with self._handle as cc:
            return check(lib.colocache_abort(cc, number, text)) == 1

    def failover(self) -> Failover:
        """May this machine take over? NoStateError, LoadFailedError. Any thread."""
        epoch = ffi.new("uint64_t *")
        with self._handle as cc:
            code = check(lib.colocache_failover(cc, epoch))
        return Failover(now=code == 0, epoch=int(epoch[0]))

    # ---- looking ----

    def status(self) -> Status:
        """A snapshot. Any thread."""
        out = struct("colocache_status")
        with self._handle as cc:
            check(lib.colocache_get_status(cc, out))
        return Status.of(out)

    def stats(self) -> Stats:
        """What this handle has done, and where the time of its newest checkpoint went. Any thread."""
        out = struct("colocache_stats")
        with self._handle as cc:
            check(lib.colocache_get_stats(cc, out))
        return Stats.of(out)

    def validate(self, compare_pages: bool = False) -> None:
        """Check every invariant; CorruptError or TailError names the first that is broken.

        `compare_pages`: also that pages in neither bitmap are the same in both images; only while the SVM is stopped,
        its log synced, and nothing is received.
        """
        with self._handle as cc:
            check(lib.colocache_validate(cc, int(compare_pages)))

    def __repr__(self) -> str:
        return "<Cache: closed>" if self._handle.closed else f"<Cache: {self.status()}>"


def _check_received(code: int, n_pages: Any) -> None:
    if code < 0:
        error = error_from(code)
        error.n_pages = n_pages[0]
        raise error
