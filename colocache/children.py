# SPDX-License-Identifier: Apache-2.0
"""Processes that this package starts of itself: how they begin, and that they end with whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from colocache.errors import ColocacheError

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_SLICE_SECONDS = 0.01


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


def keep_to_cores(cores: str) -> None:
    """This process and all that it starts run on these cores, as in 0,1; the threads of its libraries too."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {int(core) for core in cores.split(",")})


def adopt_orphans() -> None:
    """From now on the children of a child that dies become this process's, and their death can be seen."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Processes whose parent is this one, those that ended and were not waited for included."""
    found = set()
    proc = Path("/proc")
    for entry in proc.iterdir() if proc.is_dir() else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                # The name in parentheses may hold anything; after its end come state and parent.
                if int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                    found.add(int(entry.name))
    return found


def see_dead(orphans: set[int], timeout: float) -> None:
    """Kill these children and wait until each has ended. ColocacheError if one does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    raise ColocacheError(f"process {pid}, which an earlier machine left, does not die")
                time.sleep(ORPHAN_SLICE_SECONDS)
