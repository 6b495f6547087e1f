# SPDX-License-Identifier: Apache-2.0
"""The C tests (tests/c) run from pytest, as they are. CI runs them under the sanitizers as well."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "c" / "run.sh"


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="no C compiler")
def test_every_c_test_passes() -> None:
    done = subprocess.run([RUN, "plain"], capture_output=True, text=True, check=False, timeout=600)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, done.stdout + done.stderr
    assert last[0].endswith("passed, 0 failed"), done.stdout
    assert int(last[0].split()[0]) > 80, "tests have gone missing"
