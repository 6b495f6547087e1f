# SPDX-License-Identifier: Apache-2.0
"""A database on the disk of a Linux guest, over the SIGKILL of its primary; many more deaths: disk_by_hand.py."""

from __future__ import annotations

from collections import Counter

import disk_by_hand
import pytest
from database_guest import read
from qemu_support import needs_qemu

LINES = (
    b"READY\r\nrow 1 20 AA\r\nrow 2 27 BB\r\nintegrity ok\r\nkept 20 AA\r\nkept 27 BB\r\nchecked 2\r\nrow 3 20 CC\r\n"
)


@needs_qemu
@pytest.mark.slow
def test_every_row_that_the_world_was_told_of_is_there_after_the_takeover() -> None:
    """And sqlite finds its database whole."""
    told = disk_by_hand.primary(3, 1, Counter())
    assert told.wrong == []
    assert told.told > 60


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (b"row 2", b"row 3", "change 3 was told where 2 must come"),
        (b"integrity ok", b"integrity row 3 missing from index", "says 'row 3 missing from index'"),
        (b"kept 20 AA", b"kept 20 A9", r"\[20\] are not as told"),
        (b"kept 27 BB\r\n", b"", r"\[27\] are not as told"),
        (b"kept 27", b"kept 28", r"\[27, 28\] are not as told"),
        (b"READY", b"Runtime error: database disk image is malformed", "on the console"),
    ],
)
def test_what_is_not_as_told_is_found(before: bytes, after: bytes, what: str) -> None:
    assert (read(LINES).told, read(LINES).checks, read(LINES).wrong) == (3, 1, [])
    assert len(read(LINES[:-8]).rows) == 2, "a line that is not whole was not told"
    with pytest.raises(AssertionError, match=what):
        assert not read(LINES.replace(before, after)).wrong, read(LINES.replace(before, after)).wrong
