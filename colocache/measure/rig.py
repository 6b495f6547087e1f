# SPDX-License-Identifier: Apache-2.0
"""The memory that cells are measured on: a secondary with one block, and beside it the 4 KiB anonymous cache that QEMU
would have. A guest page is poisoned before each copy, so that what was copied, and what was not, can be told."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import numpy.typing as npt

from colocache import BlockSpec, Cache, Memory, SealResult
from colocache.errors import ColocacheError
from colocache.measure import baseline
from colocache.measure.baseline import Eviction, Pool
from colocache.measure.patterns import Pattern

PAGE = 4096
BLOCK = "pc.ram"
COLUMNS = (0, 257, 511)  # words of every page that are poisoned and looked at
SAMPLES = 48  # pages, dirty and clean, that are poisoned and looked at whole
FILL_PAGES = 4096

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]


class WrongResultError(ColocacheError):
    """What was timed did not do its work: a page that should have been copied was not, or one too many was."""


class Rig:
    """One size of guest RAM on one backing. Context manager; `with rig.threads(n):` around the measuring."""

    cache: Cache
    pool: Pool  # of the flush's threads
    single: Pool  # of one

    def __init__(
        self, ram_bytes: int, backing: str, touch_bytes: int, *, by_lines: bool = False, seed: int = 1
    ) -> None:
        """MemoryShortError, UnsupportedError. The images are filled and mapped once, outside any timed part.

        What is timed finds the CPU's caches cold because touch_bytes of other memory were touched; `by_lines`:
        because the images' own lines were pushed out, whatever size the caches have.
        """
        self.ram_bytes, self.backing, self.by_lines = ram_bytes, backing, by_lines
        self.n_pages = ram_bytes // PAGE
        self.rng = np.random.default_rng(seed)
        self._memory = Memory.create(blocks=[BlockSpec(BLOCK, self.n_pages * PAGE)], backing=backing)
        self._attached = False
        self._incoming: Bytes | None = None
        try:
            # QEMU's cache; it also plays the primary's RAM, whose pages are the cache's.
            self._anonymous = mmap.mmap(-1, self.n_pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):
                self._anonymous.madvise(mmap.MADV_NOHUGEPAGE)
            self.eviction = Eviction(touch_bytes)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.plain: Bytes = np.frombuffer(self._anonymous, np.uint8).reshape(self.n_pages, PAGE)
        self.plain_addr = int(self.plain.ctypes.data)
        for first in range(0, self.n_pages, FILL_PAGES):
            part = self.plain[first : first + FILL_PAGES].view(np.uint64)
            part[:] = self.rng.integers(1, 1 << 63, part.shape, np.uint64)

    # ---- handles ----

    @contextlib.contextmanager
    def threads(self, n_threads: int) -> Iterator[None]:
        """The secondary with a flush of n_threads, and a pool of as many for the peak."""
        make = Cache.attach if self._attached else Cache.create
        with (
            Pool(n_threads) as self.pool,
            Pool(1) as self.single,
            make(self._memory, threads=n_threads) as self.cache,
        ):
            try:
                self._open()
                yield
            finally:
                self._close()

    def cool(self) -> None:
        """Leave nothing of the images and bitmaps in a CPU cache."""
        if self.by_lines:
            self.cool_images()
            baseline.evict(self.plain_addr, self.ram_bytes)
        self.eviction.touch()

    def cool_images(self) -> None:
        """Push the lines of the secondary's two images out of the CPU's caches."""
        for addr in (self.guest_addr, self.cache_addr):
            baseline.evict(addr, self.ram_bytes)

    def _open(self) -> None:
        block = self.cache.blocks[BLOCK]
        self.cached: Bytes = block.cache
        self.guest_addr, self.cache_addr = block.guest_addr, int(self.cached.ctypes.data)
        # Not Block.writable: these bytes are poison, whose pages must not count as dirty.
        self.guest: Bytes = baseline.pages_at(self.guest_addr, self.n_pages)
        self.epoch = self.cache.status().sealed_epoch
        if not self._attached:
            for first in range(0, self.n_pages, FILL_PAGES):
                part = self.plain[first : first + FILL_PAGES]
                self.cache.receive_pages(self.epoch + 1, BLOCK, np.arange(first, first + len(part)), part)
            self.finish_epoch()
            self._attached = True
        self.note_cache()
        # Every page of both mappings is there before anything is timed.
        self.pool.sequential(self.guest_addr, self.cache_addr, self.ram_bytes, "libc")

    def _close(self) -> None:
        del self.guest, self.cached

    def finish_epoch(self) -> None:
        """Seal, flush and load what is open, outside any timed part."""
        self.seal()
        self.cache.flush()
        self.cache.loaded()

    def seal(self) -> SealResult:
        """Seal what is open, with an empty device state."""
        self.cache.device_state_buffer(self.epoch + 1, 0)
        sealed = self.cache.seal(self.epoch + 1)
        self.epoch += 1
        return sealed

    def settle(self) -> None:
        """After a wrong result: whatever is open is finished, and the plain memory is the cache's again."""
        self.finish_epoch()
        self.plain[:] = self.cached
        self.note_cache()

    def note_cache(self) -> None:
        """Remember the looked-at words of the cache image: they are what a copy must bring."""
        words = self.cached.view(np.uint64)
        self._expected = [words[:, column].copy() for column in COLUMNS]

    def note_plain(self) -> None:
        """Remember the plain memory's words instead: they are what a checkpoint must bring."""
        words = self.plain.view(np.uint64)
        self._expected = [words[:, column].copy() for column in COLUMNS]

    def change(self, pages: Bytes, which: npt.NDArray[np.intp]) -> None:
        """Give the looked-at words of these pages other values."""
        words = pages.view(np.uint64)
        stamp = self.rng.integers(1, 1 << 63, dtype=np.uint64)
        for column in COLUMNS:
            words[which, column] ^= stamp

    def incoming(self, n_pages: int) -> Bytes:
        """Pages to be received, with bytes that no page had before."""
        if self._incoming is None or len(self._incoming) < n_pages:
            self._incoming = self.rng.integers(0, 256, (n_pages, PAGE), np.uint8)
        part = self._incoming[:n_pages]
        self.change(part, np.arange(n_pages))
        return part

    # ---- a round ----

    def arm(self, pattern: Pattern, *, received: int = 64) -> None:
        """The pattern into the bitmaps: some pages are received (with the bytes they have), the rest the SVM wrote."""
        epoch = self.epoch + 1
        dirty = np.flatnonzero(pattern.bits)
        some = np.sort(self.rng.permutation(dirty)[:received])
        self.cache.receive_pages(epoch, BLOCK, some, np.ascontiguousarray(self.plain[some]))
        self.cache.sync_words(BLOCK, pattern.words)

    def poison(self, pattern: Pattern) -> None:
        """Spoil guest RAM: the looked-at words of every page, and some pages whole, differ from the cache's."""
        words = self.guest.view(np.uint64)
        for column, expected in zip(COLUMNS, self._expected, strict=True):
            words[:, column] = ~expected
        bits = pattern.bits
        pools = (np.flatnonzero(bits), np.flatnonzero(~bits))
        self._samples = [self.rng.choice(pool, min(SAMPLES, pool.size), replace=False) for pool in pools]
        plain = self.plain.view(np.uint64)
        for pages in self._samples:
            words[pages] = ~plain[pages]

    def check(self, pattern: Pattern, what: str) -> None:
        """Every dirty page is the cache's and no other was touched. WrongResultError with the first wrong page."""
        words, plain = self.guest.view(np.uint64), self.plain.view(np.uint64)
        bits = pattern.bits
        for column, expected in zip(COLUMNS, self._expected, strict=True):
            wrong = words[:, column] != np.where(bits, expected, ~expected)
            if wrong.any():
                raise self._wrong(what, int(np.flatnonzero(wrong)[0]), bits, int(np.count_nonzero(wrong)))
        dirty, clean = self._samples
        for pages, want in ((dirty, plain[dirty]), (clean, ~plain[clean])):
            bad = pages[(words[pages] != want).any(axis=1)]
            if bad.size:
                raise self._wrong(what, int(bad[0]), bits, int(bad.size))

    @staticmethod
    def _wrong(what: str, pfn: int, bits: npt.NDArray[np.bool_], count: int) -> WrongResultError:
        which = "dirty and was not copied whole" if bits[pfn] else "clean and was written"
        return WrongResultError(
            f"{what} left {count} of the looked-at pages wrong, the first is {pfn}, which is {which}"
        )

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.unlink()
        self._memory.close()
