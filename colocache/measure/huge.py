# SPDX-License-Identifier: Apache-2.0
"""Huge pages that a run borrows: reserved if it may, and given back at its end, whatever that end is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from colocache import backing as bk

NR_HUGEPAGES = bk.HUGE_SYSFS / "nr_hugepages"


def _write(path: Path, pages: int) -> bool:
    try:
        path.write_text(f"{pages}\n")
    except OSError:
        return False
    return True


def command_for(pages: int) -> str:
    """What root types to have that many pages free."""
    have = bk.huge_pages()
    return f"sysctl vm.nr_hugepages={have.total + max(0, pages - have.free)}"


@contextlib.contextmanager
def borrowed(pages: int, *, path: Path = NR_HUGEPAGES) -> Iterator[int]:
    """Have `pages` huge pages of 2 MiB free if that can be had; gives how many were added to the machine's.

    Others' reservations stay theirs: at the end the number is lowered by what was added, not set to what it was.
    """
    have = bk.huge_pages()
    added = 0
    try:
        if have.free < pages:
            try:
                before = int(path.read_text())
            except (OSError, ValueError):
                before = -1
            if before >= 0 and _write(path, before + pages - have.free):
                # The kernel gives what it finds; what it could not give need not be given back.
                added = max(0, int(path.read_text()) - before)
        yield added
    finally:
        if added:
            _write(path, max(0, int(path.read_text()) - added))
