# SPDX-License-Identifier: Apache-2.0
"""A disk of ours for one client, which is given its end of a connection: nobody else can come, and nothing has a name
that could be left behind."""

from __future__ import annotations

import contextlib
import socket
import threading

from colocache.disks.nbd import Disk, Session

BUFFER_BYTES = 4 << 20  # for a client's requests on their way: one that is cut in parts wakes both sides for each


class Export:
    """Serves `disk` from now until close(), in a thread of its own, to whoever has `client`."""

    def __init__(self, disk: Disk) -> None:
        self.end = ""  # why the client's session is over
        self._ours, self.client = socket.socketpair()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)  # the kernel may take less of it
        self._session = Session(self._ours, disk)
        self._thread = threading.Thread(target=self._run, name="colocache-disk", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.end = self._session.serve()
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)

    def given(self) -> None:
        """The client has its end: ours of it would keep the connection open when that one is gone."""
        self.client.close()

    def close(self) -> None:
        """Break the connection, and wait until the request under way is done. May be called twice."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._ours.close()
        self.client.close()
