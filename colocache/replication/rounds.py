# SPDX-License-Identifier: Apache-2.0
"""Pages in the background: rounds of taking the log and sending, so that little is left when the machine stops.

Between checkpoints a round comes after each delay, if the guest has written enough. Just before a pause rounds follow
each other as long as they pay. Let `a` be what a round costs however little it sends, `b` what a page costs, both in
seconds, and `r` the pages that the guest dirties in a second, all measured as the pair runs. With `n` pages dirty now

    a pause now sends n of them and lasts          b n
    another round takes                            a + b n
    the guest dirties meanwhile                    r (a + b n)   pages, which the pause sends instead
    the pause is shorter by                        b (n - r (a + b n))

and the round is worth its while if that is more than `a`, which the guest pays: each page that was sent is
write-protected again. Where r b >= 1 the guest is faster than the link, and no round pays.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FIXED_SECONDS = 100e-6  # of a round and of a page, before anything was measured: a local socket
PAGE_SECONDS = 1.5e-6
FEW_PAGES, MANY_PAGES = 32, 256  # a round of less tells what it costs itself, one of more what a page costs
WEIGHT = 0.25  # of the newest measurement
LAST_MAX = 8  # rounds before a pause, whatever they promise: a guest must stop some time


def pays(n_dirty: float, rate: float, fixed: float, per_page: float) -> bool:
    """Does another round shorten the pause by more than it costs? `rate` in pages a second, the others in seconds."""
    left = rate * (fixed + per_page * n_dirty)
    return per_page * (n_dirty - left) > fixed


class Rounds:
    """`take` takes the log, `send` sends all that is pending and says how many pages that was, `hint` guesses how many
    are dirty. One thread."""

    def __init__(self, take: Callable[[], None], send: Callable[[], int], hint: Callable[[], int]) -> None:
        self._take, self._send, self._hint = take, send, hint
        self.fixed, self.per_page = FIXED_SECONDS, PAGE_SECONDS
        self._taken = time.monotonic()  # when the log was taken last
        self._rate = 0.0  # pages a second that the guest dirtied then

    def running(self) -> None:
        """The machine runs again, its log having been taken while it stood."""
        self._taken = time.monotonic()

    def one(self) -> float:
        """One round: about how many pages are dirty after it."""
        return self._one()[1]

    def last(self) -> int:
        """Those before a pause: how many."""
        before = float("inf")
        for number in range(1, LAST_MAX + 1):
            rate, left = self._one()
            # What did not shrink will not: the guest is as fast as we are.
            if left > 0.75 * before or not pays(left, rate, self.fixed, self.per_page):
                return number
            before = left
        return LAST_MAX

    def after_waiting(self) -> int:
        """The secondary stands and the guest ran on until that was heard, on a far link for long: those that pay."""
        for number in range(LAST_MAX):
            n_dirty = max(self._rate * (time.monotonic() - self._taken), float(self._hint()))
            if not pays(n_dirty, self._rate, self.fixed, self.per_page):
                return number
            self._one()
        return LAST_MAX

    def _one(self) -> tuple[float, float]:
        """Pages that the guest dirties in a second, and how many are dirty now."""
        begin = time.monotonic()
        since, self._taken = begin - self._taken, begin
        self._take()
        n_pages = self._send()
        took = time.monotonic() - begin
        self._learn(n_pages, took)
        self._rate = n_pages / max(since, 1e-6)
        return self._rate, max(self._rate * took, float(self._hint()))

    def _learn(self, n_pages: int, took: float) -> None:
        if n_pages < FEW_PAGES:
            self.fixed += WEIGHT * (took - self.fixed)
        elif n_pages >= MANY_PAGES:
            self.per_page += WEIGHT * (max(0.0, took - self.fixed) / n_pages - self.per_page)
