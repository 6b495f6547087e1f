# SPDX-License-Identifier: Apache-2.0
"""A set of blocks of a disk, 64 KiB each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 64 << 10
RUN_BYTES_MAX = 1 << 20


class Blocks:
    """Blocks of a disk of `size` bytes; none at the beginning. A byte of memory for each block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._set = np.zeros(-(-size // BLOCK), dtype=np.bool_)

    def add(self, offset: int, length: int) -> None:
        """Every block that this range touches."""
        self._set[offset // BLOCK : -(-(offset + length) // BLOCK)] = True

    def add_all(self, other: Blocks) -> None:
        """Those of another set of the same disk."""
        self._set |= other._set

    def clear(self) -> None:
        """None."""
        self._set[:] = False

    def __len__(self) -> int:
        return int(np.count_nonzero(self._set))

    def runs(self) -> Iterator[tuple[int, int]]:
        """(offset, length in bytes) of neighbours, RUN_BYTES_MAX at most, as the set is now."""
        edges = np.flatnonzero(np.diff(np.pad(self._set, 1).astype(np.int8)))
        for first, behind in edges.reshape(-1, 2).tolist():
            begin, end = first * BLOCK, min(behind * BLOCK, self.size)
            for at in range(begin, end, RUN_BYTES_MAX):
                yield at, min(RUN_BYTES_MAX, end - at)
