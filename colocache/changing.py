# SPDX-License-Identifier: Apache-2.0
"""The blocks of a cache, which come and go while epochs do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from colocache._arguments import u64
from colocache._creation import images_array
from colocache._handle import Handle
from colocache._native import check, ffi, lib, struct
from colocache.block import Block, Blocks, Writers
from colocache.errors import BlockError
from colocache.spec import Images


class ChangingBlocks:
    """What a cache is to its blocks."""

    blocks: Blocks

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._writers = Writers(self.mark_dirty)
        self.blocks = Blocks(list(self._find_blocks()))

    def _find_blocks(self) -> Iterator[Block]:
        status = struct("colocache_status")
        with self._handle as cc:
            check(lib.colocache_get_status(cc, status))
        for index in range(status.n_blocks):
            with suppress(BlockError):  # it was removed; its index is nobody's
                yield Block(self._handle, index, self._writers)

    def _block(self, block: Block | str | int) -> int:
        return block.index if isinstance(block, Block) else self.blocks[block].index

    def mark_dirty(self, block: Block | str | int, first_pfn: int, n_pages: int = 1) -> None:
        """Pages that user space on the SVM's side wrote, after the write. Any thread. RangeError."""
        index, first, count = self._block(block), u64(first_pfn, "first page"), u64(n_pages, "number of pages")
        with self._handle as cc:
            check(lib.colocache_mark_dirty(cc, index, first, count))

    def give_back(self, block: Block | str | int, first_pfn: int, n_pages: int = 1) -> None:
        """Pages that the SVM gives back to the host (balloon, free page reporting). Any thread.

        They are zeros and take no memory in guest RAM; they count as written, and the cache keeps its own.
        UnsupportedError: the block is not sparse, on huge pages or in bounded memory. SealedError: between a seal and
        `loaded`. OrderError: no VM runs yet. RangeError.
        """
        index, first, count = self._block(block), u64(first_pfn, "first page"), u64(n_pages, "number of pages")
        with self._handle as cc:
            check(lib.colocache_give_back(cc, index, first, count))

    def add_block(self, images: Images) -> Block:
        """One more RAM block, with images that memory.add_block (or add_images) made; at any time but seal to loaded.

        It is in the next epoch that is sealed, and all of it counts as written by the SVM; after a death before that
        seal it is all zero bytes. The primary adds it too, in the same order. SealedError, BlockError, NoMemoryError.
        """
        array, _names = images_array([images])
        index = ffi.new("uint32_t *")
        with self._handle as cc:
            check(lib.colocache_add_block(cc, array, index))
        return self.blocks._add(Block(self._handle, int(index[0]), self._writers))

    def remove_block(self, block: Block | str | int) -> None:
        """The next epoch that is sealed is without this block; until then it stays, also through an abort.

        `loaded` of that epoch unmaps it: take it out of the machine before, then memory.remove_block. BufferError while
        views of it are alive; there are no new ones. A death before that seal forgets it: remove it again. SealedError.
        """
        one = self.blocks[self._block(block)]
        before, one.leaving = one.leaving, True  # first: no other thread makes a view from here on
        try:
            self._handle.check_no_views({f"{of} of {one.name}" for of in ("guest RAM", "cache", "arriving pages")})
            with self._handle as cc:
                check(lib.colocache_remove_block(cc, one.index))
        except BaseException:
            one.leaving = before
            raise

    def block_sealed(self, block: Block | str | int) -> bool:
        """The newest sealed epoch has this block; else it came later: a machine that restarts does not know it."""
        index = self._block(block)
        with self._handle as cc:
            return check(lib.colocache_block_sealed(cc, index)) == 1
