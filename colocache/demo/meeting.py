# SPDX-License-Identifier: Apache-2.0
"""Where the demo's two sides meet: a socket in a folder of its own, which goes with it (scratch.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from colocache import scratch
from colocache.replication.address import UNIX_PATH_BYTES_MAX

SOCKET = "pair"


@contextlib.contextmanager
def meeting_place(name: str, transport: str) -> Iterator[str]:
    """The address for the secondary to listen on; `name` is that of the demo's region."""
    if transport == "tcp":
        yield "127.0.0.1:0"
        return
    with scratch.folder(name) as folder:
        path = folder / SOCKET
        yield f"unix:{path}" if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX else "127.0.0.1:0"
