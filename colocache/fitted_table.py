# SPDX-License-Identifier: Apache-2.0
"""Tables that fit a terminal: a column that matters less is left out before any number is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2  # between columns


@dataclass(frozen=True)
class Column:
    """A heading (lines parted by newlines), and when it is left out: of the columns with `leave` the highest first."""

    heading: str
    leave: int = 0  # 0 = never
    justify: Literal["left", "right"] = "right"


def _width(text: str) -> int:
    return max((Text.from_markup(line).cell_len for line in text.split("\n")), default=0)


def _chosen(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> tuple[list[int], int]:
    """The indices of the columns that stay, and how wide the table then is. One without any text goes always."""
    stay = [at for at in range(len(columns)) if not rows or any(row[at] for row in rows)]
    needs = {at: max([_width(columns[at].heading), *(_width(row[at]) for row in rows)]) for at in stay}

    def whole() -> int:
        return sum(needs[at] for at in stay) + GAP * len(stay) - 1  # rich pads the last column too

    while whole() > width and any(columns[at].leave for at in stay):
        stay.remove(max(stay, key=lambda at: (columns[at].leave, at)))
    return stay, whole()


def fitted(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table of at most `width` columns of text, each row with a text (rich markup) per Column.

    Where even the columns that always stay need more, it is wider: a terminal breaks its lines, no number is cut.
    """
    stay, needed = _chosen(columns, rows, width)
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        width=needed if needed > width else None,
    )  # fmt: skip
    for at in stay:
        table.add_column(columns[at].heading, justify=columns[at].justify, no_wrap=True)
    for row in rows:
        table.add_row(*(row[at] for at in stay))
    return table


def print_fitted(console: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """The same, printed."""
    console.print(fitted(title, columns, rows, console.width), crop=False)
