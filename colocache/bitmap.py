# SPDX-License-Identifier: Apache-2.0
"""Bitmaps of pages in Python: little-endian u64 words, bit n of word w is page 64w+n, bits past the last page are zero.

The engine has its own in C; these are for looking at what it shows, for teaching and for tests.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from colocache.errors import RangeError

Words = npt.NDArray[np.uint64]


def n_words(n_pages: int) -> int:
    """Words that hold n_pages bits."""
    return -(-n_pages // 64)


def from_pfns(pfns: Iterable[int], n_pages: int) -> Words:
    """Words with these pages set. RangeError for a page past the end."""
    bits = np.zeros(n_words(n_pages) * 64, np.uint8)
    for pfn in pfns:
        if not 0 <= pfn < n_pages:
            raise RangeError(f"page {pfn} is past the end: the bitmap has {n_pages} pages")
        bits[pfn] = 1
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def to_pfns(words: Words) -> npt.NDArray[np.int64]:
    """The pages that are set, in ascending order."""
    return np.flatnonzero(np.unpackbits(_bytes(words), bitorder="little"))


def count(words: Words) -> int:
    """How many pages are set."""
    return int(np.unpackbits(_bytes(words)).sum(dtype=np.int64))


def runs(words: Words) -> list[tuple[int, int]]:
    """Maximal stretches of set bits, as (first page, number of pages), ascending."""
    pfns = to_pfns(words)
    if not pfns.size:
        return []
    breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
    return [(int(part[0]), len(part)) for part in np.split(pfns, breaks)]


def _bytes(words: Words) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
