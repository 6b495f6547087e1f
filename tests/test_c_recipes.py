# SPDX-License-Identifier: Apache-2.0
"""The recipes of csrc/RECIPES.md are programs: each is compiled against the installed library, and runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from c_tools import pkg_config, run, tool

PAGE = Path(__file__).resolve().parent.parent / "csrc" / "RECIPES.md"
STRICT = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]


def blocks() -> tuple[str, dict[str, str]]:
    """What all recipes begin with, and each recipe by its heading."""
    if not PAGE.is_file():
        return "", {"no source tree": ""}
    head, *rest = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    (common,) = re.findall(r"```c\n(.*?)```", head, re.DOTALL)
    found = {}
    for part in rest:
        (code,) = re.findall(r"```c\n(.*?)```", part, re.DOTALL)
        found[part.splitlines()[0]] = code
    return common, found


COMMON, RECIPES = blocks()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    if not COMMON:
        pytest.skip("these tests are not in a source tree")
    source, made = tmp_path / "recipe.c", tmp_path / "recipe"
    source.write_text(COMMON + RECIPES[recipe])
    run([tool("cc", "gcc"), *STRICT, source, *pkg_config("--cflags", "--libs"), "-pthread", "-o", made])
    done = subprocess.run([made], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.returncode} {done.stdout}{done.stderr}"
    assert not done.stderr
