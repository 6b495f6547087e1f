# SPDX-License-Identifier: Apache-2.0
"""The primary's half: what must still be sent, what is not acknowledged, and the header of a message on the wire."""

from __future__ import annotations

from types import TracebackType

import numpy.typing as npt

from colocache._arguments import HasFileno, fd_of, milliseconds, u64, words_of
from colocache._handle import Handle
from colocache._native import check, ffi, lib, struct
from colocache.dirty_log import DirtyLog
from colocache.errors import ArgumentError, BlockError, LengthError
from colocache.results import Header, PageRun, SendResult
from colocache.spec import BlockSpec

HEADER_BYTES: int = lib.COLOCACHE_HEADER_BYTES
MSG_PAGES: int = lib.COLOCACHE_MSG_PAGES
WIRE_VERSION: int = lib.COLOCACHE_WIRE_VERSION


class Sender:
    """Knows a primary's RAM blocks at their addresses, and per block the pages pending and unacknowledged.

    Several threads may send on several sockets, and any thread mark_dirty; the rest is for one thread at a time.
    Context manager; a second close is fine.
    """

    def __init__(self) -> None:
        out = ffi.new("struct colocache_sender **")
        check(lib.colocache_sender_create(out))
        self._handle = Handle("sender", out[0], lib.colocache_sender_close)
        self._blocks: list[BlockSpec | None] = []

    def add_block(self, name: str, addr: int, len_bytes: int, page_size: int = 4096) -> int:
        """Add guest RAM that is mapped at addr and stays so until close; returns the index of the block.

        Once pages were sent, all of a new block is pending: the secondary has nothing of it.
        """
        index = ffi.new("uint32_t *")
        where = ffi.cast("void *", u64(addr, "address"))
        encoded = ffi.new("char[]", name.encode())
        size = u64(page_size, "page size")
        if size >= 1 << 32:
            raise LengthError(f"page size of block {name} is {size}")
        with self._handle as sender:
            check(
                lib.colocache_sender_add_block(sender, encoded, where, u64(len_bytes, "length in bytes"), size, index)
            )
        self._blocks.append(BlockSpec(name, len_bytes, page_size))
        return int(index[0])

    @property
    def blocks(self) -> tuple[BlockSpec | None, ...]:
        """The blocks by their index; None for one that was removed."""
        return tuple(self._blocks)

    def remove_block(self, block: int) -> None:
        """Nothing of it is sent or counted from now on. Its memory may go when sends in other threads are over."""
        with self._handle as sender:
            check(lib.colocache_sender_remove_block(sender, _index(block)))
        self._blocks[block] = None

    def sync_dirty_log(self, source: DirtyLog) -> None:
        """Take a log into pending and unacknowledged; it is cleared before any page of it is read. LogLostError."""
        with self._handle as sender, source._handle as log:
            check(lib.colocache_sender_sync_dirty_log(sender, log))

    def sync_words(self, block: int, words: npt.ArrayLike, first_pfn: int = 0, n_pages: int | None = None) -> None:
        """OR words of any log: bit 0 of words[0] is page first_pfn; the log must be cleared already."""
        first = u64(first_pfn, "first page")
        count = self._rest(block, first) if n_pages is None else u64(n_pages, "number of pages")
        _array, pointer = words_of(words, count)
        with self._handle as sender:
            check(lib.colocache_sender_sync_words(sender, _index(block), first, count, pointer))

    def _rest(self, block: int, first_pfn: int) -> int:
        spec = self._blocks[block] if 0 <= block < len(self._blocks) else None
        if spec is None:
            raise BlockError(f"there is no block {block}; the sender had {len(self._blocks)}")
        return max(0, spec.n_pages - first_pfn)

    def mark_dirty(self, block: int, first_pfn: int, n_pages: int = 1) -> None:
        """Pages written by user space, after the write. Any thread."""
        first, count = u64(first_pfn, "first page"), u64(n_pages, "number of pages")
        with self._handle as sender:
            check(lib.colocache_sender_mark_dirty(sender, _index(block), first, count))

    def mark_all(self) -> None:
        """All of RAM is pending and unacknowledged: the initial copy, or a log that was lost."""
        with self._handle as sender:
            check(lib.colocache_sender_mark_all(sender))

    def send(
        self,
        fd: int | HasFileno,
        *,
        epoch: int,
        timeout: float | None,
        stripe: int = 0,
        n_stripes: int = 1,
        max_pages: int = 0,
    ) -> SendResult:
        """Send pending pages of this stripe on a stream socket, at most max_pages (0 = all), gathered from guest RAM.

        `timeout`: longest wait in seconds without a byte moving. PeerLostError, TimedOutError: what did not go out
        whole is pending as before; reconnect, then `resend`.
        """
        result = struct("colocache_send_result")
        number, wait = u64(epoch, "epoch"), milliseconds(timeout)
        part, parts = _index(stripe), _index(n_stripes)
        limit = u64(max_pages, "number of pages")
        with self._handle as sender:
            check(lib.colocache_sender_send(sender, fd_of(fd), wait, number, part, parts, limit, result))
        return SendResult.of(result)

    def pack(
        self,
        room: bytearray | memoryview,
        *,
        epoch: int,
        stripe: int = 0,
        n_stripes: int = 1,
        max_pages: int = 0,
    ) -> SendResult:
        """The same into `room`, for a transport that is no socket: as many packets as it holds, `n_bytes` in all.

        No bytes: nothing is pending. What was packed counts as sent; `resend` if it was lost. LengthError: too small.
        """
        result = struct("colocache_send_result")
        number, limit = u64(epoch, "epoch"), u64(max_pages, "number of pages")
        part, parts = _index(stripe), _index(n_stripes)
        with ffi.from_buffer("unsigned char[]", room, require_writable=True) as memory, self._handle as sender:
            check(lib.colocache_sender_pack(sender, memory, len(memory), number, part, parts, limit, result))
        return SendResult.of(result)

    def take(
        self, *, stripe: int = 0, n_stripes: int = 1, max_pages: int = 0, max_runs: int = 1024
    ) -> tuple[PageRun, ...]:
        """Take pending pages of this stripe, for a transport of your own: runs in ascending order; empty, none is left.

        Read their bytes after this, send a stripe's runs in their order; `mark_dirty` those that were not delivered.
        """
        part, parts, limit = _index(stripe), _index(n_stripes), u64(max_pages, "number of pages")
        if not 1 <= max_runs <= 1 << 20:
            raise ArgumentError(f"at most {max_runs} runs were asked for: take 1 to {1 << 20} at once")
        runs, n_runs = ffi.new("struct colocache_run[]", max_runs), ffi.new("uint32_t *")
        with self._handle as sender:
            check(lib.colocache_sender_next(sender, part, parts, limit, runs, max_runs, n_runs))
        return tuple(PageRun.of(runs[i]) for i in range(n_runs[0]))

    def received(self) -> None:
        """RECEIVED came, or the peer said at reconnection that it sealed: nothing is unacknowledged."""
        with self._handle as sender:
            check(lib.colocache_sender_received(sender))

    def resend(self) -> None:
        """After an abort or a reconnection: everything unacknowledged is pending again."""
        with self._handle as sender:
            check(lib.colocache_sender_resend(sender))

    def count(self) -> tuple[int, int]:
        """Pages (pending, unacknowledged)."""
        pending, unacked = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        with self._handle as sender:
            check(lib.colocache_sender_count(sender, pending, unacked))
        return int(pending[0]), int(unacked[0])

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.leave()


def _index(number: int) -> int:
    value = u64(number, "number of a block or stripe")
    if value >= 1 << 32:
        raise ArgumentError(f"number of a block or stripe is {value}")
    return value


def message_header(type: int, epoch: int, body_len: int, a: int = 0, b: int = 0) -> bytes:  # noqa: A002 the wire's word
    """The 40 header bytes of a message without pages, with their checksum. ArgumentError."""
    words = [u64(value, what) for value, what in ((type, "message type"), (a, "word a"), (b, "word b"))]
    if max(words) >= 1 << 32:
        raise ArgumentError(f"message type and words have 32 bits, these are {words}")
    header = ffi.new("unsigned char[]", HEADER_BYTES)
    length = u64(body_len, "length of the body")
    check(lib.colocache_message_header(header, words[0], u64(epoch, "epoch"), length, words[1], words[2]))
    return bytes(ffi.buffer(header))


def parse_header(header: bytes | bytearray | memoryview) -> Header:
    """Take 40 header bytes apart. LengthError, PacketError (checksum, magic or version)."""
    if len(header) != HEADER_BYTES:
        raise LengthError(f"a message header has {HEADER_BYTES} bytes, this one {len(header)}")
    kind, epoch, length = ffi.new("uint32_t *"), ffi.new("uint64_t *"), ffi.new("uint64_t *")
    a, b = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    with ffi.from_buffer(header) as source:
        check(lib.colocache_message_parse(source, kind, epoch, length, a, b))
    return Header(kind[0], epoch[0], length[0], a[0], b[0])
