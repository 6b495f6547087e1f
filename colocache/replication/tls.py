# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 under a channel: both sides show a certificate of one authority, which names the pair and the side.

The name is a URI in the certificate's subjectAltName: `colocache:PAIR/primary` or `colocache:PAIR/secondary`. A side
takes only the other side of its own pair.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

from colocache.errors import ArgumentError, PeerLostError
from colocache.replication.errors import ProtocolError

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
    """A Transport over TLS. As a server it shakes hands while it receives, without waiting; see transport.py."""

    plain_fd: int | None = None

    def __init__(
        self, connection: socket.socket, context: ssl.SSLContext, peer_name: str, *, server_side: bool, timeout: float
    ) -> None:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer_name = peer_name
        self._lock = threading.Lock()  # one SSL object is for one thread at a time
        connection.settimeout(timeout)
        self._ssl = context.wrap_socket(
            connection, server_side=server_side, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        self._fd = self._ssl.fileno()
        self._met = False
        try:
            if not server_side:
                self._shake_hands()
            self._ssl.setblocking(False)
        except BaseException:
            self._ssl.close()
            raise

    def receive(self, room: memoryview) -> int | None:
        """See Transport."""
        with self._lock:
            try:
                if not self._met:
                    self._shake_hands()
                return self._ssl.recv_into(room)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return None
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return 0
            except ssl.SSLError as error:
                if "ALERT" in (error.reason or ""):
                    raise ProtocolError(f"the peer ended the TLS connection: {_reason(error)}") from error
                raise PeerLostError(f"the TLS connection broke while receiving: {_reason(error)}") from error
            except OSError as error:
                raise PeerLostError(f"the connection broke while receiving: {error.strerror or error}") from error

    def send(self, parts: list[memoryview]) -> int | None:
        """See Transport. What was begun must be given again until it is taken."""
        with self._lock:
            if not self._met:
                raise PeerLostError("the TLS handshake is not over")
            try:
                return self._ssl.send(parts[0])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return None
            except OSError as error:  # SSLError is one
                raise PeerLostError(f"the connection broke while sending: {_reason(error)}") from error

    def _shake_hands(self) -> None:
        try:
            self._ssl.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLEOFError as error:
            raise PeerLostError("the peer closed the connection in the TLS handshake") from error
        except ssl.SSLError as error:
            raise ProtocolError(f"the TLS handshake failed: {_reason(error)}") from error
        except OSError as error:
            raise PeerLostError(f"the connection broke in the TLS handshake: {error.strerror or error}") from error
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
            socket.socket.shutdown(self._ssl, how)  # SSLSocket's own would go on in plain text

    def close(self) -> None:
        """See Transport."""
        self._ssl.close()
