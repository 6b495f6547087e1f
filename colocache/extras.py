# SPDX-License-Identifier: Apache-2.0
"""The command that installs an extra of this package where the reader stands: in the clone, or anywhere else."""

from __future__ import annotations

import sys
from pathlib import Path


def install_command(extra: str) -> str:
    """As in `.venv/bin/pip install '.[qemu]'`, with this Python's own pip; outside a clone by the package's name."""
    here = Path.cwd()
    pip = Path(sys.executable).parent / "pip"  # of the virtual environment, which need not be active
    if pip.is_relative_to(here):
        pip = pip.relative_to(here)
    in_clone = (here / "pyproject.toml").is_file() and (here / "csrc" / "include" / "colocache.h").is_file()
    return f"`{pip} install '{'.' if in_clone else 'colocache'}[{extra}]'`"
