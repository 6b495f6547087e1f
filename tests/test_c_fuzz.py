# SPDX-License-Identifier: Apache-2.0
"""The fuzzers of tests/fuzz on their seeds and on all inputs that once found something; CI lets them search as well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz" / "run.sh"


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="no C compiler")
def test_no_input_breaks_a_promise_again() -> None:
    done = subprocess.run([RUN, "replay"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(n) for name, n in re.findall(r"^(\w+): (\d+) inputs$", done.stdout, re.MULTILINE)}
    found = [path.name for path in (RUN.parent / "found").glob("*")]
    assert counts.keys() == {"wire", "region"}
    assert counts["wire"] > 10 + sum(name.startswith("wire-") for name in found)
    assert counts["region"] > 50 + sum(name.startswith("region-") for name in found)
