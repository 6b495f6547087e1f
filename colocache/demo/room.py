# SPDX-License-Identifier: Apache-2.0
"""Is there room for both machines of a demo on this one host? Asked before the first of them starts."""

from __future__ import annotations

from collections.abc import Sequence

from colocache import BlockSpec
from colocache import backing as bk

PRIMARY, SECONDARY = 1, 2  # images of guest RAM that each side makes


def check_pair_fits(backing: str, specs: Sequence[BlockSpec]) -> None:
    """MemoryShortError says what is missing for both sides together; UnsupportedError that this backing is not there.

    With `auto` each side takes the fastest that has room for it, the secondary first.
    """
    kinds = bk.kinds(backing)
    if backing == "auto":
        _check_auto(specs)
        return
    kind = bk.nameless(kinds[0])
    bk.check_room(kind, (PRIMARY + SECONDARY) * _size(kind, specs))
    if backing == "shm":  # the secondary's has a name, for which the file system may have a limit of its own
        bk.check_room(kinds[0], SECONDARY * _size(kinds[0], specs))


def _check_auto(specs: Sequence[BlockSpec]) -> None:
    huge, small = (bk.nameless(bk.kinds(backing)[0]) for backing in ("hugetlb", "shm"))
    free = bk.huge_pages().free * bk.HUGE
    on_small = 0
    for n_images in (SECONDARY, PRIMARY):
        if free >= n_images * _size(huge, specs):
            free -= n_images * _size(huge, specs)
        else:
            on_small += n_images
    if on_small:
        bk.check_room(small, on_small * _size(small, specs))


def _size(kind: bk.Kind, specs: Sequence[BlockSpec]) -> int:
    """Bytes of one image of each block."""
    return sum(kind.size_of(spec.len_bytes) for spec in specs)
