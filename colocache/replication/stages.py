# SPDX-License-Identifier: Apache-2.0
"""The stages of one checkpoint on one side, in a row: each begins where the one before it ended, so that their sum is
the whole and no time is nobody's. The result's figures and the trace are made of the same marks."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Something that took from `begin` to `end`, CLOCK_MONOTONIC in nanoseconds."""

    name: str
    begin: int
    end: int

    @property
    def ns(self) -> int:
        return self.end - self.begin


class Stages:
    """A mark costs a tenth of a microsecond: they are taken always, whoever wants a trace."""

    def __init__(self) -> None:
        self.begin = self.now = time.monotonic_ns()  # `now`: the newest mark
        self._marks: list[tuple[str, int]] = []

    def done(self, name: str, at: int | None = None) -> int:
        """The stage `name` ends here, or ended `at`, since the one before it: CLOCK_MONOTONIC in nanoseconds."""
        now = time.monotonic_ns()
        self.now = now if at is None else max(self.now, min(at, now))
        self._marks.append((name, self.now))
        return self.now

    def spans(self) -> list[Span]:
        """In their order."""
        begin, made = self.begin, []
        for name, end in self._marks:
            made.append(Span(name, begin, end))
            begin = end
        return made

    def span(self, name: str) -> Span:
        """One of them. KeyError: it was not gone through."""
        return {span.name: span for span in self.spans()}[name]
