# SPDX-License-Identifier: Apache-2.0
"""Death after every instruction of seal, flush, clear and attach: C programs step a child through and attach each time.

tests/test_crash.py kills at the crash points, which somebody has placed; here the processor decides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "c" / "run_faults.sh"
NO_PTRACE = 77
# Pairs of bitmaps, in two processes: few pages and many, by one machine, by both, by neither.
CASES = (("9", "255"), ("214", "0"))


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_no_death_after_any_instruction_loses_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = subprocess.run([SCRIPT, "build-stepped", tmp_path], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    running = [
        subprocess.Popen([tmp_path / "step", *cases], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for cases in CASES
    ]
    ends = [process.communicate() for process in running]
    if any(process.returncode == NO_PTRACE for process in running):
        pytest.skip(ends[0][1].strip())
    for process, (_, errors) in zip(running, ends, strict=True):
        assert process.returncode == 0, errors
    results = [json.loads(output) for output, _ in ends]
    total = {key: sum(result[key] for result in results) for key in results[0]}
    assert total["cases"] == 4
    assert total["attaches_stepped"] >= 4 * 4, "each row of attach's table, in each case"
    assert total["moments"] == total["recoveries"] > 4 * 500
    assert total["instructions"] > 100 * total["moments"]
    with capsys.disabled():
        print(
            f"\n{total['instructions']} instructions stepped, {total['attaches_stepped']} attaches among them; "
            f"{total['moments']} changed shared memory: {total['recoveries']} recoveries compared with the model"
        )
