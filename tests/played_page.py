# SPDX-License-Identifier: Apache-2.0
"""The lesson's page, open where it is played, and the random numbers that choose what is done there."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chromium import Browser, started

from colocache.teach import web
from colocache.teach.chapters import CHAPTERS
from colocache.teach.play import record
from colocache.teach.shape import Shape

PLAYS = int(os.environ.get("COLOCACHE_PLAYS", "40"))
ACTIONS = 30  # at most, in each play
SHAPE = Shape.of(64)


@contextmanager
def opened() -> Iterator[Browser]:
    """The page at the chapter that is played. The test is skipped where there is no browser."""
    with tempfile.TemporaryDirectory() as folder, started() as browser:
        path = Path(folder) / "lesson.html"
        path.write_text(web.page(record(CHAPTERS[:1], SHAPE.n_pages)), encoding="utf-8")
        browser.screen(1366, 650)
        browser.open(path, "#play/1")
        yield browser


def to_play(browser: Browser) -> None:
    """To the chapter that is played, from wherever the page is; what was complained of is forgotten."""
    browser.trouble.clear()
    browser.js("document.querySelector(`[data-chapter='${lesson.at.playChapter}']`).click()")


def numbers_of(seed: int) -> list[int]:
    """What chooses the actions of one play."""
    rng = random.Random(seed)
    return [rng.randrange(1 << 30) for _ in range(rng.randint(5, ACTIONS))]


def trouble(browser: Browser) -> list[str]:
    """All but one: the address follows each step, and nobody clicks as fast as these tests."""
    return [one for one in browser.trouble if "Throttling navigation" not in one]
