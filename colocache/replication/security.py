# SPDX-License-Identifier: Apache-2.0
"""Who may be at the other end of a connection, and whether anybody may read along.

A Unix socket is this user's: its file is 0600 and the peer's user is looked at. TCP is TLS, or plain on loopback, or
plain because the operator said `--insecure`. A new transport is a line in `make_wrap`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from colocache.errors import ArgumentError, PeerLostError
from colocache.replication.errors import RefusedError
from colocache.replication.tls import OTHER, Certificates, TlsTransport, context_of, name_of_side
from colocache.replication.transport import PlainTransport, Transport, Wrap

HINT = "give --tls-cert, --tls-key and --tls-ca (--help tells how they are made), or --insecure"


@dataclass(frozen=True)
class Security:
    """What the operator gave: all three files, or none; `insecure`: plain TCP is fine, whoever reads along."""

    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    insecure: bool = False

    def __post_init__(self) -> None:
        given = [bool(file) for file in (self.tls_cert, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ArgumentError("TLS needs all three of --tls-cert, --tls-key and --tls-ca")
        if all(given) and self.insecure:
            raise ArgumentError("--insecure makes no sense with certificates: leave one of them out")

    @property
    def certificates(self) -> Certificates | None:
        """The files, if TLS is wanted."""
        return Certificates(self.tls_cert, self.tls_key, self.tls_ca) if self.tls_cert else None


def make_wrap(security: Security, *, pair: str, role: str, timeout: float) -> Wrap:
    """What turns a connected socket of the `role` of `pair` into a transport. ArgumentError: the files can't be used.

    The wrap raises RefusedError for a peer that may not be talked to; `timeout`: seconds for a client's handshake.
    """
    files = security.certificates
    if files is None:
        return Plain(security.insecure)
    server_side = role == "secondary"
    context = context_of(files, server_side=server_side)
    name = name_of_side(pair, OTHER[role])

    def wrap(connection: socket.socket) -> Transport:
        with _closed_on_error(connection):
            check_user(connection)
            return TlsTransport(connection, context, name, server_side=server_side, timeout=timeout)

    return wrap


class Plain:
    """Plain sockets: this user's Unix sockets and loopback, and any other TCP only if `insecure`."""

    def __init__(self, insecure: bool = False) -> None:
        self._insecure = insecure

    def __call__(self, connection: socket.socket) -> Transport:
        with _closed_on_error(connection):
            check_user(connection)
            if not self._insecure:
                check_plain(connection.family, connection.getpeername())
            return PlainTransport(connection)


@contextlib.contextmanager
def _closed_on_error(connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        connection.close()
        raise PeerLostError(f"the connection broke at once: {error.strerror or error}") from error
    except BaseException:
        connection.close()
        raise


def check_plain(family: int, name: object) -> None:
    """RefusedError if plain TCP with this address, as the socket module tells it, leaves this machine."""
    if family in (socket.AF_INET, socket.AF_INET6) and isinstance(name, tuple) and not is_loopback(str(name[0])):
        raise RefusedError(f"plain TCP with {name[0]} would show guest memory to whoever reads along", hint=HINT)


def is_loopback(host: str) -> bool:
    """Does this numeric address stay on this machine?"""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def check_user(connection: socket.socket) -> None:
    """RefusedError if the peer of a Unix socket is a process of another user; root may."""
    if connection.family != socket.AF_UNIX:
        return
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (0, os.geteuid()):
        raise RefusedError(f"the peer is process {pid} of user {uid}, this is user {os.geteuid()}")
