# SPDX-License-Identifier: Apache-2.0
"""A network of the demo's own: a namespace with a bridge, which is the demo's end, and a TAP device for each side.

The demo goes on inside it, so that it goes when its last process does, however that dies. Without root it is made in a
user namespace.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
from pathlib import Path

from colocache.children import python_command
from colocache.errors import ArgumentError, ColocacheError

INSIDE = "COLOCACHE_DEMO_NETWORK"  # in the environment: the demo is inside
BRIDGE = "colocache"
TAPS = {"primary": "colocache0", "secondary": "colocache1"}
TUN = Path("/dev/net/tun")


def server(talk: str) -> tuple[str, int]:
    """Host and port. ArgumentError."""
    host, _, port = talk.rpartition(":")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ArgumentError(f"--talk {talk}: give the guest's ADDRESS:PORT") from None
    if not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 1 << 16:
        raise ArgumentError(f"--talk {talk}: give the guest's ADDRESS:PORT")
    return host.strip("[]"), int(port)


def check(net: str, talk: str) -> None:
    """What can be told before anything is made. ArgumentError, ColocacheError."""
    try:
        ours = ipaddress.ip_interface(net)
    except ValueError as error:
        raise ArgumentError(f"--net {net}: give this end's address and its bits, as in 10.9.0.1/24") from error
    if talk and ipaddress.ip_address(server(talk)[0]) not in ours.network:
        raise ArgumentError(f"--talk {talk} is not in the network of --net {net}")
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            raise ColocacheError(f"--net needs `{program}`: apt install {package}")
    if not os.access(TUN, os.R_OK | os.W_OK):
        raise ColocacheError(f"--net needs {TUN}, which is missing or not yours: root may `chmod 666 {TUN}`")


def enter() -> None:
    """Go on in a namespace, as the same process from its beginning. ColocacheError: that is not allowed here."""
    if os.environ.pop(INSIDE, "") == str(os.getpid()):
        return
    how = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    tried = subprocess.run([*how, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise ColocacheError(
            f"no network of its own for the demo: {tried.stderr.strip() or how}",
            hint="run it as root, or let users make namespaces: sysctl user.max_user_namespaces",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[INSIDE] = str(os.getpid())  # it stays the same process
    os.execvp(how[0], [*how, "--", *python_command("colocache.cli", "main", *sys.argv[1:])])  # noqa: S606


def make(net: str) -> None:
    """The bridge with this address and the TAP devices, inside. ColocacheError."""
    _ip("link", "set", "lo", "up")
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("addr", "add", net, "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    for tap in TAPS.values():
        _ip("tuntap", "add", "dev", tap, "mode", "tap")
        _ip("link", "set", tap, "master", BRIDGE, "up")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ColocacheError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")
