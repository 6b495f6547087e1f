# SPDX-License-Identifier: Apache-2.0
"""The lesson's guest as a grid, and the pages that its two machines write, drawn once for 8 x 8 and scaled to any size.

On the grid the PVM's pages and the SVM's are two rectangles that overlap, so that the union is seen at a glance:

    . . . . . . R R        R: written by the SVM later on
    . P P P P . . .
    . P P B B S S .
    . P P B B S S .        B: written by both
    . . . S S S S .
    . Q Q Q . . . .        Q: written by the PVM later on
    . . . . . . . .
    . . . . . . . .
"""

from __future__ import annotations

from dataclasses import dataclass

from colocache.errors import ArgumentError

PAGES_MIN, PAGES_MAX = 64, 256
PLAN = (
    "......RR",
    ".PPPP...",
    ".PPBBSS.",
    ".PPBBSS.",
    "...SSSS.",
    ".QQQ....",
    "........",
    "........",
)


@dataclass(frozen=True)
class Shape:
    """n_pages pages in rows of `columns`; the last row may be short."""

    n_pages: int
    columns: int

    @classmethod
    def of(cls, n_pages: int) -> Shape:
        """ArgumentError unless there are 64 to 256 pages."""
        if not PAGES_MIN <= n_pages <= PAGES_MAX:
            raise ArgumentError(f"a lesson of {n_pages} pages: from {PAGES_MIN} to {PAGES_MAX} can be drawn")
        return cls(n_pages, 8 if n_pages <= 96 else 16)

    @property
    def rows(self) -> int:
        return -(-self.n_pages // self.columns)

    def letters(self, wanted: str) -> list[int]:
        """The pages that carry one of these letters on the plan."""
        return [pfn for pfn in range(self.n_pages) if self._letter(pfn) in wanted]

    def _letter(self, pfn: int) -> str:
        row, column = divmod(pfn, self.columns)
        return PLAN[row * 8 // self.rows][column * 8 // self.columns]

    @property
    def all(self) -> list[int]:
        return list(range(self.n_pages))

    @property
    def pvm(self) -> list[int]:
        """What the PVM writes on the way to epoch 2."""
        return self.letters("PB")

    @property
    def svm(self) -> list[int]:
        """What the SVM writes in the same time."""
        return self.letters("SB")

    @property
    def both(self) -> list[int]:
        return self.letters("B")

    @property
    def pvm_later(self) -> list[int]:
        return self.letters("Q")

    @property
    def svm_later(self) -> list[int]:
        return self.letters("R")
