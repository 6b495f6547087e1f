# SPDX-License-Identifier: Apache-2.0
"""The console on a Unix socket: one client at a time sees what is new, and types."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
from pathlib import Path

from colocache.errors import ArgumentError
from colocache.outputs.front import NoFront
from colocache.outputs.piece import CONSOLE
from colocache.outputs.typed import TypedInput

UNREAD_BYTES_MAX = 1 << 20  # kept for a client that does not read, or that is not there
PATH_BYTES_MAX = 100  # sockaddr_un has 108 with the final zero, and while it is made a name is longer
TYPED_BYTES = 4096  # at a time
ROOM_SECONDS = 0.02  # between two looks whether there is room for what a client types

DROPPED = "\r\n[colocache: %d bytes of the console are gone: nobody read them]\r\n"
TAKEN = b"[colocache: somebody else is at this console]\r\n"


class UnixFront(NoFront):
    """The socket is there, with mode 0600, while this side is the one that the world sees.

    The guest waits for no client: what nobody has read yet is kept up to a bound, the oldest goes first, and the client
    is told how much is gone. What a client types stays in its socket until it is on its way.

    `takes_over`: in place of a primary, whose socket may still be there; else one that answers there is left alone.
    """

    def __init__(self, path: str, *, takes_over: bool = False) -> None:
        self._path = path
        self._takes_over = takes_over
        n_bytes = len(os.fsencode(path))
        if not path or n_bytes > PATH_BYTES_MAX or "\0" in path:
            raise ArgumentError(f"--console unix:{path}: the path has {n_bytes} bytes, give 1 to {PATH_BYTES_MAX}")
        self._refuse_what_is_no_socket()
        if not os.access(Path(path).parent, os.W_OK | os.X_OK):
            raise ArgumentError(f"--console unix:{path}: {Path(path).parent} is no folder that can be written")
        self._lock = threading.Lock()
        self._unread = bytearray()
        self._n_dropped = 0
        self._client: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._file: tuple[int, int] | None = None  # of the socket's name: device and number
        self._knows = False  # whether the guest hears
        self._typed: TypedInput | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._thread: threading.Thread | None = None

    def _refuse_what_is_no_socket(self) -> None:
        try:
            mode = Path(self._path).lstat().st_mode
        except OSError:
            return
        if not stat.S_ISSOCK(mode):
            raise ArgumentError(f"--console unix:{self._path}: something that is no socket has this name")

    def _refuse_a_listener(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(self._path)
            except OSError:
                return
        raise ArgumentError(f"--console unix:{self._path}: another process listens there")

    # ---- the front ----

    def show(self) -> None:
        """See Front. ArgumentError."""
        if self._thread is not None:
            return
        self._refuse_what_is_no_socket()
        if not self._takes_over:
            self._refuse_a_listener()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new = f"{self._path}.{os.getpid() % 1000000}"
        try:
            listener.bind(new)
            Path(new).chmod(0o600)  # before anybody could connect
            listener.listen(4)
            found = Path(new).stat()
            Path(new).rename(self._path)  # in place of one that nobody serves any more, in one step
        except OSError as error:
            listener.close()
            with contextlib.suppress(OSError):
                Path(new).unlink()
            raise ArgumentError(f"--console unix:{self._path}: {error.strerror or error}") from error
        self._file = found.st_dev, found.st_ino
        listener.setblocking(False)
        self._listener = listener
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="colocache-console", daemon=True)
        self._thread.start()

    def hear(self, typed: TypedInput | None) -> None:
        """See Front."""
        self._typed, self._knows = typed, True
        self._wake_up()

    def emit(self, channel: int, data: bytes) -> None:
        """See Front."""
        if channel != CONSOLE:
            return
        with self._lock:
            self._unread += data
            surplus = len(self._unread) - UNREAD_BYTES_MAX
            if surplus > 0:
                del self._unread[:surplus]
                self._n_dropped += surplus
            self._send()
            left = bool(self._unread)
        if left:
            self._wake_up()

    def close(self) -> None:
        """See Front."""
        self._closing = True
        self._wake_up()
        if self._thread is not None:
            self._thread.join()
        for one in (self._client, self._listener):
            if one is not None:
                one.close()
        with contextlib.suppress(OSError):
            found = Path(self._path).lstat()
            if (found.st_dev, found.st_ino) == self._file:  # not that of whoever took over
                Path(self._path).unlink()
        os.close(self._wake)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    # ---- clients ----

    def _send(self) -> None:
        """To the client, as much as it takes. Under the lock."""
        if self._client is None:
            return
        if self._n_dropped:
            self._unread[:0] = (DROPPED % self._n_dropped).encode()
            self._n_dropped = 0
        try:
            while self._unread:
                del self._unread[: self._client.send(self._unread)]
        except BlockingIOError:
            pass
        except OSError:  # it is gone: its thread sees that too
            pass

    def _serve(self, listener: socket.socket) -> None:
        reads = False  # whether the client may still type
        while not self._closing:
            room = self._room()
            with self._lock:
                client, left = self._client, bool(self._unread)
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(listener, select.POLLIN)
            waits = client is not None and reads and not room  # what it typed stays in its socket, also if it has gone
            if client is not None and not waits:
                wanted = (select.POLLIN if reads else 0) | (select.POLLOUT if left else 0)
                poll.register(client, wanted)  # its end is told in any case
            ready = dict(poll.poll(ROOM_SECONDS * 1000 if waits else None))
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if client is not None:
                events = ready.get(client.fileno(), 0)
                if events & select.POLLOUT or waits:
                    with self._lock:
                        self._send()
                if events & select.POLLIN:
                    reads = self._take(client, room)
                elif events & (select.POLLHUP | select.POLLERR):
                    self._let_go()
            if listener.fileno() in ready and self._welcome(listener):
                reads = True

    def _room(self) -> int:
        if not self._knows:
            return 0
        return TYPED_BYTES if self._typed is None else min(TYPED_BYTES, self._typed.room)

    def _take(self, client: socket.socket, room: int) -> bool:
        """What the client typed; it leaves its socket when it is on its way. False: it types nothing more."""
        try:
            data = client.recv(room, socket.MSG_PEEK)
            if data and self._typed is not None:
                self._typed.put(data)
            if data:
                client.recv(len(data))
        except BlockingIOError:
            return True
        except OSError:
            self._let_go()
            return False
        return bool(data)

    def _welcome(self, listener: socket.socket) -> bool:
        """A client has come. True: it is the one."""
        try:
            client, _ = listener.accept()
        except OSError:
            return False
        client.setblocking(False)
        if self._client is not None and _has_gone(self._client):
            self._let_go()  # what it typed last was waiting for room, and makes room for who is here
        if self._client is not None:
            with contextlib.suppress(OSError):
                client.send(TAKEN)
            client.close()
            return False
        with self._lock:
            self._client = client
            self._send()
        return True

    def _let_go(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _has_gone(client: socket.socket) -> bool:
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(0))
