# SPDX-License-Identifier: Apache-2.0
"""What a process inherits from whoever started it, put in the state that the commands of this package rely on.

    signals       SIGCHLD ignored: the kernel would reap our children, and a killed one would look like a good end
                  blocked ones: a SIGTERM that is blocked would never be heard
    descriptors   0, 1 or 2 closed: the next socket or image would get the number, and what is printed would go there
    limits        few descriptors: two images per block need more
    encoding      a locale without UTF-8: a sentence with a character that it lacks would be a traceback

SIGINT and SIGHUP that are ignored stay so: that is how shells start what runs in the background, and nohup its command.
"""

from __future__ import annotations

import io
import os
import signal
import sys

from colocache import descriptors

DESCRIPTORS_WANTED = 1 << 16


def settle() -> None:
    """Call once, first thing in a process, while it has one thread."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _open_standard_descriptors()
    descriptors.raise_limit(DESCRIPTORS_WANTED)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_standard_descriptors() -> None:
    """A closed one is opened the wrong way round, so that reading or writing it fails as it would have, and is said."""
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            made = os.open(os.devnull, flags)  # the lowest free number: fd itself, as those below it are open now
            if made != fd:
                os.dup2(made, fd)
                os.close(made)
            os.set_inheritable(fd, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- a descriptor, for good
