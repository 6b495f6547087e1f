# SPDX-License-Identifier: Apache-2.0
"""Compiling and running C programs against the installed package."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from colocache import config_tool

WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
# What the guest program must be compiled with: its bytes run where no C library is.
GUEST_FLAGS = ["-fno-stack-protector", "-fno-jump-tables"]


def tool(*names: str) -> str:
    """The first of these programs that there is; skips if there is none."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"this machine has no {' or '.join(names)}")


def run(command: Sequence[str | os.PathLike[str]], **more: object) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **more,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    stdout: str = done.stdout
    return stdout


def config(*options: str) -> list[str]:
    """What colocache-config answers, as the arguments that a shell makes of it."""
    return shlex.split(run([sys.executable, "-m", "colocache.config_tool", *options]))


def pkg_config(*options: str, where: Path | None = None) -> list[str]:
    """What pkg-config says of the installed colocache.pc, or of the one in `where`, as arguments."""
    directory = where or config_tool.pkgconfig_dir()
    environment = {**os.environ, "PKG_CONFIG_PATH": str(directory)}
    return shlex.split(run([tool("pkg-config", "pkgconf"), *options, "colocache"], env=environment))


def build_vmm(root: Path, program: str, to: Path, *, source: Path | None = None) -> Path:
    """tests/c/PROGRAM.c (or `source` in its place) with the reference guest, linked by pkg-config; the executable."""
    c, guest = root / "tests" / "c", root / "colocache" / "vmm"
    made = to / program
    run([
        tool("cc", "gcc"), "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", *GUEST_FLAGS, "-I", guest, "-I", c,
        source or c / f"{program}.c", c / "vmm_guest.c", guest / "guest_program.c",
        *pkg_config("--cflags", "--libs"), "-pthread", "-o", made,
    ])  # fmt: skip
    return made
