# SPDX-License-Identifier: Apache-2.0
"""The demo's own client: what it counts, and that it talks to a guest over the kill, at its console and by TCP."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import linux_guest
import pytest
from qemu_support import needs_qemu, wait_until
from test_demo import demo, report_of

from colocache.demo import network
from colocache.demo.talk import Answers, ConsoleClient, TcpClient
from colocache.errors import ArgumentError, ColocacheError

MS = 10**6  # ns


def test_what_came_is_told_by_when_it_was_asked() -> None:
    answers = Answers(came=[(50 * MS, 20.0), (150 * MS, 40.0), (260 * MS, 100.0), (500 * MS, 230.0), (520 * MS, 10.0)])
    report = answers.report(in_step_ns=100 * MS, killed_ns=280 * MS, promoted_ns=400 * MS)
    assert (report["replies"], report["after_takeover"], report["longest_gap_ms"]) == (5, 2, 240.0)
    assert report["latency_ms"] == {"p50": 40.0, "p99": 100.0, "max": 100.0}  # the pair was in step
    assert report["latency_alone_ms"] == {"p50": 10.0, "p99": 10.0, "max": 10.0}
    answers.asked_ns = 390 * MS
    assert answers.report(0, 0, 400 * MS)["missing"] == 1
    assert answers.report(0, 0, 380 * MS)["missing"] == 0  # it has had no time yet


def test_an_answer_that_is_wrong_doubled_or_left_out_is_counted() -> None:
    client = ConsoleClient()
    try:
        for number, line, found in (
            (1, b">0 1", (0, 0)),
            (1, b">0 1", (0, 1)),  # told again
            (2, b"#7 12>1 2", (0, 1)),  # after half a line of what was told again
            (2, b">2 2", (1, 1)),  # heard twice
            (3, b">4 3", (2, 1)),  # one was left out
            (3, b">1 3", (3, 1)),  # another with this number
        ):
            client._number = number
            client.answers.asked_ns = client.answers.asked_ns or 1
            if line == b">2 2":
                client.answers.asked_ns = 0
            client._line(line)
            assert (client.answers.wrong, client.answers.told_again) == found, line
        client._line(b"\x1b[0ma line to show")
        assert list(client.lines()) == ["[0ma line to show"]
    finally:
        client._stack.close()


def test_a_tcp_connection_that_ends_is_an_error_and_a_wrong_answer_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, TcpClient(*server.getsockname()) as client:
        near, _ = server.accept()
        with near:
            assert near.recv(100) == b"1\n"
            near.sendall(b"anything 1\n")
            assert near.recv(100) == b"2\n"
            near.sendall(b"3\n")
            wait_until(lambda: client.answers.wrong == 1)
        wait_until(lambda: client.answers.error != "")
        assert len(client.answers.came) == 1


@needs_qemu
@pytest.mark.parametrize("point", ["running", "receiving", "sealed", "random"])
def test_a_client_at_the_console_has_each_answer_once_over_the_kill(point: str) -> None:
    args = ("--guest", "qemu", "--ram", "24M", "--checkpoints", "6", "--interval", "0.1", "--run-on", "2", "--json")
    report = report_of(demo(*args, "--kill-primary-at", point, timeout=120))
    told = report["client"]
    assert (told["over"], told["wrong"], told["missing"], told["error"]) == ("console", 0, 0, "")
    assert told["after_takeover"] > 10
    if point != "random":  # which may come before the pair was in step for long
        assert told["latency_ms"]["p50"] > told["latency_alone_ms"]["p50"], "what is held comes later"


@needs_qemu
def test_a_clients_connection_lives_on_in_a_network_of_the_demos_own(tmp_path: Path) -> None:
    try:
        network.check("10.9.0.1/24", "10.9.0.2:7777")
    except ColocacheError as error:
        pytest.skip(str(error))
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    if not (linux_guest.folder() / "modules" / "virtio_net.ko").is_file():
        pytest.skip("the folder COLOCACHE_LINUX has no modules/virtio_net.ko")
    line = linux_guest.command(tmp_path, init=linux_guest.SERVER)
    args = ("--guest", "qemu", "--net", "10.9.0.1/24", "--talk", "10.9.0.2:7777", "--checkpoints", "60")
    report = report_of(demo(*args, "--verify", "none", "--run-on", "4", "--json", "--", *line, timeout=240))
    told = report["client"]
    assert (told["over"], told["wrong"], told["missing"], told["error"]) == ("tcp", 0, 0, "")
    assert told["after_takeover"] > 10
    assert not list(Path("/sys/class/net").glob("colocache*"))


def test_a_network_that_can_not_be_is_one_sentence() -> None:
    for net, talk, why in (
        ("10.9.0.1", "10.8.0.2:7", "not in the network"),
        ("here", "", "as in 10.9.0.1/24"),
        ("10.9.0.1/24", "10.9.0.2", "ADDRESS:PORT"),
        ("10.9.0.1/24", "10.9.0.2:0", "ADDRESS:PORT"),
        ("10.9.0.1/24", "host:80", "ADDRESS:PORT"),
    ):
        with pytest.raises(ArgumentError, match=why):
            network.check(net, talk)
    done = demo("--guest", "process", "--talk", "10.9.0.2:7777")
    assert "--talk needs --net" in done.stderr
    done = demo("--guest", "process", "--net", "10.9.0.1/24")
    assert "--net is for --guest qemu" in done.stderr
