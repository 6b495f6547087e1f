# SPDX-License-Identifier: Apache-2.0
"""What stands in a page of the lesson's guest: who wrote it, and in which epoch.

A page is filled from end to end with one 16-byte stamp: the writer's letter, the epoch, the page's own number. So every
page of every image tells where its bytes come from, and a page that was copied in part, or to the wrong place, shows.

As text a stamp is `P2` (the PVM wrote it, on the way to epoch 2), `S2` (the SVM did), `-` (never written) or `?`
(torn).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
NEVER = "-"
TORN = "?"
STAMP = np.dtype([("writer", "S4"), ("epoch", "<u4"), ("pfn", "<u8")])
PER_PAGE = PAGE_BYTES // STAMP.itemsize

Pages = npt.NDArray[np.uint8]  # (n_pages, PAGE_BYTES)


def stamp(pages: Pages, pfns: Iterable[int], writer: str, epoch: int) -> None:
    """Write these pages, as `writer` ("P" or "S") does on the way to `epoch`."""
    for pfn in pfns:
        cells = np.empty(PER_PAGE, STAMP)
        cells["writer"], cells["epoch"], cells["pfn"] = writer.encode(), epoch, pfn
        pages[pfn] = cells.view(np.uint8)


def read(pages: Pages) -> tuple[str, ...]:
    """The stamp of each page, as text."""
    return tuple(_read_one(page, pfn) for pfn, page in enumerate(pages))


def _read_one(page: npt.NDArray[np.uint8], pfn: int) -> str:
    cells = page.view(STAMP)
    first = cells[0]
    if not page.any():
        return NEVER
    if not (cells == first).all() or int(first["pfn"]) != pfn or first["writer"] not in (b"P", b"S"):
        return TORN
    return f"{first['writer'].decode()}{int(first['epoch'])}"


def describe(text: str) -> str:
    """A stamp in words: "written by the PVM on the way to epoch 2"."""
    if text == NEVER:
        return "never written: all zero bytes"
    if text == TORN:
        return "torn: not one whole write of one machine"
    who = "PVM" if text[0] == "P" else "SVM"
    return f"written by the {who} on the way to epoch {text[1:]}"


def is_stamp(text: object) -> bool:
    """Whether `text` is one of the forms above."""
    if not isinstance(text, str):
        return False
    return text in (NEVER, TORN) or (text[:1] in ("P", "S") and text[1:].isascii() and text[1:].isdigit())
