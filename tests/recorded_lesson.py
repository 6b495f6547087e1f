# SPDX-License-Identifier: Apache-2.0
"""The whole lesson, run once for each size of the guest, and looking at it."""

from __future__ import annotations

import functools

from colocache.teach.chapters import CHAPTERS
from colocache.teach.play import record
from colocache.teach.recording import Chapter, Lesson, Step


@functools.cache
def recorded(n_pages: int) -> Lesson:
    return record(CHAPTERS, n_pages)


def pages(bits: str) -> set[int]:
    return {pfn for pfn, bit in enumerate(bits) if bit == "1"}


def at(chapter: Chapter, title: str) -> Step:
    return next(step for step in chapter.steps if step.title == title)
