# SPDX-License-Identifier: Apache-2.0
"""The lesson in a terminal, by keys or by itself; in a pipe, one step after the other as plain text."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.text import Text

from colocache.teach.draw import LEGEND, draw, is_taller, legend
from colocache.teach.play import Script
from colocache.teach.recording import Chapter
from colocache.teach.shape import Shape

KEYS_HELP = "→ n next  ← p back  PgDn ] chapter  PgUp [ back  Home End  ? legend  q quit"
KEYS = {
    "n": "next", " ": "next", "\r": "next", "\n": "next", "\x1b[C": "next", "\x1bOC": "next", "l": "next",
    "p": "back", "\x1b[D": "back", "\x1bOD": "back", "h": "back", "\x7f": "back",
    "]": "chapter", "\t": "chapter", "\x1b[6~": "chapter", "\x1b[B": "chapter", "\x1bOB": "chapter",
    "[": "chapter back", "\x1b[5~": "chapter back", "\x1b[A": "chapter back", "\x1bOA": "chapter back",
    "\x1b[H": "first", "\x1bOH": "first", "\x1b[1~": "first", "g": "first",
    "\x1b[F": "last", "\x1bOF": "last", "\x1b[4~": "last", "G": "last",
    "?": "legend", "q": "quit", "\x1b": "quit", "\x03": "quit", "\x04": "quit",
}  # fmt: skip
STATUS_HELP = (
    "control region is what the engine's shared memory says: the newest epoch that is sealed (complete), the newest "
    "that is committed (flushed too), and the newest of which a page may have come (receiving)."
)
POLL_SECONDS = 0.3  # how soon a change of the window's size is seen


def plain_width(shape: Shape) -> int:
    """Characters of a line in a pipe: room for the grids of this guest."""
    return 120 if shape.columns <= 8 else 144


class Walk:
    """Where we are in the lesson. A chapter is run on the engine when it is first come to."""

    def __init__(self, scripts: Sequence[Script], shape: Shape) -> None:
        self._scripts, self.shape = scripts, shape
        self._run: dict[int, Chapter] = {}
        self.at, self.number = 0, 0

    @property
    def chapter(self) -> Chapter:
        if self.at not in self._run:
            self._run[self.at] = self._scripts[self.at].record(self.shape)
        return self._run[self.at]

    @property
    def known(self) -> bool:
        return self.at in self._run

    @property
    def ended(self) -> bool:
        return self.at == len(self._scripts) - 1 and self.number == len(self.chapter.steps) - 1

    def move(self, what: str) -> None:
        """One of the words of KEYS, but quit."""
        last = len(self._scripts) - 1
        if what == "next" and not self.ended:
            self.number += 1
            if self.number == len(self.chapter.steps):
                self.at, self.number = self.at + 1, 0
        elif what == "back" and (self.at or self.number):
            self.number -= 1
            if self.number < 0:
                self.at -= 1
                self.number = len(self.chapter.steps) - 1
        elif what == "chapter" and self.at < last:
            self.at, self.number = self.at + 1, 0
        elif what == "chapter back":
            self.at, self.number = max(0, self.at - (self.number == 0)), 0
        elif what == "first":
            self.number = 0
        elif what == "last":
            self.number = len(self.chapter.steps) - 1


def plain(walk: Walk, console: Console) -> None:
    """Every step, one after the other, and the legend once."""
    console.print(Text(LEGEND))
    while True:
        console.print()
        console.rule(style="bright_black")
        show(walk, console)
        if walk.ended:
            return
        walk.move("next")


def by_itself(walk: Walk, console: Console, delay: float) -> None:
    """On a terminal: each step on a screen of its own, for `delay` seconds."""
    while True:
        console.clear()
        show(walk, console)
        time.sleep(delay)
        if walk.ended:
            return
        walk.move("next")


def by_keys(walk: Walk, console: Console) -> None:
    """On a terminal: until q, Escape or Ctrl-C."""
    with console.screen(hide_cursor=True), _keys() as keys:
        while True:
            console.clear()
            if not walk.known:
                console.print("[bright_black]Running this chapter on the engine ...[/]")
                walk.chapter  # noqa: B018 this runs it
                console.clear()
            show(walk, console)
            what = _pressed(keys, console)
            if what == "legend":
                console.clear()
                console.print(Text(f"{_legend(walk, console)}\n\n{STATUS_HELP}\n\n? again goes back."))
                what = _pressed(keys, console)
                what = what if what == "quit" else None
            if what == "quit":
                return
            if what is not None:
                walk.move(what)


def _pressed(keys: Iterator[str | None], console: Console) -> str | None:
    """The next key's word; None if the window changed its size."""
    size, what = console.size, None
    while what is None and console.size == size:
        what = next(keys)
    return what


def _legend(walk: Walk, console: Console) -> str:
    return legend(walk.shape.columns, walk.shape.n_pages, console.width, console.height - 1)


def show(walk: Walk, console: Console) -> None:
    """The step; on a terminal with the keys, and with the legend where there is room for it."""
    chapter = walk.chapter
    if not console.is_terminal:
        console.print(draw(chapter, walk.number, walk.shape.columns, console.width))
        return
    below = Text(KEYS_HELP, style="bright_black")
    step = draw(chapter, walk.number, walk.shape.columns, console.width, console.height - 1)
    words = Text(_legend(walk, console), style="bright_black")
    whole = Group(step, words, below)
    console.print(Group(step, below) if is_taller(whole, console.width, console.height - 1) else whole)


@contextmanager
def _keys() -> Iterator[Iterator[str | None]]:
    """Keys of the terminal as words of KEYS; None now and then while none is pressed."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        # Output goes on as always: only input is raw.
        now = termios.tcgetattr(fd)
        now[1] = before[1]
        termios.tcsetattr(fd, termios.TCSADRAIN, now)
        yield _words(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _words(fd: int) -> Iterator[str | None]:
    pending = ""
    while True:
        if not pending and not select.select([fd], [], [], POLL_SECONDS)[0]:
            yield None
            continue
        if not pending or (pending == "\x1b" and select.select([fd], [], [], 0.05)[0]):
            more = os.read(fd, 64).decode(errors="replace")
            if not more:
                yield "quit"
            pending += more
        key = next((key for length in (4, 3, 1) if (key := pending[:length]) in KEYS), pending[:1])
        pending = pending[len(key) :]
        yield KEYS.get(key)
