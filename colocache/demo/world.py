# SPDX-License-Identifier: Apache-2.0
"""What the world saw of a demo's guest: the lines in which a reference guest tells what it did, each step once."""

from __future__ import annotations

import re

LINE = re.compile(rb"steps (\d+) to (\d+), salt [0-9a-f]{16}\n")


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
