# SPDX-License-Identifier: Apache-2.0
"""A table that fits the terminal cuts no number, whatever the width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from colocache.demo.table import DemoTable
from colocache.fitted_table import Column, print_fitted

COLUMNS = (
    Column("name", justify="left"),
    Column("first\nfigure", 1),
    Column("second"),
    Column("empty"),
    Column("x", 2),
)
ROWS = [["one", "1,234.56 ms", "[red]7[/]", "", "123456789"], ["two", "2", "88,888,888", "", "3"]]


def printed(width: int) -> list[str]:
    out = io.StringIO()
    print_fitted(Console(file=out, width=width), "title", COLUMNS, ROWS)
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("width", "there", "left_out"),
    [
        (100, ("1,234.56 ms", "88,888,888", "123456789"), ("empty",)),
        (41, ("1,234.56 ms", "88,888,888", "123456789"), ("empty",)),
        (35, ("1,234.56 ms", "88,888,888"), ("123456789",)),
        (20, ("88,888,888",), ("123456789", "1,234.56 ms")),
        (8, ("88,888,888",), ("123456789", "1,234.56 ms")),
    ],
)
def test_columns_go_by_their_rank_and_no_number_is_cut(
    width: int, there: tuple[str, ...], left_out: tuple[str, ...]
) -> None:
    text = "\n".join(printed(width))
    assert all(figure in text for figure in there)
    assert not any(figure in text for figure in left_out)
    assert "…" not in text
    assert max(len(line) for line in printed(width)) <= max(width, len("name  88,888,888") + 1)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_the_demos_table_cuts_no_number(width: int) -> None:
    out = io.StringIO()
    table = DemoTable(20, title="checkpoints")
    table._console = Console(file=out, width=width)
    table._rows = [
        {
            "epoch": 1000, "pvm_pages": 125_835, "svm_pages": 123_456, "both_pages": 11_234, "flushed_pages": 262_144,
            "bytes": 1073.7e6, "flush_gb_per_s": 20.4, "pause_ms": 1104.25, "stop_ms": 1120.5, "wrong_pages": 0,
            "verified_pages": 1,
        }
    ]  # fmt: skip
    table._primary_pause[1000] = 1321.75
    table._console.print(table._draw())
    text = out.getvalue()
    assert "…" not in text
    assert all(figure in text for figure in ("125,835", "123,456", "1104.25", "1321.75"))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
