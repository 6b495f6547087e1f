# SPDX-License-Identifier: Apache-2.0
"""Is there room for both machines of a demo on this one host? Asked before the first of them starts."""

from __future__ import annotations

from collections.abc import Sequence

from colocache import BlockSpec
from colocache import backing as bk

PRIMARY = 1  # images of guest RAM that each side makes
SECONDARY = {"mirror": 2, "bounded": 1}


def check_pair_fits(backing: str, specs: Sequence[BlockSpec], memory_mode: str = "mirror") -> None:
    """MemoryShortError says what is missing for both sides together; UnsupportedError that this backing is not there.

    With `auto` each side takes the fastest that has room for it, the secondary first.
    """
    kinds = bk.kinds(backing)
    if backing == "auto":
        _check_auto(specs, memory_mode)
        return
    n_images = SECONDARY[memory_mode]
    if memory_mode == "bounded":
        bk.check_private(kinds[0])
    kind = bk.nameless(kinds[0])
    bk.check_room(kind, (PRIMARY + n_images) * _size(kind, specs))
    if backing == "shm":  # the secondary's has a name, for which the file system may have a limit of its own
        bk.check_room(kinds[0], n_images * _size(kinds[0], specs))


def _check_auto(specs: Sequence[BlockSpec], memory_mode: str) -> None:
    huge, small = (bk.nameless(bk.kinds(backing)[0]) for backing in ("hugetlb", "shm"))
    free = bk.huge_pages().free * bk.HUGE
    on_small = 0
    for n_images, may_be_huge in ((SECONDARY[memory_mode], memory_mode == "mirror"), (PRIMARY, True)):
        if may_be_huge and free >= n_images * _size(huge, specs):
            free -= n_images * _size(huge, specs)
        else:
            on_small += n_images
    if on_small:
        bk.check_room(small, on_small * _size(small, specs))


def _size(kind: bk.Kind, specs: Sequence[BlockSpec]) -> int:
    """Bytes of one image of each block."""
    return sum(kind.size_of(spec.len_bytes) for spec in specs)
