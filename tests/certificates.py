# SPDX-License-Identifier: Apache-2.0
"""Certificates for a pair, made as its operator would."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from colocache.replication.tls import HOW_TO


def make_certificates(folder: Path, pair: str) -> None:
    """ca.pem, and primary.pem, primary.key and the secondary's, by the very commands that the help gives."""
    folder.mkdir()
    commands = re.sub(r"(?m)^An authority.*\n|^\x08\n", "", HOW_TO).replace("\b", "").replace("PAIR", pair)
    subprocess.run(["sh", "-e"], input=commands, text=True, cwd=folder, check=True, capture_output=True)
