# SPDX-License-Identifier: Apache-2.0
"""After a takeover on bounded memory: the machine's private copies are folded into the image, part by part, each in a
short pause of its own. Otherwise they would grow to a second image for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator

from colocache.errors import ColocacheError
from colocache.replication.events import Events
from colocache.replication.svm import Svm

PART_BYTES = 32 << 20  # at most so much is copied in one pause: about 10 ms
RUN_SHARE = 9  # for each second that it stands for this the machine runs so many


class Fold:
    """One part with each call of `step`. Whatever fails, the machine goes on as it was.

    `rest`: seconds that it should run before the next part; None: there is no more to do.
    """

    def __init__(self, svm: Svm, events: Events) -> None:
        self._svm = svm
        self._events = events
        bounded = svm.cache.status().memory_mode == "bounded"
        self._parts = self._all_parts() if bounded else iter(())
        self.rest: float | None = 0.0 if bounded else None
        self._begin = time.monotonic()
        self._n_bytes = self._n_pauses = self._longest_ns = 0

    def _all_parts(self) -> Iterator[tuple[int, int, int]]:
        for block in list(self._svm.cache.blocks.values()):
            n_pages = max(1, PART_BYTES // block.page_size)
            for first in range(0, block.n_pages, n_pages):
                yield block.index, first, min(n_pages, block.n_pages - first)

    def step(self) -> None:
        """The next part, if there is one; the machine ran before and runs afterwards. MachineError: it does not."""
        part = next(self._parts, None)
        if part is None:
            self.rest = None
            return
        begin = time.monotonic_ns()
        self._svm.pause()
        try:
            self._n_bytes += self._svm.machine.fold(self._svm.cache, *part)
        except ColocacheError as error:
            self._parts, part = iter(()), None
            self._events.emit(
                "fold_error",
                f"private pages stay what they are, beside the image: {error}",
                error=str(error),
                bytes=self._n_bytes,
            )
        self._svm.resume()
        self._n_pauses += 1
        took_ns = time.monotonic_ns() - begin
        self._longest_ns, self.rest = max(self._longest_ns, took_ns), took_ns * RUN_SHARE / 1e9
        if part is None:
            self.rest = None
        elif self._is_last(part):
            self._told()

    def _is_last(self, part: tuple[int, int, int]) -> bool:
        index, first, n_pages = part
        *_, last = self._svm.cache.blocks.values()
        return index == last.index and first + n_pages == last.n_pages

    def _told(self) -> None:
        longest_ms = round(self._longest_ns / 1e6, 3)
        self._events.emit(
            "folded",
            f"{self._n_bytes / 1e6:.1f} MB of private pages went into the image, in {self._n_pauses} pauses of at most "
            f"{longest_ms:.1f} ms; the machine needs one image from now on",
            bytes=self._n_bytes,
            pauses=self._n_pauses,
            longest_ms=longest_ms,
            seconds=round(time.monotonic() - self._begin, 3),
        )
