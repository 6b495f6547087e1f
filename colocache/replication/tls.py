# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 under a channel: both sides show a certificate of one authority, which names the pair and the side.

The name is a URI in the certificate's subjectAltName: `colocache:PAIR/primary` or `colocache:PAIR/secondary`. A side
takes only the other side of its own pair.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import cast
from urllib.parse import quote

from colocache.errors import ArgumentError, PeerLostError, reason_of
from colocache.replication.errors import ProtocolError

WIRE_BYTES = 1 << 18  # moved in one call: small enough for the CPU's cache
OTHER = {"primary": "secondary", "secondary": "primary"}
HOW_TO = """\
An authority, once, and a certificate for each side of pair PAIR (OpenSSL 3); ca.key stays where certificates are made:

\b
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \\
      -subj /CN=colocache-ca -keyout ca.key -out ca.pem
  for side in primary secondary; do
    openssl req -x509 -CA ca.pem -CAkey ca.key -newkey ec -pkeyopt ec_paramgen_curve:P-256 \\
        -nodes -days 365 -subj /CN=$side -addext subjectAltName=URI:colocache:PAIR/$side \\
        -addext basicConstraints=CA:FALSE -keyout $side.key -out $side.pem
  done
"""


@dataclass(frozen=True)
class Certificates:
    """The three files of one side, in PEM."""

    cert: str
    key: str
    ca: str


def name_of_side(pair: str, role: str) -> str:
    """The URI that a certificate must carry."""
    return f"colocache:{quote(pair, safe='')}/{role}"


def context_of(files: Certificates, *, server_side: bool) -> ssl.SSLContext:
    """What one side shows and asks for. ArgumentError: a file can't be used, and why."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the name that counts is the pair's, see _check_name
    context.verify_mode = ssl.CERT_REQUIRED
    if server_side:
        context.num_tickets = 0
    for file in (files.cert, files.key, files.ca):
        try:
            with Path(file).open("rb"):
                pass
        except OSError as error:
            raise ArgumentError(f"{file} can't be read: {error.strerror or error}", hint="see --help") from error
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ArgumentError(
            f"{files.cert} and {files.key} are no certificate and its key: {_reason(error)}", hint="see --help"
        ) from error
    try:
        context.load_verify_locations(files.ca)
    except (ssl.SSLError, OSError) as error:
        raise ArgumentError(f"{files.ca} is no certificate of an authority: {_reason(error)}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")


def findings(files: Certificates, pair: str, role: str) -> list[str]:
    """What is wrong with the files of one side, in a sentence each; none: they can be used."""
    try:
        context = context_of(files, server_side=role == "secondary")
    except ArgumentError as error:
        return [str(error)]
    found = []
    try:
        own = ssl._ssl._test_decode_cert(files.cert)  # type: ignore[attr-defined]  # the only reader of names that ssl has
    except (ssl.SSLError, OSError, ValueError) as error:
        return [f"{files.cert} can't be read: {_reason(error)}"]
    wanted = name_of_side(pair, role)
    if wanted not in _uris(own):
        found.append(f"{files.cert} is for {', '.join(_uris(own)) or 'no side of any pair'}, not for {wanted}")
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(own["notAfter"]), timezone.utc)
    if ends < datetime.now(timezone.utc):
        found.append(f"{files.cert} ended on {ends:%Y-%m-%d}")
    elif not any(own["issuer"] == ca.get("subject") for ca in context.get_ca_certs()):
        found.append(f"{files.cert} was not issued by the authority in {files.ca}")
    if Path(files.key).stat().st_mode & 0o077:
        found.append(f"{files.key} can be read by others: chmod 600 {files.key}")
    return found


def side_of(files: Certificates, pair: str) -> str:
    """ "primary" or "secondary": whose certificate it is; "primary" if it is neither's."""
    try:
        own = ssl._ssl._test_decode_cert(files.cert)  # type: ignore[attr-defined]
    except (ssl.SSLError, OSError, ValueError):
        return "primary"
    return "secondary" if name_of_side(pair, "secondary") in _uris(own) else "primary"


def _uris(certificate: object) -> list[str]:
    names = certificate.get("subjectAltName", ()) if isinstance(certificate, dict) else ()
    return [value for kind, value in names if kind == "URI"]


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error)


class TlsTransport:
    """A Transport over TLS. As a server it shakes hands while it receives, without waiting; see transport.py.

    Encrypted bytes are moved here, many records at a time, and OpenSSL works in memory: on a socket of its own it makes
    three calls for each 16 KiB. So bytes may wait in memory that no poll tells of: who polls has read to None before.
    """

    plain_fd: int | None = None

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext, peer_name: str, *, server_side: bool, timeout: float
    ) -> None:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer_name = peer_name
        self._lock = threading.Lock()  # one SSL object is for one thread at a time
        self._came, self._goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._came, self._goes, server_side=server_side)
        self._socket = connection
        self._fd = connection.fileno()
        self._room = memoryview(bytearray(WIRE_BYTES))
        self._unsent = memoryview(b"")  # encrypted already
        self._taken = 0  # bytes of the caller's that are, or are behind, what is unsent
        self._met = False
        connection.setblocking(False)
        if not server_side:
            try:
                self._shake_hands_until(time.monotonic() + timeout)
            except BaseException:
                connection.close()
                raise

    def receive(self, room: memoryview) -> int | None:
        """See Transport."""
        with self._lock:
            if not self._met and not self._shake_hands():
                return None
            done = 0
            try:
                while done < len(room):
                    try:
                        n = cast(int, self._ssl.read(len(room) - done, room[done:]))  # with a buffer: how many
                    except ssl.SSLWantReadError:
                        if done or not self._fetch():
                            break
                        continue
                    if not n:
                        return done
                    done += n
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return done  # if some came, the next call finds the end again
            except ssl.SSLError as error:
                if "ALERT" in (error.reason or ""):
                    raise ProtocolError(f"the peer ended the TLS connection: {_reason(error)}") from error
                raise PeerLostError(f"the TLS connection broke while receiving: {_reason(error)}") from error
            return done or None

    def send(self, parts: list[memoryview]) -> int | None:
        """See Transport. What was begun must be given again until it is taken."""
        with self._lock:
            if not self._met:
                raise PeerLostError("the TLS handshake is not over")
            try:
                if not self._taken:
                    for part in parts:
                        self._encrypt(part[: WIRE_BYTES - self._taken])
                return self._taken_after_flush()
            except ssl.SSLError as error:
                raise PeerLostError(f"the connection broke while sending: {_reason(error)}") from error

    def _encrypt(self, part: memoryview) -> None:
        done = 0
        while done < len(part):  # a record at a time
            done += self._ssl.write(part[done:])
        self._taken += done

    def _taken_after_flush(self) -> int | None:
        if not self._flush():
            return None
        taken, self._taken = self._taken, 0
        return taken

    def _flush(self) -> bool:
        """What is encrypted goes out; False: the socket takes no more now."""
        while self._unsent or self._goes.pending:
            if not self._unsent:
                self._unsent = memoryview(self._goes.read())
            try:
                sent = self._socket.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                raise PeerLostError(f"the connection broke while sending: {reason_of(error)}") from error
            self._unsent = self._unsent[sent:]
        return True

    def _fetch(self) -> bool:
        """Encrypted bytes that have come, or the end of them; False: there are none."""
        try:
            n = self._socket.recv_into(self._room, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerLostError(f"the connection broke while receiving: {reason_of(error)}") from error
        if n:
            self._came.write(self._room[:n])
        else:
            self._came.write_eof()
        return True

    def _shake_hands_until(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while not self._shake_hands():
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise PeerLostError("the peer did not finish the TLS handshake in time")

    def _shake_hands(self) -> bool:
        """As far as what has come allows; False: more must come. Its few bytes fit into any socket's buffer."""
        while not self._met:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fetch():
                    return False
            except ssl.SSLEOFError as error:
                raise PeerLostError("the peer closed the connection in the TLS handshake") from error
            except ssl.SSLError as error:
                with contextlib.suppress(PeerLostError):
                    self._flush()  # the alert, which tells the peer
                raise ProtocolError(f"the TLS handshake failed: {_reason(error)}") from error
            else:
                self._flush()
                self._check_name()
        return True

    def _check_name(self) -> None:
        found = _uris(self._ssl.getpeercert())
        if self._peer_name not in found:
            raise ProtocolError(
                f"the peer's certificate is for {', '.join(found)[:300] or 'no side of any pair'}, not for "
                f"{self._peer_name}"
            )
        self._met = True

    def fileno(self) -> int:
        """See Transport."""
        return self._fd

    def shut_down(self, how: int) -> None:
        """See Transport."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)

    def close(self) -> None:
        """See Transport."""
        self._socket.close()
