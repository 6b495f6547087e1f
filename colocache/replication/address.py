# SPDX-License-Identifier: Apache-2.0
"""Where the two sides meet: `HOST:PORT`, `[v6::address]:PORT` or `unix:PATH`, and the sockets made from it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from colocache.errors import ArgumentError, SystemCallError, reason_of

BACKLOG = 32  # a primary brings all its streams at once
UNIX_PATH_BYTES_MAX = 107  # sockaddr_un has room for 108 with the final zero


@dataclass(frozen=True)
class Address:
    """A meeting place. Port 0 lets the system choose one; `listen` tells which."""

    host: str  # "" for a Unix socket
    port: int
    path: str  # "" for TCP

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read what the user wrote; ArgumentError says what is wrong with it."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            n_bytes = len(os.fsencode(path))  # a path is bytes, whatever the terminal makes of them
            if not path or n_bytes > UNIX_PATH_BYTES_MAX or "\0" in path:
                raise ArgumentError(
                    f"the path in {_shown(text)} has {n_bytes} bytes, a Unix socket takes 1 to {UNIX_PATH_BYTES_MAX}"
                )
            return cls("", 0, path)
        host, colon, port = text.removeprefix("tcp:").rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            colon = ""
        if not colon or not host or not (port.isascii() and port.isdigit()) or int(port[:6]) > 65535:
            raise ArgumentError(f"{_shown(text)} is no address", hint="write HOST:PORT, [V6]:PORT or unix:PATH")
        try:
            host.encode("idna")  # what getaddrinfo would do with it; a v6 address and its zone pass
        except UnicodeError as error:
            raise ArgumentError(f"{_shown(text)} has no name of a host in it: {error}") from error
        if not host.isprintable() or " " in host:
            raise ArgumentError(f"{_shown(text)} has no name of a host in it")
        return cls(host, int(port[:6]), "")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self, timeout: float) -> socket.socket:
        """A connected socket, blocking. OSError if nobody answers within `timeout` seconds."""
        if self.path:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(timeout)
                made.connect(self.path)
            except BaseException:
                made.close()
                raise
        else:
            made = socket.create_connection((self.host, self.port), timeout=timeout)
        made.settimeout(None)
        return made

    def listen(self) -> tuple[socket.socket, Address]:
        """A listening socket and the address it got. SystemCallError if that is taken or not allowed."""
        try:
            if self.path:
                self._remove_stale()
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    made.bind(self.path)
                    Path(self.path).chmod(0o600)  # before anybody could connect
                    made.listen(BACKLOG)
                except BaseException:
                    made.close()
                    raise
                return made, self
            return self._listen_tcp()
        except OSError as error:
            raise SystemCallError(f"can't listen on {self}: {reason_of(error)}", errno=error.errno or 0) from error

    def _listen_tcp(self) -> tuple[socket.socket, Address]:
        """The first of the host's addresses that can be bound, whatever family it is of, with the zone it has."""
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        last: OSError | None = None
        for family, _, _, _, name in found:
            made = socket.socket(family, socket.SOCK_STREAM)
            try:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                made.bind(name)
                made.listen(BACKLOG)
            except OSError as error:
                made.close()
                last = error
                continue
            return made, Address(self.host, made.getsockname()[1], "")
        raise last or OSError(f"{self.host} has no address")

    def remove(self) -> None:
        """Remove the file of a Unix socket; the other kind leaves nothing behind."""
        if self.path:
            with contextlib.suppress(OSError):
                Path(self.path).unlink()

    def _remove_stale(self) -> None:
        """Remove the socket file of a listener that is gone; one that answers, or another kind of file, stays."""
        try:
            if not stat.S_ISSOCK(Path(self.path).lstat().st_mode):
                return
        except OSError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(self.path)
            except ConnectionRefusedError:
                self.remove()
            except OSError:
                return


def _shown(text: str) -> str:
    """For a sentence: short, on one line, and whatever bytes it was."""
    return repr(text[:200])
