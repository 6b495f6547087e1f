# SPDX-License-Identifier: Apache-2.0
"""A disk of ours under a path that one client, a QEMU of this process, may open once."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

from colocache.disks.nbd import Disk, Session

CONNECT_SECONDS = 30.0  # that the client has to come
PEER = struct.Struct("iII")  # process, user, group


class Export:
    """Serves `disk` at `path` from now until close(), in a thread of its own.

    The path lies in a folder of this user's alone, and is gone when the client has come; who comes must be process
    `pid`.
    """

    def __init__(self, disk: Disk, *, pid: int | None = None) -> None:
        self._disk = disk
        self._pid = pid
        self._client: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="colocache.disk-")  # 0700
        self.path = str(Path(self._folder.name) / "nbd")
        self.end = ""  # why the client's session is over
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(self.path)
            self._listener.listen(1)
            self._listener.setblocking(False)
            self._wake, self._woken = socket.socketpair()
        except BaseException:
            self._listener.close()
            self._folder.cleanup()
            raise
        self._thread = threading.Thread(target=self._run, name="colocache-disk", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client = self._accept()
        if client is not None:
            with client:
                self.end = Session(client, self._disk).serve()

    def _accept(self) -> socket.socket | None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        until = time.monotonic() + CONNECT_SECONDS
        try:
            while True:
                if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                    self.end = f"nobody came within {CONNECT_SECONDS:g} s"
                    return None
                if self._closed:
                    return None
                client, _ = self._listener.accept()
                peer, _, _ = PEER.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
                if self._pid in (None, peer):
                    break
                client.close()
        except OSError as error:
            self.end = f"nobody could come: {error}"
            return None
        finally:
            self._listener.close()
            with contextlib.suppress(OSError):
                Path(self.path).unlink()
        with self._lock:
            if self._closed:
                client.close()
                return None
            self._client = client
        return client

    def close(self) -> None:
        """Break the connection, and wait until the request under way is done. May be called twice."""
        with self._lock:
            self._closed = True
            client = self._client
        with contextlib.suppress(OSError):
            self._wake.send(b"x")
        if client is not None:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._wake.close()
        self._woken.close()
        self._folder.cleanup()
