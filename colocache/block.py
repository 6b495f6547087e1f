# SPDX-License-Identifier: Apache-2.0
"""A RAM block of a cache: its two images as numpy views without a copy, and its three bitmaps."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from colocache import bitmap
from colocache._arguments import u64
from colocache._handle import Handle
from colocache._native import check, ffi, lib
from colocache.errors import BlockError, RangeError
from colocache.results import BlockInfo

Pages = npt.NDArray[np.uint8]
MarkDirty = Callable[[int, int, int], None]  # index of a block, first page, number of pages


class Writers:
    """The writable views of guest RAM that are open: no dirty log sees what is written through them."""

    def __init__(self, mark_dirty: MarkDirty) -> None:
        self._mark_dirty = mark_dirty
        self._open: dict[int, tuple[int, int, int, weakref.ref[Any]]] = {}
        self._numbers = itertools.count()

    @contextmanager
    def writing(self, block: int, first_pfn: int, n_pages: int, memory: memoryview) -> Iterator[None]:
        """A view's range: marked now, by each mark_all until its memory is let go, and when it is given back."""
        self._mark_dirty(block, first_pfn, n_pages)
        self._open[next(self._numbers)] = (block, first_pfn, n_pages, weakref.ref(memory.obj))
        try:
            yield
        finally:
            self._mark_dirty(block, first_pfn, n_pages)

    def mark_all(self) -> None:
        """Mark what open views may have written; one that is gone is marked a last time."""
        for key, (block, first_pfn, n_pages, alive) in list(self._open.items()):
            gone = alive() is None
            self._mark_dirty(block, first_pfn, n_pages)
            if gone:
                self._open.pop(key, None)


class Block:
    """A RAM block. Views are (n_pages, page_size) uint8; each one that is alive keeps its memory mapped."""

    name: str
    index: int
    n_pages: int
    page_size: int
    len_bytes: int
    guest_addr: int  # where guest RAM is mapped in this process
    cache_addr: int  # where the cache image is
    leaving: bool  # removed: the next epoch that is sealed is without it, and there are no more views

    def __init__(self, handle: Handle, index: int, writers: Writers) -> None:
        """Not for users: see Cache.blocks."""
        self._handle = handle
        self._writers = writers
        self.index = index
        self.leaving = False
        info = self._info()
        facts = BlockInfo.of(info, index)
        self.name, self.n_pages = facts.name, facts.n_pages
        self.page_size, self.len_bytes = facts.page_size, facts.len_bytes
        self._guest, self._cached = info.guest_addr, info.cache_addr
        self.guest_addr = int(ffi.cast("uintptr_t", info.guest_addr))
        self.cache_addr = int(ffi.cast("uintptr_t", info.cache_addr))

    def _info(self) -> Any:
        info = ffi.new("struct colocache_block_info *")
        with self._handle as cc:
            check(lib.colocache_get_block(cc, self.index, info))
        return info

    def info(self) -> BlockInfo:
        """Counts of the bits that are set now."""
        return BlockInfo.of(self._info(), self.index)

    def _view(self, base: Any, first_pfn: int, n_pages: int, image: str) -> memoryview:
        if self.leaving:
            raise BlockError(f"block {self.name} was removed: its memory is let go when the next epoch is loaded")
        with self._handle:  # ClosedError before the memory of a closed one is looked at
            start = ffi.cast("char *", base) + first_pfn * self.page_size
            return self._handle.memory(start, n_pages * self.page_size, f"{image} of {self.name}")

    def _pages(self, memory: memoryview) -> Pages:
        return np.frombuffer(memory, np.uint8).reshape(-1, self.page_size)

    @property
    def guest(self) -> Pages:
        """Guest RAM, read-only: what the SVM runs on."""
        return self._pages(self._view(self._guest, 0, self.n_pages, "guest RAM").toreadonly())

    @property
    def cache(self) -> Pages:
        """The cache image, read-only: where arriving pages are."""
        return self._pages(self._view(self._cached, 0, self.n_pages, "cache").toreadonly())

    @contextmanager
    def writable(self, first_pfn: int = 0, n_pages: int | None = None) -> Iterator[Pages]:
        """A writable view of guest RAM from first_pfn on, (n_pages, page_size).

        For device emulation. Its pages count as written by the SVM when it is taken, at every sync and seal while it or
        a view of it is alive, and when it is given back. Nobody writes between sync and loaded. RangeError.
        """
        first, count = self.span(first_pfn, n_pages)
        if count == 0:
            raise RangeError(f"a writable view of block {self.name} needs at least one page")
        memory = self._view(self._guest, first, count, "guest RAM")
        with self._writers.writing(self.index, first, count, memory):
            yield self._pages(memory)

    def span(self, first_pfn: int, n_pages: int | None) -> tuple[int, int]:
        """The range as two checked numbers, to the end if n_pages is None. RangeError."""
        first = u64(first_pfn, "first page")
        count = max(0, self.n_pages - first) if n_pages is None else u64(n_pages, "number of pages")
        if first > self.n_pages or count > self.n_pages - first:
            raise RangeError(f"pages {first} to {first + count} of block {self.name}: it has {self.n_pages} pages")
        return first, count

    def _bitmap(self, kind: int) -> bitmap.Words:
        words = np.zeros(bitmap.n_words(self.n_pages), np.uint64)
        with self._handle as cc:
            check(lib.colocache_get_bitmap(cc, self.index, kind, ffi.from_buffer("uint64_t[]", words), words.size))
        return words

    @property
    def pvm_bitmap(self) -> bitmap.Words:
        """Pages received since the last seal; a copy."""
        return self._bitmap(lib.COLOCACHE_BITMAP_PVM)

    @property
    def svm_bitmap(self) -> bitmap.Words:
        """Pages that the SVM wrote since the last seal, as far as its log was synced; a copy."""
        return self._bitmap(lib.COLOCACHE_BITMAP_SVM)

    @property
    def flush_set(self) -> bitmap.Words:
        """Pages of the newest sealed epoch that the flush copies; a copy."""
        return self._bitmap(lib.COLOCACHE_BITMAP_FLUSH_SET)

    def __repr__(self) -> str:
        return f"<Block {self.index} {self.name}: {self.n_pages} pages of {self.page_size}>"


class Blocks(Mapping[str, Block]):
    """The blocks of a cache in the order in which they were added, by name or by index."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._set({block.index: block for block in blocks})

    def _set(self, blocks: dict[int, Block]) -> None:
        """Whoever is in the middle of a look has the blocks that there were."""
        self._blocks, self._by_name = blocks, {block.name: block for block in blocks.values()}

    def _add(self, block: Block) -> Block:
        self._set({**self._blocks, block.index: block})
        return block

    def _sealed(self) -> None:
        """Those that were leaving are gone."""
        if any(block.leaving for block in self._blocks.values()):
            self._set({index: block for index, block in self._blocks.items() if not block.leaving})

    def __getitem__(self, key: str | int) -> Block:
        try:
            if isinstance(key, str):
                return self._by_name[key]
            return self._blocks[u64(key, "block")]
        except LookupError as error:
            names = ", ".join(f"{block.index} {block.name}" for block in self._blocks.values())
            raise BlockError(f"there is no block {key!r}; there are {names}") from error

    def __contains__(self, key: object) -> bool:
        return key in self._by_name or key in self._blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._blocks)
