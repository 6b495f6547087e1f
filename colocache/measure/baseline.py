# SPDX-License-Identifier: Apache-2.0
"""What a flush is measured against, from Python: the peak copy bandwidth, QEMU's way, and a numpy loop.

The only importer of the compiled module. Addresses are integers, bitmaps u64 words.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from colocache.measure._baseline import ffi, lib
from colocache.results import COPY_NAMES

Words = npt.NDArray[np.uint64]

QEMU_VERSION = "10.2"  # whose flush baseline.c follows


def pointer(addr: int) -> Any:
    """A C pointer to an address."""
    return ffi.cast("void *", addr)


def words_pointer(words: Words) -> Any:
    """A C pointer to u64 words; the array must live as long."""
    return ffi.from_buffer("uint64_t[]", words)


def pages_at(addr: int, n_pages: int) -> npt.NDArray[np.uint8]:
    """Mapped memory as a writable array of shape (n_pages, 4096); it must not be used once the memory is unmapped."""
    return np.frombuffer(ffi.buffer(pointer(addr), n_pages * 4096), np.uint8).reshape(n_pages, 4096)


def copies_with(variant: str) -> bool:
    """Whether this CPU has that page copy (a key of COPY_NAMES other than auto)."""
    return bool(lib.baseline_copies(COPY_NAMES[variant]))


def can_evict() -> bool:
    """Whether this CPU can push chosen bytes out of its caches at once."""
    return bool(lib.baseline_evict(ffi.NULL, 0))


def evict(addr: int, n_bytes: int) -> None:
    """Push exactly these bytes out of every CPU cache; only where can_evict()."""
    lib.baseline_evict(pointer(addr), n_bytes)


class Pool:
    """Threads for the peak pass, as many as the flush that is measured beside it has. Context manager."""

    def __init__(self, n_threads: int) -> None:
        self._pool = lib.baseline_pool_create(n_threads)
        if self._pool == ffi.NULL:
            raise MemoryError(f"no memory or no threads for a pool of {n_threads}")
        self.n_threads = int(lib.baseline_pool_size(self._pool))

    def sequential(self, to: int, source: int, n_bytes: int, variant: str, side_by_side: bool = False) -> None:
        """One pass of all threads over n_bytes, with one copy variant (a key of COPY_NAMES).

        Straight on, or as the flush copies: some pages side by side.
        """
        number = COPY_NAMES[variant]
        if lib.baseline_sequential(self._pool, pointer(to), pointer(source), n_bytes, number, side_by_side) != 0:
            raise ValueError(f"this CPU can't copy with {variant}")

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, ffi.NULL
        lib.baseline_pool_destroy(pool)


def qemu_union(bitmap: Words, log: Words) -> None:
    """The SVM's log into the one bitmap that QEMU has."""
    lib.baseline_qemu_union(words_pointer(bitmap), words_pointer(log), bitmap.size)


def qemu_clear(bitmap: Words, n_pages: int) -> int:
    """The walk over the runs with its bit-by-bit clear, without the copies; pages cleared."""
    return int(lib.baseline_qemu_clear(words_pointer(bitmap), n_pages))


def qemu_flush(bitmap: Words, n_pages: int, guest: int, cache: int) -> int:
    """The walk, the clear and one memcpy per run; pages copied."""
    return int(lib.baseline_qemu_flush(words_pointer(bitmap), n_pages, pointer(guest), pointer(cache)))


def numpy_flush(bitmap: Words, n_pages: int, guest: npt.NDArray[np.uint8], cache: npt.NDArray[np.uint8]) -> int:
    """A loop over the runs in numpy: find, copy run by run, clear; pages copied."""
    bits = np.unpackbits(bitmap.view(np.uint8), bitorder="little", count=n_pages)
    edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(0), append=np.uint8(0)))
    for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        guest[first:end] = cache[first:end]
    bitmap[:] = 0
    return int((edges[1::2] - edges[::2]).sum())


class Bitmap:
    """The engine's own bitmap over words of its own memory. Context manager."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.words: Words = np.zeros(-(-n_pages // 64), np.uint64)
        self._summary = np.zeros(-(-self.words.size // 64), np.uint64)
        self._bitmap = lib.baseline_bitmap_create(words_pointer(self.words), words_pointer(self._summary), n_pages)
        if self._bitmap == ffi.NULL:
            raise MemoryError("no memory for a bitmap")
        self._found = ffi.new("uint64_t *")

    def fill(self, words: Words) -> None:
        """These words instead of what it has."""
        self.words[:] = words
        lib.baseline_bitmap_rebuild(self._bitmap)

    def find_runs(self) -> int:
        """Find every run; how many there are. `found_pages` then counts their pages."""
        return int(lib.baseline_bitmap_runs(self._bitmap, self._found))

    @property
    def found_pages(self) -> int:
        return int(self._found[0])

    def move(self, pvm: Bitmap, svm: Bitmap) -> int:
        """What a seal does: become pvm | svm, counted, and clear both; pages of the union."""
        return int(lib.baseline_bitmap_move(self._bitmap, pvm._bitmap, svm._bitmap))

    def __enter__(self) -> Bitmap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bitmap, self._bitmap = self._bitmap, ffi.NULL
        lib.baseline_bitmap_destroy(bitmap)


class Eviction:
    """Memory that is touched so that neither pages nor bitmaps are left in a CPU cache."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._memory = np.ones(n_bytes // 8, np.uint64)  # not zeros, which would all be the kernel's one page
        self._pointer = ffi.from_buffer(self._memory)
        self.touch()

    def touch(self) -> None:
        """Read a word of every line."""
        lib.baseline_touch(self._pointer, self.n_bytes)
