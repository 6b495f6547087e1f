# SPDX-License-Identifier: Apache-2.0
"""Looking at a control region without owning it: no lock is taken and nothing is written."""

from __future__ import annotations

import os
from typing import Protocol

from colocache._native import check, ffi, lib, struct
from colocache.names import check_name, file_name, open_shm
from colocache.results import BlockInfo, Inspection, Status
from colocache.spec import BLOCKS_MAX


class HasControl(Protocol):
    """A Memory, as far as looking at it goes."""

    control_fd: int

    def check_open(self) -> None: ...


def inspect(region: HasControl | str | int) -> Inspection:
    """A region by its memory, its name, or a descriptor of its control object.

    NotColocacheError (there is none, or it is something else), LayoutError, CorruptError.
    """
    if isinstance(region, str):
        fd = open_shm(file_name(check_name(region), "control"))
        try:
            return _inspect(fd)
        finally:
            os.close(fd)
    if isinstance(region, int):
        return _inspect(region)
    region.check_open()
    return _inspect(region.control_fd)


def _inspect(control_fd: int) -> Inspection:
    status = struct("colocache_status")
    blocks = ffi.new("struct colocache_block_info[]", BLOCKS_MAX)
    n_blocks = ffi.new("uint32_t *", BLOCKS_MAX)
    check(lib.colocache_inspect(control_fd, status, blocks, n_blocks))
    found = (BlockInfo.of(blocks[index], index) for index in range(min(n_blocks[0], BLOCKS_MAX)))
    return Inspection(Status.of(status), tuple(block for block in found if block.name))  # without a name: removed
