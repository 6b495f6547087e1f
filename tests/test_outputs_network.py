# SPDX-License-Identifier: Apache-2.0
"""A host dies, and nobody's connection breaks: a TCP client of a Linux guest, over the SIGKILL of its primary. Two TAP
devices are ports of a bridge, as those of two hosts would be, in a network namespace of the test's own."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import linux_guest
import pytest
from qemu_support import needs_qemu
from toy import Link

from colocache.children import python_command
from colocache.errors import ArgumentError
from colocache.outputs.tap import TapFront, tap_name
from colocache.replication.address import Address

CLIENT = Path(__file__).with_name("tcp_client.py")
COUNT = re.compile(rb"count (\d+)\r\n")
DIES_AT = 60  # this checkpoint, if the primary kills itself: long after its guest has booted
TALK_NS = 2 * 10**9  # the client talks before the kill


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[list[str]]:
    """Words before a command that runs it in a namespace with a bridge of 10.9.0.1 and two TAP devices, one and two."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        pytest.skip("it takes root, `ip` (apt install iproute2) and /dev/net/tun")
    name = f"colocache-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "bridge", "type", "bridge")
        ip("-n", name, "addr", "add", "10.9.0.1/24", "dev", "bridge")
        ip("-n", name, "link", "set", "bridge", "up")
        for tap in ("one", "two"):
            ip("-n", name, "tuntap", "add", "dev", tap, "mode", "tap")
            ip("-n", name, "link", "set", tap, "master", "bridge", "up")
        yield ["ip", "netns", "exec", name]
    finally:
        ip("netns", "del", name)


def side(network: list[str], role: str, *args: str) -> subprocess.Popen[str]:
    command = python_command("colocache.cli", "main", role, "--events", "--guest", "qemu", *args)
    return subprocess.Popen([*network, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(process: subprocess.Popen[str], event: str, after_ns: int = 0) -> int:
    """The time of the first such event after that time; CLOCK_MONOTONIC in ns."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if f'"event": "{event}"' in line and int(json.loads(line)["t"]) > after_ns:
            return int(json.loads(line)["t"])
    raise AssertionError(f"no {event}: {said[-5:]}")


@needs_qemu
@pytest.mark.parametrize("run", range(int(os.environ.get("COLOCACHE_LINUX_RUNS", "1"))))
@pytest.mark.parametrize("point", ["running", "receiving", "sealed", "random"])
def test_tcp_connection_survives_the_takeover(
    tmp_path: Path, network: list[str], region_name: str, point: str, run: int
) -> None:
    """No reply is wrong, missing or doubled, the connection is not reset, and the console counts on without a gap. By
    hand: COLOCACHE_LINUX_RUNS=10."""
    if not (linux_guest.folder() / "modules" / "virtio_net.ko").is_file():
        pytest.skip("the folder COLOCACHE_LINUX has no modules/virtio_net.ko")
    console, where = tmp_path / "console", f"unix:{tmp_path}/s"
    line = ("--console", str(console), "--", *linux_guest.command(tmp_path, init=linux_guest.SERVER))
    die = ["--die-at", point, "--die-at-checkpoint", str(DIES_AT)] if point in ("receiving", "sealed") else []
    secondary = side(
        network, "secondary", "--listen", where, "--name", region_name, "--net", "tap:two", "--run-on", "0",
        "--reconnect-limit", "0.2", *line,
    )  # fmt: skip
    primary = client = None
    try:
        until(secondary, "listening")
        primary = side(
            network,
            "primary",
            "--connect",
            where,
            "--net",
            "tap:one",
            "--interval",
            "0.2",
            "--verify",
            "none",
            *die,
            *line,
        )
        client = subprocess.Popen(
            [*network, sys.executable, CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"
        talks_since = time.monotonic_ns()
        if die:
            until(primary, "dying", talks_since + TALK_NS)
        else:
            until(primary, "checkpoint", talks_since + TALK_NS)
            if point == "random":
                time.sleep(random.Random(run).uniform(0, 0.5))
            primary.kill()
        until(secondary, "takeover")
        size = console.stat().st_size
        while console.stat().st_size < size + 1000:
            assert secondary.poll() is None
            time.sleep(0.05)
        out, _ = client.communicate("enough\n", timeout=90)
    finally:
        for one in (client, primary, secondary):
            if one is not None and one.poll() is None:
                one.terminate()
                one.wait(30)
            if one is not None and one.stdout is not None:
                one.stdout.close()
    told = json.loads(out)
    print(told)
    assert (told["wrong"], told["error"]) == (0, "")
    assert told["replies"] > 20
    counted = [int(n) for n in COUNT.findall(console.read_bytes())]
    assert counted == list(range(1, len(counted) + 1))


def sent(network: list[str], tap: str) -> int:
    """Packets that this side's world was shown."""
    read = ["cat", f"/sys/class/net/{tap}/statistics/rx_packets"]
    return int(subprocess.run([*network, *read], check=True, capture_output=True, text=True).stdout)


@needs_qemu
@pytest.mark.parametrize("never", ["primary", "secondary"])
def test_with_the_link_cut_and_both_alive_the_world_sees_one_machine(
    tmp_path: Path, network: list[str], region_name: str, never: str
) -> None:
    """The one whose arbiter says no sends nothing from the cut on, though it runs on for seconds, and the client's
    connection is the other's."""
    if not (linux_guest.folder() / "modules" / "virtio_net.ko").is_file():
        pytest.skip("the folder COLOCACHE_LINUX has no modules/virtio_net.ko")
    console = {role: tmp_path / role for role in ("primary", "secondary")}
    guest = linux_guest.command(tmp_path, init=linux_guest.SERVER)
    arbiter = {role: "never" if role == never else "solo" for role in console}
    limit = {role: "6" if role == never else "0.3" for role in console}
    link = None
    secondary = side(
        network, "secondary", "--listen", f"unix:{tmp_path}/s", "--name", region_name, "--net", "tap:two",
        "--run-on", "0", "--arbiter", arbiter["secondary"], "--reconnect-limit", limit["secondary"],
        "--console", str(console["secondary"]), "--", *guest,
    )  # fmt: skip
    primary = client = None
    try:
        until(secondary, "listening")
        link = Link(tmp_path, Address.parse(f"unix:{tmp_path}/s"))
        primary = side(
            network, "primary", "--connect", str(link.address), "--net", "tap:one", "--interval", "0.2", "--verify",
            "none", "--run-on", "0", "--arbiter", arbiter["primary"], "--reconnect-limit", limit["primary"],
            "--console", str(console["primary"]), "--", *guest,
        )  # fmt: skip
        client = subprocess.Popen(
            [*network, sys.executable, CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"
        until(primary, "checkpoint", time.monotonic_ns() + TALK_NS)
        link.close()
        if never == "primary":
            until(secondary, "takeover")
        else:
            until(primary, "alone")
        silent, other = ("one", "two") if never == "primary" else ("two", "one")
        before, others, told = sent(network, silent), sent(network, other), console[never].read_bytes()
        time.sleep(4)
        assert (sent(network, silent), console[never].read_bytes()) == (before, told)
        assert sent(network, other) > others + 20
        out, _ = client.communicate("enough\n", timeout=90)
    finally:
        if link is not None:
            link.close()
        for one in (client, primary, secondary):
            if one is not None and one.poll() is None:
                one.terminate()
                one.wait(30)
            if one is not None and one.stdout is not None:
                one.stdout.close()
    told_by_client = json.loads(out)
    assert (told_by_client["wrong"], told_by_client["error"]) == (0, "")


def test_what_is_no_device_is_one_sentence() -> None:
    for net in ("", "tap", "tap:", "tap:a name", "user", "tap:" + 16 * "x"):
        with pytest.raises(ArgumentError, match="give tap:NAME"):
            tap_name(net)
    if os.geteuid() == 0:
        with pytest.raises(ArgumentError, match="Invalid argument; as root, or first `ip tuntap add dev"):
            TapFront("lo")
