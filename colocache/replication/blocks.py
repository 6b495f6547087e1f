# SPDX-License-Identifier: Apache-2.0
"""RAM blocks in the three shapes that meet here: as specified, as mapped, as told to the peer."""

from __future__ import annotations

from collections.abc import Iterable

from colocache import Block, BlockSpec, Cache, Images, RamImage
from colocache.replication.hello import HelloBlock
from colocache.vmm.machine import Ram


def hello_blocks(specs: Iterable[BlockSpec | None]) -> tuple[HelloBlock | None, ...]:
    """Blocks as HELLO names them, by their index; None for one that was removed."""
    return tuple(HelloBlock(spec.name, spec.len_bytes, spec.page_size) if spec else None for spec in specs)


def next_blocks(cache: Cache) -> tuple[HelloBlock | None, ...]:
    """The blocks of the next epoch that `cache` seals, by their index."""
    stay = {b.index: HelloBlock(b.name, b.len_bytes, b.page_size) for b in cache.blocks.values() if not b.leaving}
    return tuple(stay.get(index) for index in range(cache.status().n_blocks))


def rams_of_images(images: Iterable[RamImage]) -> tuple[Ram, ...]:
    """A primary's guest RAM."""
    return tuple(
        Ram(image.spec.name, index, image.spec.page_size, image.spec.n_pages, image.addr, image.fd)
        for index, image in enumerate(images)
    )


def rams_of_blocks(blocks: Iterable[Block], images: Iterable[Images] = (), *, private: bool = False) -> tuple[Ram, ...]:
    """A secondary's guest RAM, where the cache has mapped it; `images` are the files of these blocks.

    `private`: the memory is bounded, and mapped so.
    """
    fds = {image.spec.name: image.guest_fd for image in images if image.guest_offset == 0}
    return tuple(
        Ram(b.name, b.index, b.page_size, b.n_pages, b.guest_addr, fds.get(b.name, -1), private) for b in blocks
    )
