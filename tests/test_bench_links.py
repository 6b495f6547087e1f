# SPDX-License-Identifier: Apache-2.0
"""bench/links.py tells how long a primary stands whose secondary is far away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "links.py"


def test_a_far_secondary_is_measured_beside_a_near_one() -> None:
    """With the least of everything. The delay is there: no epoch is sealed in less than a round trip."""
    if not SCRIPT.is_file():
        pytest.skip("these tests are not in a source tree")
    least = ["--ram", "64M", "--set", "1M", "--checkpoints", "3", "--rounds", "1", "--json", "--backing", "shm"]
    done = subprocess.run([sys.executable, SCRIPT, *least], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    links = ["loopback", "10ms"] if "1 Gbit/s is left out" in done.stderr else ["loopback", "1gbit", "10ms"]
    assert [(one["link"], one["way"]) for one in results] == [
        (link, way) for link in links for way in ("as it is", "no background")
    ]
    for one in results:
        if one["link"] == "10ms":
            assert one["pvm_pause_ms"]["p50"] >= 10
            assert one["pvm_stages_p50_ms"]["answer_ms"] >= 10
        if one["way"] == "no background":
            assert one["in_the_pause"] == one["pages"] > 0
