# SPDX-License-Identifier: Apache-2.0
"""`demo --memory-limit`: a pair under a limit, what it says of it, and limits that can't be kept."""

from __future__ import annotations

import pytest
from test_demo import GUESTS, SMALL, _guest_is_possible, demo, report_of  # noqa: F401 -- a fixture for every test


@pytest.mark.parametrize("guest", GUESTS)
def test_a_secondary_under_a_memory_limit_says_what_it_took_and_takes_over(guest: str) -> None:
    how = ("--guest", guest, "--backing", "shm", "--memory", "bounded", "--memory-limit", "8M", "--working-set", "4M")
    report = report_of(demo(*SMALL, *how, "--json"))
    assert report["wrong_pages"] == 0
    limit = report["memory_limit"]
    assert limit["bytes"] == 8 << 20
    assert 0 < limit["peak_bytes"] <= 8 << 20
    assert set(limit["pvm_stood_ms"]) == {"p50", "p99", "max"}
    words = demo(*SMALL, *how).stdout
    assert "memory beside the image: at most " in words


def test_a_memory_limit_that_cannot_be_kept_ends_the_demo_with_a_sentence() -> None:
    ran = demo(*SMALL, "--memory", "bounded", "--memory-limit", "4K")
    assert ran.returncode == 1
    assert "64 pages are the least to keep it in step: give at least " in ran.stderr
    ran = demo(*SMALL, "--memory", "mirror", "--memory-limit", "8M")
    assert ran.returncode == 1
    assert "only --memory bounded can keep one" in ran.stderr
