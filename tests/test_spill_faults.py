# SPDX-License-Identifier: Apache-2.0
"""The spill file of bounded memory under what test_crash.py and test_failing_calls.py do to the other modes: a death at
every store, and each call into the system that fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "c" / "run_faults.sh"
CASES = 16  # of 256 pairs of bitmaps, those where the primary writes most; by hand all: `crash --memory spill`

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("spill-faults")
    done = subprocess.run([str(SCRIPT), "build", str(where)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


def told(*command: str | Path) -> dict[str, int]:
    """Its line of JSON, or the first breach."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_no_death_at_any_point_loses_a_spilled_page(programs: Path) -> None:
    """All staged pages but one go into the file."""
    total = told(programs / "crash", "--memory", "spill", "--cases", "15:16")
    assert total["cases"] == CASES
    assert total["kills"] == total["points"] > CASES * 100
    assert total["attach_kills"] > CASES * 4 * 10


def test_no_failing_call_breaks_the_promise_of_a_spill_file(programs: Path) -> None:
    total = told(programs / "fail", "spill")
    assert total["failures"] > 2000
