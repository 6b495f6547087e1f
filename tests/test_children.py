# SPDX-License-Identifier: Apache-2.0
"""Commands that start children of their own work in any directory, a clone that was never built included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from colocache.children import python_command


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory in which `import colocache` fails, as in a newcomer's clone, whose engine is not built."""
    (tmp_path / "colocache").mkdir()
    (tmp_path / "colocache" / "__init__.py").write_text('raise ImportError("this source tree was never built")\n')
    return tmp_path


@pytest.mark.parametrize(
    "args",
    [
        ("teach", "--chapter", "death-mid-flush"),
        ("record", "heat.png", "--ram", "16M", "--checkpoints", "2", "--guest", "process", "--backing", "shm"),
        ("demo", "--ram", "16M", "--checkpoints", "2", "--interval", "0.05", "--run-on", "0.1", "--guest", "process"),
    ],
    ids=lambda args: str(args[0]),
)
def test_a_command_works_in_a_clone_that_was_never_built(clone: Path, args: tuple[str, ...]) -> None:
    if args[0] == "record":
        pytest.importorskip("matplotlib")
    ran = subprocess.run(
        python_command("colocache.cli", "main", *args),
        cwd=clone, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_clone_of_these_tests_can_not_be_imported(clone: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "colocache", "--version"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "was never built" in ran.stderr
