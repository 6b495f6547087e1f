# SPDX-License-Identifier: Apache-2.0
"""How many descriptors this process may have: systems begin with 1024, and 256 RAM blocks of two images need more."""

from __future__ import annotations

import contextlib
import resource

from colocache.errors import UnsupportedError

PER_BLOCK = 4  # its two images, here and in the handle of the C library
OTHERS = 64  # the control region, sockets, a machine


def raise_limit(wanted: int) -> int:
    """Let this process have `wanted` descriptors if it may; how many it may have now. Lowers nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft


def need_for_blocks(n_blocks: int) -> None:
    """UnsupportedError with the number if a secondary with so many RAM blocks can't have its descriptors."""
    needed = PER_BLOCK * n_blocks + OTHERS
    have = raise_limit(needed)
    if have < needed:
        raise UnsupportedError(
            f"{n_blocks} RAM blocks take {needed} descriptors and this process may have {have}",
            hint=f"`ulimit -n {needed}`, as root if need be",
        )
