# SPDX-License-Identifier: Apache-2.0
"""A step as text for a terminal or a pipe: the same grids as on the web page, in letters first and colours second."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from colocache.teach.recording import Chapter, Step
from colocache.teach.tags import NEVER, TORN
from colocache.teach.wire import explain

KINDS = {"lesson": "How it works", "death": "A death at each point", "counter": "Done wrong on purpose"}
ACTORS = {"pvm": "the PVM", "svm": "the SVM", "wire": "on the wire", "nobody": ""}
FLUSH_NOTES = {"none": "nothing sealed", "due": "to be copied", "done": "all copied", "own": "its own list"}
PVM, SVM, BOTH = "bold white on rgb(31,107,176)", "bold white on rgb(181,80,11)", "bold white on rgb(112,68,158)"
PVM_OLD, EMPTY, WRONG = "rgb(110,165,215)", "bright_black", "bold white on rgb(192,31,46)"
LEGEND = (
    "P written by the PVM, S by the SVM, B by both; the number is the epoch that was on its way. "
    "In a bitmap 1 is a page noted; in unacked w is waiting to be sent, u sent but not confirmed. "
    "* changed in this step, > the text speaks of it, ! wrong."
)
# The same for grids of two characters a page, and of one.
LEGEND_2 = (
    "P2 written by the PVM on the way to epoch 2, S by the SVM, B by both; 1 noted; w to be sent, u sent, not "
    "confirmed; underlined: the text speaks of it; ! wrong"
)
LEGEND_1 = (
    "P written by the PVM (p: for an older epoch), S by the SVM, B by both; 1 noted; w to be sent, u sent, not "
    "confirmed (unack: unacked; b: bitmap); underlined: see text; ! wrong"
)


@dataclass(frozen=True)
class Cell:
    """One page in one grid: up to two characters, its style, and whether it counts in the grid's sum."""

    text: str
    style: str
    n: int


def newest_epoch(chapter: Chapter, number: int) -> int:
    """The newest epoch in any page up to step `number` (from 0): its writes are drawn strong, older ones weak."""
    stamps = {stamp for step in chapter.steps[: number + 1] for image in step.images.values() for stamp in image}
    return max((int(stamp[1:]) for stamp in stamps if stamp not in (NEVER, TORN)), default=1)


def image_cells(image: tuple[str, ...], newest: int) -> list[Cell]:
    styles = {"S": SVM, "?": WRONG, "-": EMPTY}
    cells = []
    for stamp in image:
        style = styles.get(stamp[0]) or (PVM if stamp == f"P{newest}" else PVM_OLD)
        cells.append(Cell("·" if stamp == NEVER else stamp, style, int(stamp != NEVER)))
    return cells


def bit_cells(bits: str, style: str) -> list[Cell]:
    return [Cell("1", style, 1) if bit == "1" else Cell("·", EMPTY, 0) for bit in bits]


def flush_cells(step: Step) -> list[Cell]:
    styles = {"P": PVM, "S": SVM, "B": BOTH, ".": PVM}
    done = step.flush_state == "done"
    return [
        Cell(origin if origin != "." else "1", EMPTY if done else styles[origin], 1)
        if bit == "1"
        else Cell("·", EMPTY, 0)
        for bit, origin in zip(step.bitmaps["flush"], step.origin, strict=True)
    ]


def unacked_cells(step: Step) -> list[Cell]:
    pairs = zip(step.bitmaps["unacked"], step.bitmaps["pending"], strict=True)
    return [
        Cell("w", PVM, 1) if waiting == "1" else Cell("u", PVM_OLD, 1) if unacked == "1" else Cell("·", EMPTY, 0)
        for unacked, waiting in pairs
    ]


def grids(chapter: Chapter, number: int) -> dict[str, list[Cell]]:
    """Every grid of a step, by the name that is shown. Bounded memory has no SVM bitmap; its place is guest RAM's."""
    step, newest = chapter.steps[number], newest_epoch(chapter, number)
    last = (
        {"guest RAM": image_cells(step.ram, newest)}
        if step.ram
        else {"SVM bitmap": bit_cells(step.bitmaps["svm"], SVM)}
    )
    return {
        "PVM memory": image_cells(step.images["pvm"], newest),
        "cache": image_cells(step.images["cache"], newest),
        "flush set": flush_cells(step),
        "SVM memory": image_cells(step.images["svm"], newest),
        "unacked": unacked_cells(step),
        "PVM bitmap": bit_cells(step.bitmaps["pvm"], PVM),
        **last,
    }


SHORT = {
    "PVM memory": "PVM", "unacked": "unack", "cache": "cache", "PVM bitmap": "PVM b", "flush set": "flush",
    "SVM bitmap": "SVM b", "guest RAM": "RAM", "SVM memory": "SVM",
}  # fmt: skip
ROWS = (("PVM memory", "cache", "flush set", "SVM memory"), ("unacked", "PVM bitmap", None, "SVM bitmap", "guest RAM"))
PER_ROW, PER_STEP = 4, 7


def draw(chapter: Chapter, number: int, columns: int, width: int, height: int = 0) -> RenderableType:
    """Step `number` (from 0) of a chapter, for `width` characters; `height` 0: there is no end to the lines.

    A terminal that is too low for two rows of grids gets all of them in one row, a character per page.
    """
    step = chapter.steps[number]
    now = grids(chapter, number)
    then = grids(chapter, number - 1) if number else {}
    if is_low(columns, len(step.wrong), width, height):
        panels = _lay([[_panel(name, now[name], then.get(name), step, columns, 1) for name in SHORT if name in now]])
        head, foot = _head(chapter, number, short=True), _foot(chapter, number)
        if is_taller(Group(*head, panels, *foot), width, height - 1):  # a line is the keys'
            head, foot = _head(chapter, number, short=True, doing=False), _foot(chapter, number, short=True)
        return Group(*head, panels, *foot)
    cell_width = cell_width_of(columns, width)
    made = [
        [
            Text("") if name is None else _panel(name, now[name], then.get(name), step, columns, cell_width)
            for name in row
            if name is None or name in now
        ]
        for row in ROWS
    ]
    if width >= PER_ROW * (columns * cell_width + 4):
        return Group(*_head(chapter, number), _lay(made), *_foot(chapter, number))
    narrow = Columns([one for row in made for one in row if not isinstance(one, Text)], padding=(0, 0))
    return Group(*_head(chapter, number), narrow, *_foot(chapter, number))


def cell_width_of(columns: int, width: int) -> int:
    """Characters of a page, so that a row of grids fits `width`."""
    return next((w for w in (3, 2, 1) if PER_ROW * (columns * w + 4) <= width), 1)


def is_low(columns: int, n_pages: int, width: int, height: int) -> bool:
    """Whether all grids go into one row, because two don't fit the height."""
    return 0 < height < 2 * -(-n_pages // columns) + 17 and PER_STEP * (columns + 2) <= width


def is_taller(drawn: RenderableType, width: int, height: int) -> bool:
    """Whether it takes more than `height` lines of `width` characters."""
    return len(Console(width=width, file=io.StringIO()).render_lines(drawn)) > height


def legend(columns: int, n_pages: int, width: int, height: int) -> str:
    """The legend that goes with what `draw` draws for this size."""
    narrow = 1 if is_low(columns, n_pages, width, height) else cell_width_of(columns, width)
    return {3: LEGEND, 2: LEGEND_2, 1: LEGEND_1}[narrow]


def _lay(panels: list[list[RenderableType]]) -> RenderableType:
    table = Table.grid(padding=0)
    for row in panels:
        table.add_row(*row)
    return table


def _panel(
    name: str, cells: list[Cell], before: list[Cell] | None, step: Step, columns: int, cell_width: int
) -> RenderableType:
    dead = name in ("PVM memory", "unacked") and not step.alive["pvm"]
    lines = Text()
    for pfn, cell in enumerate(cells):
        if pfn and pfn % columns == 0:
            lines.append("\n")
        wrong = name == "SVM memory" and step.wrong[pfn] == "1"
        changed = before is not None and not dead and before[pfn].text != cell.text
        changed = changed and (bool(cell.n) or name != "flush set")  # a new flush set is not the old one's end
        note = "!" if wrong else ">" if step.focus[pfn] == "1" else "*" if changed else " "
        style = WRONG if wrong else cell.style
        if cell_width == 3:
            lines.append(f"{cell.text}{note}".ljust(3), style)
        elif cell_width == 2:
            lines.append(f"{cell.text[0]}!" if wrong else f"{cell.text:<2}", style + " underline" * (note == ">"))
        else:
            old = cell.style == PVM_OLD and cell.text[0] == "P"
            text = "!" if wrong else "p" if old else cell.text[0]
            lines.append(text, style + " underline" * (note == ">"))
    note = FLUSH_NOTES[step.flush_state] if name == "flush set" else ""
    count = sum(cell.n for cell in cells)
    sub = "dead" if dead else f"{count} {note}".strip()
    edge = "red" if dead else "bright_black"
    tight = cell_width == 1
    return Panel(
        lines, title=f"[bold]{SHORT[name] if tight else name}[/]", title_align="left",
        subtitle=sub.split()[0] if tight else sub, subtitle_align="right",
        border_style=edge, width=columns * cell_width + (2 if tight else 4), padding=(0, 0 if tight else 1),
    )  # fmt: skip


def _head(chapter: Chapter, number: int, *, short: bool = False, doing: bool = True) -> list[RenderableType]:
    step = chapter.steps[number]
    kind = Text(f"{KINDS[chapter.kind]}: ", style="red" if chapter.kind == "counter" else "bright_black")
    question = "" if short else f"  {chapter.question}"
    title = Text.assemble(kind, (chapter.title, "bold"), (question, "italic bright_black"))
    who = [text for text in (ACTORS[step.actor], explain(step.message), step.call) if text]
    lines: list[RenderableType] = [
        title,
        *([] if short else [Text("")]),
        Text.assemble((f"{number + 1}/{len(chapter.steps)}  ", "bright_black"), (step.title, "bold")),
        Text(step.text),
    ]
    if doing and who:
        lines.append(Text("   ".join(who), style="cyan"))
    return lines


def _foot(chapter: Chapter, number: int, *, short: bool = False) -> list[RenderableType]:
    step = chapter.steps[number]
    good = {"epoch": "✓", "mixed": "✗"}.get(step.verdict["kind"], "•")
    style = {"epoch": "bold green", "mixed": "bold red"}.get(step.verdict["kind"], "bold")
    status = step.status
    dead = "" if step.alive["svm"] else "  (the SVM's process is dead; its shared memory is still there)"
    lines: list[RenderableType] = [
        Text.assemble((f"{good} SVM memory: {step.verdict['sentence']}", style), (dead, "red")),
    ]
    names = {"pvm": "If the PVM died now", "svm": "If the SVM's process died now"}
    for side, name in names.items():
        if step.if_now[side]:
            lines.append(Text.assemble((f"  {name}: ", "bright_black"), step.if_now[side]))
    phase = str(status["phase"]).replace("_", " ")
    region = f"sealed {status['sealed']}, committed {status['committed']}, receiving {status['receiving']}"
    if not short:
        lines.append(Text(f"  control region: {phase}, {region}", style="bright_black"))
    if number == len(chapter.steps) - 1:
        lines += [*([] if short else [Text("")]), Text(f"⇒ {chapter.answer}", style="bold")]
    return lines
