# SPDX-License-Identifier: Apache-2.0
"""What setup.py builds says nothing of the machine that built it, and fits the Python that will load it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from c_tools import run, tool

import colocache
from colocache import config_tool

PACKAGE = Path(colocache.__file__).parent

# The modules and wheel options of setup.py as a Python without a GIL would build them; nothing is compiled.
DESCRIBE = """
import distutils.core, json, sys, sysconfig
free_threaded, cffi = int(sys.argv[1]), sys.argv[2]
real = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: free_threaded if name == "Py_GIL_DISABLED" else real(name)
if cffi:
    from importlib import metadata
    installed = metadata.version
    metadata.version = lambda name: cffi if name == "cffi" else installed(name)
import setuptools
distribution = distutils.core.run_setup("setup.py", ["-q", "build_ext"], stop_after="commandline")
if cffi:
    command = distribution.get_command_obj("build_ext")
    command.ensure_finalized()
    command.run()
print(json.dumps({
    "modules": {ext.name: bool(ext.py_limited_api) for ext in distribution.ext_modules},
    "wheel": distribution.get_option_dict("bdist_wheel").get("py_limited_api", [None, None])[1],
}))
"""


def describe(source_tree: Path, free_threaded: int, cffi: str = "") -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools")
    command = [sys.executable, "-W", "ignore", "-c", DESCRIBE, str(free_threaded), cffi]
    return subprocess.run(command, cwd=source_tree, capture_output=True, text=True, timeout=120, check=False)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def libraries() -> list[Path]:
    found = [*PACKAGE.rglob("*.so"), config_tool.lib_dir() / "libcolocache.so.0"]
    return [path for path in found if path.read_bytes()[:4] == b"\x7fELF"]  # libcolocache.so is a linker script


def test_no_library_looks_where_it_was_built() -> None:
    """Some Pythons link each module with a run path to their own libraries."""
    found = {}
    for path in libraries():
        for line in run([tool("readelf"), "-d", path]).splitlines():
            if match := re.search(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", line):
                found[path.name.split(".")[0]] = match[1]
    assert found == {"_engine": "$ORIGIN/lib", "_baseline": "$ORIGIN/../lib"}


def test_libraries_hold_only_what_programs_link_to() -> None:
    if "-g" in os.environ.get("COLOCACHE_BUILD_CFLAGS", ""):
        pytest.skip("built with -g")
    assert len(libraries()) >= 2
    for path in libraries():
        sections = run([tool("readelf"), "-SW", path])
        assert ".symtab" not in sections, path
        assert ".debug" not in sections, path
    assert ".debug" not in run([tool("readelf"), "-SW", config_tool.lib_dir() / "libcolocache.a"])


def test_one_build_serves_every_python_but_a_free_threaded_one(source_tree: Path) -> None:
    usual, free = answer(describe(source_tree, 0)), answer(describe(source_tree, 1))
    assert usual["modules"].keys() == free["modules"].keys()
    assert "colocache._engine" in usual["modules"]
    assert all(usual["modules"].values())
    assert usual["wheel"] == "cp310"
    assert not any(free["modules"].values())
    assert free["wheel"] is None


def test_a_cffi_that_knows_no_free_threaded_python_is_named(source_tree: Path) -> None:
    done = describe(source_tree, 1, "1.17.1")
    assert done.returncode != 0
    assert "cffi 1.17.1 can't build for free-threaded Python: `pip install 'cffi>=2.0'`" in done.stderr.splitlines()[-1]
