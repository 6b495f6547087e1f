# SPDX-License-Identifier: Apache-2.0
"""What `colocache doctor` says of the certificates of one side."""

from __future__ import annotations

from colocache.doctor import Finding
from colocache.replication.security import Security
from colocache.replication.tls import findings, side_of


def examine_certificates(pair: str, *, tls_cert: str, tls_key: str, tls_ca: str) -> list[Finding]:
    """One finding about the files, or none if none were given. ArgumentError: only some were."""
    files = Security(tls_cert, tls_key, tls_ca).certificates
    if files is None:
        return []
    role = side_of(files, pair)
    wrong = findings(files, pair, role)
    return [
        Finding(
            name="TLS",
            ok=not wrong,
            found="; ".join(wrong) or f"these are the certificates of the {role} of pair {pair}",
            needed_for="pairs over TCP",
            fix="colocache doctor --help tells how to make certificates" if wrong else "",
        )
    ]
