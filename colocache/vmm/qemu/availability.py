# SPDX-License-Identifier: Apache-2.0
"""Whether a QEMU can be driven on this machine. Imports nothing that may be missing."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess

from colocache.extras import install_command

PROGRAM = "qemu-system-x86_64"
OLDEST = (7, 2)
VERSION_SECONDS = 10.0


def version(program: str = PROGRAM) -> tuple[int, int, str] | None:
    """(major, minor, the whole) of an installed QEMU; None if it does not tell."""
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"version ((\d+)\.(\d+)\S*)", said)
    return (int(found.group(2)), int(found.group(3)), found.group(1)) if found else None


def trouble() -> tuple[str, str] | None:
    """What keeps a QEMU guest from running here and what helps, in a sentence each; None if nothing does."""
    if shutil.which(PROGRAM) is None:
        if platform.machine() != "x86_64":
            return f"there is no {PROGRAM}, and a pair of other QEMUs is not built yet", "use --guest process"
        return f"there is no {PROGRAM}", "`apt install qemu-system-x86`"
    if importlib.util.find_spec("qemu") is None or importlib.util.find_spec("qemu.qmp") is None:
        return "the Python package qemu.qmp is missing", install_command("qemu")
    found = version()
    if found is None:
        return f"{PROGRAM} does not tell its version", f"`{PROGRAM} --version` should"
    if found[:2] < OLDEST:
        return f"{PROGRAM} is of version {found[2]}", f"install {OLDEST[0]}.{OLDEST[1]} or newer"
    return None
