# SPDX-License-Identifier: Apache-2.0
"""`colocache teach`: the lesson in the terminal, as a web page, as a file, and as an exercise."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from colocache.commands.options import foreseen, seconds_option
from colocache.teach.chapters import CHAPTERS
from colocache.teach.play import Script, record
from colocache.teach.shape import PAGES_MAX, PAGES_MIN, Shape
from colocache.teach.terminal import Walk, by_itself, by_keys, plain, plain_width
from colocache.writing import write_file

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog="The format of --export is described in `python -m pydoc colocache.teach.recording`.")
@click.option("--auto", is_flag=True, help="Go from step to step by itself instead of by keys.")
@seconds_option("--delay", default=4.0, help="With --auto: how long each step is shown.")
@click.option(
    "--pages",
    type=click.IntRange(PAGES_MIN, PAGES_MAX),
    default=64,
    show_default=True,
    help="Number of pages of the guest in the lesson.",
)
@click.option(
    "--chapter", "names", multiple=True, metavar="ID", help="Show only the chapter ID; may be given several times."
)
@click.option("--list", "listed", is_flag=True, help="List the chapters with their IDs.")
@click.option("--html", type=FILE, help="Write the lesson as one web page that needs nothing else.")
@click.option("--export", type=FILE, help="Write the recording as JSON, for figures of your own.")
@click.option(
    "--quiz", is_flag=True, help="Ask exercises: two bitmaps, what is the flush set, and why? Reads answers from stdin."
)
@click.option(
    "--rounds", type=click.IntRange(1, 20), default=4, show_default=True, help="With --quiz: the number of exercises."
)
@click.option("--seed", type=int, default=None, help="With --quiz: the same exercises again.")
@foreseen
def teach(
    auto: bool, delay: float, pages: int, names: Sequence[str], listed: bool, html: Path | None, export: Path | None,
    quiz: bool, rounds: int, seed: int | None,
) -> None:  # fmt: skip
    """Why two bitmaps and a cache? A lesson to look at, drawn from the real engine.

    Steps through a guest of 64 to 256 pages: PVM memory, cache, both bitmaps, flush set, unacked and SVM memory, each
    read from the engine's shared memory as it runs; with two images and with bounded memory, and driven from outside as
    a stock QEMU is. Keys: n or right, p or left, ] and [ for chapters, Home, End, ? for
    the legend, q. In a pipe all steps are written as plain text.

    The web page of --html can also be played: click which machine writes which page, run the checkpoint, kill either
    side at any step. Printing a chapter of it gives a handout.

    With --quiz the exit status is 0 if every answer was right.
    """
    if sum((listed, quiz, html is not None or export is not None)) > 1:
        raise click.UsageError("--list, --quiz and --html or --export are different things: give one of them")
    scripts = _chosen(names)
    console = _console(pages)
    if listed:
        for script in scripts:
            click.echo(f"{script.id:<18} {script.title}: {script.question}")
    elif quiz:
        _quiz(console, rounds, seed)
    elif html is not None or export is not None:
        _write(scripts, pages, html, export)
    else:
        _show(Walk(scripts, Shape.of(pages)), console, auto=auto, delay=delay)


def _chosen(names: Sequence[str]) -> Sequence[Script]:
    known = {script.id: script for script in CHAPTERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"no chapter is called {unknown[0]}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else CHAPTERS


def _console(pages: int) -> Console:
    """Colours and the window's width on a terminal; plain text of a fixed width elsewhere."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=plain_width(Shape.of(pages)), color_system=None, force_terminal=False)


def _show(walk: Walk, console: Console, *, auto: bool, delay: float) -> None:
    try:
        if not console.is_terminal:
            plain(walk, console)
        elif auto or not sys.stdin.isatty():
            by_itself(walk, console, delay)
        else:
            by_keys(walk, console)
    except BrokenPipeError:
        # The reader has seen enough; nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(scripts: Sequence[Script], pages: int, html: Path | None, export: Path | None) -> None:
    from colocache.teach import web

    lesson = record(scripts, pages)
    n_steps = sum(len(chapter.steps) for chapter in lesson.chapters)
    for path, text in ((html, web.page(lesson) if html is not None else ""), (export, lesson.to_json())):
        if path is not None:
            content = text.encode()
            write_file(path, content)
            click.echo(f"{path}: {len(lesson.chapters)} chapters, {n_steps} steps, {len(content)} bytes")


def _quiz(console: Console, rounds: int, seed: int | None) -> None:
    from colocache.teach import quiz

    def ask(prompt: str) -> str | None:
        console.print(f"{prompt}: ", end="", markup=False)
        line = sys.stdin.readline()
        if not sys.stdin.isatty():
            console.print(line.rstrip("\n"), markup=False)
        return line or None

    right, asked = quiz.run(console, ask, rounds=rounds, seed=seed)
    if asked < 2 * rounds:
        console.print(f"\nStopped after {asked} of {2 * rounds} answers, {right} of them right.")
    else:
        console.print(f"\n[bold]{right} of {asked} right.[/]")
    if right < 2 * rounds:
        raise SystemExit(1)
