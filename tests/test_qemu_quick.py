# SPDX-License-Identifier: Apache-2.0
"""The monitor that a pause waits for: each answer is its command's, and nothing that comes makes it hang or grow."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from qemu_support import guest, image_file, needs_qemu

from colocache.vmm.qemu import quick as quick_module
from colocache.vmm.qemu.driver import HELD_SECONDS, driver
from colocache.vmm.qemu.errors import QemuDiedError, QemuError, QemuSlowError
from colocache.vmm.qemu.process import QemuProcess
from colocache.vmm.qemu.quick import Quick

GREETING = b'{"QMP": {"version": {}, "capabilities": ["oob"]}}\n'
READY = b'{"return": {}, "id": 1}\n'


@pytest.fixture
def process() -> Iterator[QemuProcess]:
    with image_file() as image:
        process = QemuProcess(guest(), image, shared=True)
        try:
            yield process
        finally:
            process.kill()


@needs_qemu
def test_answers_to_commands_given_at_once_are_each_their_own_and_in_order(process: QemuProcess) -> None:
    commands = ["query-version", "query-status", "query-kvm", "query-status", "query-chardev", "query-name"] * 5
    answers = process.quick.execute_all([(name, {}) for name in commands])
    assert [sorted(answer) if isinstance(answer, dict) else type(answer) for answer in answers] == [
        ["package", "qemu"],
        ["running", "singlestep", "status"] if "singlestep" in answers[1] else ["running", "status"],
        ["enabled", "present"],
        ["running", "singlestep", "status"] if "singlestep" in answers[1] else ["running", "status"],
        list,
        [],
    ] * 5


@needs_qemu
def test_a_refused_command_is_named_and_those_after_it_are_done(process: QemuProcess) -> None:
    with pytest.raises(QemuError, match=r"QEMU refused `nosuch`: .*has not been found"):
        process.quick.execute_all([("query-status", {}), ("nosuch", {}), ("cont", {})])
    assert process.status() == "running"


@needs_qemu
def test_when_it_changed_is_of_the_last_commands_only(process: QemuProcess) -> None:
    begin = time.monotonic_ns()
    process.quick.execute_all([("cont", {}), ("stop", {})])
    resumed, stopped = process.quick.when("RESUME"), process.quick.when("STOP")
    assert resumed is not None
    assert stopped is not None
    assert begin - 1_000_000 < resumed <= stopped < time.monotonic_ns()
    process.quick.execute_all([("query-status", {})])
    assert process.quick.when("RESUME") is None


# ---- a peer that no QEMU is -----------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


Ends = tuple[socket.socket, socket.socket]


def opened(ends: Ends, after: bytes = b"") -> Quick:
    ends[1].sendall(GREETING + READY + after)
    quick = Quick(ends[0], 1.0)
    assert json.loads(ends[1].recv(1000)) == {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}
    return quick


def test_one_that_can_only_read_a_command_at_a_time_is_not_asked_for_more(ends: Ends) -> None:
    ends[1].sendall(GREETING.replace(b'"oob"', b'"other"') + READY)
    Quick(ends[0], 1.0)
    assert json.loads(ends[1].recv(1000))["arguments"] == {"enable": []}


def test_answers_that_come_in_another_order_or_to_nobody_are_told_apart(ends: Ends) -> None:
    quick = opened(ends)
    ends[1].sendall(
        b'{"return": 9, "id": 1}\n{"return": 3, "id": 3}\n{"event": "X"}\n[1]\n{"id": "a"}\n{"return": 2, "id": 2}\n'
    )
    assert quick.execute_all([("a", {}), ("b", {})], timeout=1.0) == [2, 3]


@pytest.mark.parametrize(
    ("came", "error", "words"),
    [
        (b"no JSON\n", QemuError, "does not speak QMP: b'no JSON'"),
        (b"\xff\xfe\n", QemuError, "does not speak QMP"),
        (b'{"event": "X"}\n', QemuSlowError, "did not answer `a` within 0.2 s"),
        (b"", QemuSlowError, "did not answer `a` within 0.2 s"),
        (None, QemuDiedError, "QEMU ended: it did not answer `a`"),
    ],
)
def test_what_is_no_answer_is_an_error_in_time(
    ends: Ends, came: bytes | None, error: type[Exception], words: str
) -> None:
    quick = opened(ends)
    if came is None:
        ends[1].close()
    else:
        ends[1].sendall(came)
    with pytest.raises(error, match=words):
        quick.execute_all([("a", {})], timeout=0.2)


def test_a_line_without_an_end_is_not_kept(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_module, "LINE_BYTES_MAX", 100_000)
    quick = opened(ends)
    sending = threading.Thread(target=ends[1].sendall, args=(bytes(150_000),))
    sending.start()
    with pytest.raises(QemuError, match="sent more than 100000 bytes that are no answer"):
        quick.execute_all([("a", {})], timeout=5.0)
    sending.join()


# ---- the thread that is held meanwhile ------------------------------------------------------------------------------


def test_the_drivers_thread_is_held_until_it_is_let_go_or_asked_or_for_a_moment() -> None:
    ran = threading.Event()
    driver().hold()
    driver().soon(ran.set)
    assert not ran.wait(HELD_SECONDS / 5)
    driver().let_go()
    assert ran.wait(5.0)

    async def answer() -> int:
        return 7

    driver().hold()
    begin = time.monotonic()
    assert driver().call(answer(), "answer", 5.0) == 7
    assert time.monotonic() - begin < HELD_SECONDS, "whoever calls it does not wait for the hold to end"

    ran.clear()
    driver().hold()
    driver().soon(ran.set)
    assert ran.wait(5.0), "it goes on by itself"
