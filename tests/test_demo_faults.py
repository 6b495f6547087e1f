# SPDX-License-Identifier: Apache-2.0
"""The demo can fail: with a build whose flush set leaves out a bitmap it reports wrong pages and exits non-zero."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from c_tools import run, tool

from colocache.children import python_command

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--ram", "32M", "--working-set", "16M", "--checkpoints", "4", "--interval", "0.05", "--run-on", "0.1")


@pytest.fixture(scope="module")
def faulty_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcolocache.so.0 that has the faults of csrc/fault.h, for the loader to take first."""
    where = tmp_path_factory.mktemp("faults")
    sources = sorted((ROOT / "csrc").glob("*.c"))
    run(
        [
            tool("cc", "gcc", "clang"), "-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread",
            "-DCOLOCACHE_FAULTS", "-I", ROOT / "csrc" / "include", *sources, "-Wl,-soname,libcolocache.so.0",
            f"-Wl,--version-script={ROOT / 'csrc' / 'libcolocache.map'}", "-o", where / "libcolocache.so.0",
        ]
    )  # fmt: skip
    return where


def demo(**environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and stderr of a small demo."""
    done = subprocess.run(
        python_command("colocache.cli", "main", "demo", "--json", *SMALL),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.mark.parametrize("sources", ["pvm", "svm", "none"])
def test_demo_reports_wrong_pages_when_the_union_lacks_a_bitmap(faulty_library: Path, sources: str) -> None:
    status, report, errors = demo(LD_LIBRARY_PATH=str(faulty_library), COLOCACHE_FAULT_UNION=sources)
    assert report.get("wrong_pages", 0) > 0, errors
    assert status == 1


def test_demo_with_the_same_build_and_the_whole_union_is_right(faulty_library: Path) -> None:
    status, report, errors = demo(LD_LIBRARY_PATH=str(faulty_library))
    assert (status, report.get("wrong_pages")) == (0, 0), errors


def test_a_build_without_faults_refuses_to_be_asked_for_one() -> None:
    status, report, errors = demo(COLOCACHE_FAULT_UNION="pvm")
    assert status != 0
    assert report == {}
    assert "this build has no faults" in errors
