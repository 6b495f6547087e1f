# SPDX-License-Identifier: Apache-2.0
"""What a demo makes of its guest's console: a report that is lost, said twice, bad or no more is never passed over."""

from __future__ import annotations

import pytest

from colocache.demo.world import guest_report


def console(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in lines).encode()


BEFORE = console("Linux version 6.1", "colocache: one ok 1", "colocache: two ok 1", "colocache: one ok 2 of many")


def test_a_console_without_reports_has_none() -> None:
    assert guest_report(console("READY", "he said: colocache: one ok 1", "colocache one ok 2"), 0) is None


def test_a_guest_that_goes_on_is_well() -> None:
    report = guest_report(BEFORE + console("colocache: two ok 2", "colocache: one ok 3"), len(BEFORE))
    assert report is not None
    assert (report.programs, report.ok, report.ok_after, report.wrong) == (2, 5, 2, "")


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (["colocache: two ok 2"], "1 of the guest's 2 programs did not report after the takeover"),
        ([], "2 of the guest's 2 programs"),
        (["colocache: two ok 2", "colocache: one ok 4"], "1 of the guest's reports are missing and 0 were said again"),
        (["colocache: two ok 2", "colocache: one ok 2"], "0 of the guest's reports are missing and 1 were said again"),
        (["colocache: two ok 2", "colocache: one bad file 7", "colocache: two bad x"], "2 things wrong in itself, the"),
    ],
)
def test_what_is_not_well_is_told(after: list[str], words: str) -> None:
    report = guest_report(BEFORE + console(*after), len(BEFORE))
    assert report is not None
    assert words in report.wrong


def test_a_guest_that_rebooted_begins_anew() -> None:
    report = guest_report(
        BEFORE + console("colocache: two ok 2", "colocache: one ok 1", "colocache: one ok 2"), len(BEFORE)
    )
    assert report is not None
    assert report.wrong == ""


def test_a_line_that_is_not_whole_or_no_text_is_no_crash() -> None:
    lines = b"colocache: one ok \xff\xfe\r\ncolocache: one ok 99999999999999999999999\ncolocache: o"
    assert guest_report(lines, 0) is None
    report = guest_report(b"colocache: one bad \xff\xfe\r\n", 0)
    assert report is not None
    assert "the first: one: " in report.wrong
