# SPDX-License-Identifier: Apache-2.0
"""RAM blocks as a caller describes them, and where their two images are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from colocache._native import lib
from colocache.errors import BlockError, LengthError

BLOCKS_MAX: int = lib.COLOCACHE_BLOCKS_MAX
NAME_BYTES_MAX: int = lib.COLOCACHE_NAME_BYTES - 1
PAGE_SIZE_MAX = 2 << 20
LENGTH_MAX = 1 << 46  # 64 TiB: more than an x86 machine maps, small enough that sums of 256 blocks fit a file offset


@dataclass(frozen=True)
class BlockSpec:
    """A RAM block: its name (1 to 255 bytes), its length and its tracking page size, both in bytes."""

    name: str
    len_bytes: int
    page_size: int = 4096

    def __post_init__(self) -> None:
        n_bytes = len(self.name.encode())
        if not 1 <= n_bytes <= NAME_BYTES_MAX or "\0" in self.name:
            raise BlockError(f"a block's name has 1 to {NAME_BYTES_MAX} bytes, this one {n_bytes}: {self.name!r}")
        if self.page_size & (self.page_size - 1) or not 4096 <= self.page_size <= PAGE_SIZE_MAX:
            raise LengthError(
                f"page size of block {self.name} is {self.page_size}: a power of two, 4096 to {PAGE_SIZE_MAX}"
            )
        if self.len_bytes <= 0 or self.len_bytes % self.page_size or self.len_bytes > LENGTH_MAX:
            raise LengthError(
                f"block {self.name} is {self.len_bytes} bytes long: a positive multiple of its page size "
                f"{self.page_size}, at most {LENGTH_MAX}"
            )

    @property
    def n_pages(self) -> int:
        return self.len_bytes // self.page_size


@dataclass(frozen=True)
class Images:
    """The two images of one block, as descriptors. `sparse`: not reserved, pages are allocated as they come."""

    spec: BlockSpec
    guest_fd: int
    guest_offset: int
    cache_fd: int
    cache_offset: int
    sparse: bool


def facts_of(images: Images) -> dict[str, object]:
    """For a manifest, which images_from reads."""
    return {**asdict(images.spec), **{key: value for key, value in asdict(images).items() if key != "spec"}}


def images_from(facts: Mapping[str, Any]) -> Images:
    """What facts_of wrote. ValueError, KeyError, TypeError."""
    return Images(
        BlockSpec(str(facts["name"]), int(facts["len_bytes"]), int(facts["page_size"])),
        int(facts["guest_fd"]),
        int(facts["guest_offset"]),
        int(facts["cache_fd"]),
        int(facts["cache_offset"]),
        bool(facts["sparse"]),
    )


def check_blocks(blocks: Sequence[BlockSpec]) -> tuple[BlockSpec, ...]:
    """The blocks as a tuple; BlockError if there are none, too many, or two of one name."""
    specs = tuple(blocks)
    if not 1 <= len(specs) <= BLOCKS_MAX:
        raise BlockError(f"{len(specs)} RAM blocks: a secondary has 1 to {BLOCKS_MAX}")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BlockError(f"two RAM blocks are called {twice[0]}")
    return specs
