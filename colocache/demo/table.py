# SPDX-License-Identifier: Apache-2.0
"""The demo's live table. Drawn in the demo's own process, never in the one that runs a virtual machine: a thread that
holds the interpreter lock there would lengthen its pauses."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from colocache.fitted_table import Column, fitted

# Where the terminal is narrow, what can be told from the rest goes first.
COLUMNS = (
    Column("epoch"), Column("PVM\nonly"), Column("SVM\nonly"), Column("both", 4), Column("flushed", 2),
    Column("MB", 5), Column("flush\nGB/s", 3), Column("SVM\npause ms"), Column("SVM\nstop ms", 1),
    Column("PVM\npause ms"), Column("disk\nMB", 6), Column("wrong"),
)  # fmt: skip
CONSOLE_LINES = 4  # newest lines of the guest's console shown
ROWS = 12  # newest checkpoints shown
REFRESH_PER_SECOND = 8


class DemoTable:
    """Shows the events of a pair on a terminal; does nothing in a pipe. Context manager."""

    def __init__(self, wanted: int, *, title: str) -> None:
        self._console = Console(stderr=True)
        self._wanted = wanted
        self._title = title
        self._rows: list[dict[str, Any]] = []
        self._primary_pause: dict[int, float] = {}
        self._notes: list[str] = []
        self._console_lines: list[str] = []  # the newest of the guest's
        self._done = 0
        self._live: Live | None = None

    def __enter__(self) -> DemoTable:
        if self._console.is_terminal:
            self._live = Live(self._draw(), console=self._console, refresh_per_second=REFRESH_PER_SECOND)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._draw())
            self._live.__exit__(kind, error, trace)

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event of either side."""
        if self._live is None:
            return
        name, side = event["event"], event["side"]
        if name == "checkpoint" and side == "primary":
            self._primary_pause[event["epoch"]] = event["pause_ms"]
        elif name == "checkpoint":
            self._done = event["number"]
            self._rows = [*self._rows, event][-ROWS:]
        elif name == "console":
            self._console_lines = [*self._console_lines, event["sentence"]][-CONSOLE_LINES:]
        elif "sentence" in event and name not in ("start", "listening", "booted", "hello", "arbiter"):
            self._notes.append(f"{side}: {event['sentence']}")
        self._live.update(self._draw())

    def note(self, sentence: str) -> None:
        """Add a line of the demo's own."""
        self._notes.append(sentence)
        if self._live is not None:
            self._live.update(self._draw())

    def _cells(self, row: dict[str, Any]) -> list[str]:
        """The texts of one checkpoint, one per column."""
        pause = self._primary_pause.get(row["epoch"])
        return [
            str(row["epoch"]),
            f"{row['pvm_pages']:,}",
            f"{row['svm_pages']:,}",
            f"{row['both_pages']:,}",
            f"{row['flushed_pages']:,}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['flush_gb_per_s']:.1f}",
            f"{row['pause_ms']:.2f}",
            f"{row['stop_ms']:.2f}",
            "?" if pause is None else f"{pause:.2f}",  # not told yet
            f"{row['disk_bytes'] / 1e6:.1f}" if row.get("disk_writes") else "",
            (f"[red]{row['wrong_pages']}[/]" if row["wrong_pages"] else "0") if row["verified_pages"] else "–",
        ]

    def _draw(self) -> Table:
        frame = Table.grid(padding=(0, 0))
        table = fitted(self._title, COLUMNS, [self._cells(row) for row in self._rows], self._console.width)
        frame.add_row(table)
        frame.add_row(ProgressBar(total=max(1, self._wanted), completed=self._done, width=min(60, self._console.width)))
        for note in self._notes[-8:]:
            frame.add_row(note)
        for line in self._console_lines:
            frame.add_row(Text(f"│ {line}", style="dim"))
        return frame
