# SPDX-License-Identifier: Apache-2.0
"""Processes that this package starts of itself: how they begin, and that they end with whoever started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def python_command(module: str, function: str, *args: str) -> list[str]:
    """The argument list for subprocess: a new Python that calls module.function() with `args` as sys.argv[1:].

    It has this process's import path. `python -m` would put the current directory first, where a source tree that was
    never built may lie.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {function} as f; f()"
    return [sys.executable, "-c", code, *args]


def die_with_parent(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send `signum` to this process when its parent dies. `parent_pid`: who that must be."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before we asked
        os.kill(os.getpid(), signum)
