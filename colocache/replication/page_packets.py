# SPDX-License-Identifier: Apache-2.0
"""Pages for a transport on which the C library can't write, as TLS: packets into memory, and out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

from colocache import Sender, SendResult
from colocache.errors import LengthError

PACK_BYTES = 1 << 18  # at once: small enough for the CPU's cache
PACK_BYTES_MAX = (2 << 20) + 4096  # one page of the largest kind


class PagePackets:
    """Room for packets that are about to be sent. One thread at a time."""

    def __init__(self) -> None:
        self._room = bytearray(PACK_BYTES)

    def send(
        self,
        sender: Sender,
        give: Callable[[memoryview], None],
        *,
        epoch: int,
        max_pages: int,
        stripe: int,
        n_stripes: int,
    ) -> SendResult:
        """What is pending, or `max_pages` of it, through `give`."""
        total = SendResult(0, 0, 0, 0)
        while not max_pages or total.n_pages < max_pages:
            left = max_pages - total.n_pages if max_pages else 0
            try:
                made = sender.pack(self._room, epoch=epoch, stripe=stripe, n_stripes=n_stripes, max_pages=left)
            except LengthError:
                if len(self._room) >= PACK_BYTES_MAX:
                    raise
                self._room = bytearray(PACK_BYTES_MAX)  # a block of larger pages
                continue
            if not made.n_bytes:
                break
            give(memoryview(self._room)[: made.n_bytes])
            total = SendResult(*(mine + more for mine, more in zip(astuple(total), astuple(made), strict=True)))
        return total
