# SPDX-License-Identifier: Apache-2.0
"""What the world saw of a demo's guest, on its console: each line of a reference guest once, and what a guest that
checks itself reports."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

LINE = re.compile(rb"steps (\d+) to (\d+), salt [0-9a-f]{16}\n")
# A guest that checks itself prints such lines: NAME, one for each of its programs; N counts the reports of that one.
REPORT = re.compile(rb"^colocache: (\w{1,64}) (?:ok (\d{1,18})(?!\d)|bad ([^\r\n]{0,200}))[^\r\n]*\r?$", re.MULTILINE)


def told_steps(console: bytes) -> dict[str, int]:
    """Lines of the console; steps that no line tells; steps that are told again, as those of an epoch that was lost."""
    missing = again = end = n_lines = 0
    for found in LINE.finditer(console):
        first, last = int(found[1]), int(found[2])
        missing += max(0, first - end)
        again += max(0, end - first)
        end = last
        n_lines += 1
    return {"lines": n_lines, "steps_missing": missing, "steps_again": again}


@dataclass
class GuestReport:
    """What a guest's programs say of themselves.

    Each counts its reports: a number that is left out, or comes again, was lost or said twice on the way. After a
    reboot they begin at 1.
    """

    programs: int = 0
    ok: int = 0
    ok_after: int = 0  # of them after the takeover
    silent: int = 0  # programs that reported before the takeover, and not after it
    bad: int = 0
    missing: int = 0
    again: int = 0
    first_bad: str = ""

    @property
    def wrong(self) -> str:
        """What is, in words; "": nothing."""
        if self.bad:
            return f"the guest found {self.bad} things wrong in itself, the first: {self.first_bad}"
        if self.missing or self.again:
            return f"{self.missing} of the guest's reports are missing and {self.again} were said again"
        if self.silent:
            return f"{self.silent} of the guest's {self.programs} programs did not report after the takeover"
        return ""

    def as_json(self) -> dict[str, Any]:
        """The field `guest_report` of `demo --json`."""
        return asdict(self)


def guest_report(console: bytes, takeover_at: int) -> GuestReport | None:
    """Of a console of which `takeover_at` bytes came before the takeover; None: it has no such lines."""
    report = GuestReport()
    newest: dict[bytes, int] = {}
    after: set[bytes] = set()
    for found in REPORT.finditer(console):
        name, number, bad = found.groups()
        before = newest.setdefault(name, 0)
        if found.start() >= takeover_at:
            after.add(name)
        if bad is not None:
            report.bad += 1
            report.first_bad = report.first_bad or f"{name.decode()}: {bad.decode(errors='replace')}"
            continue
        report.ok += 1
        report.ok_after += found.start() >= takeover_at
        n = newest[name] = int(number)
        if before and n != 1:
            report.missing += max(0, n - before - 1)
            report.again += n <= before
    report.programs, report.silent = len(newest), len(newest.keys() - after)
    return report if newest else None
