# SPDX-License-Identifier: Apache-2.0
"""bench/bounded.py tells what bounded memory costs beside the mirror, by the kernel's own figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "bounded.py"


def test_bounded_memory_is_measured_beside_the_mirror() -> None:
    """With the least of everything. A second image is seen, and a small share brings checkpoints forward."""
    if not SCRIPT.is_file():
        pytest.skip("these tests are not in a source tree")
    least = ["--ram", "64M", "--workload", "compile", "--rounds", "1", "--share", "8", "--json"]
    least += ["--working-set", "8M", "--spill-epoch", "8M"]
    done = subprocess.run([sys.executable, SCRIPT, *least], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    if "traces are left out" in done.stderr:
        assert told["memory"] == []
    else:
        mirror, bounded = told["memory"]
        assert (mirror["mode"], bounded["mode"]) == ("mirror", "bounded")
        assert mirror["extra_bytes"] > 64 << 20
        assert bounded["extra_bytes"] < 32 << 20
        assert bounded["brought_forward"] > 0
        assert mirror["brought_forward"] == 0
    if "speed is left out" not in done.stderr:
        assert [one["mode"] for one in told["speed"]] == ["mirror", "bounded"]
        assert {one["working_set_bytes"] for one in told["speed"]} == {8 << 20}
        assert all(one["steps_per_second"] > 0 for one in told["speed"])
    if "spilling is left out" not in done.stderr:
        assert [one["spilled_bytes"] >> 20 for one in told["spill"]] == [0, 7]
