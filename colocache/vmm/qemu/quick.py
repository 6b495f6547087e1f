# SPDX-License-Identifier: Apache-2.0
"""The few commands that a pause waits for, over a QMP monitor of their own, by the thread that waits.

qemu.qmp costs two hops between threads and some asyncio for each answer: together with QEMU's own hops half of a pause
in which a guest with little to send stands. Everything else goes through it (qmp.py), events too: whoever hears one
there says so by forget_events(), since the same one waits here.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from colocache.vmm.qemu.errors import QemuDiedError, QemuError, QemuSlowError

COMMAND_SECONDS = 10.0
READ_BYTES = 1 << 16  # at a time
LINE_BYTES_MAX = 1 << 20  # of one answer
CHANGES = ("STOP", "RESUME")  # of a machine: events that come before the answer to the command that made them

Command = tuple[str, dict[str, Any]]


class Quick:
    """Owns the connected socket. Commands from one thread; forget_events() from any."""

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        self._socket = connected
        self._lock = threading.Lock()
        self._data = b""
        self._number = 0  # of the newest command: an answer that nobody waited for is told by it
        self._when: dict[str, int | None] = {}
        with self._lock:
            deadline = time.monotonic() + timeout
            while "QMP" not in (greeting := self._message(deadline, f"greet within {timeout:g} s")):
                pass
        # With `oob` QEMU reads a command while it does another. Else each goes from thread to thread when the one
        # before it was done, which a machine that stands waits for. What we send is done in order either way.
        able = [name for name in greeting["QMP"].get("capabilities", ()) if name == "oob"]
        self.execute_all([("qmp_capabilities", {"enable": able})], timeout=timeout)

    def execute_all(
        self, commands: list[Command], *, meanwhile: Callable[[], None] | None = None, timeout: float = COMMAND_SECONDS
    ) -> list[Any]:
        """What each of `commands` returns, given to QEMU at once and done by it in this order: one wait for all.

        `meanwhile` is called once the machine stands, while QEMU goes on with the commands after that; what it raises
        is raised when all have been answered. A command that fails does not keep those after it from being done.
        QemuError if QEMU refuses one, QemuSlowError, QemuDiedError.
        """
        what = f"answer `{commands[0][0]}` within {timeout:g} s"
        deadline = time.monotonic() + timeout
        with self._lock:
            self._when = {}
            first = self._number + 1
            self._number += len(commands)
            orders = [_order(name, arguments, number) for number, (name, arguments) in enumerate(commands, first)]
            try:
                self._socket.settimeout(timeout)
                self._socket.sendall("".join(orders).encode())
            except TimeoutError:
                raise QemuSlowError(f"QEMU did not {what}") from None
            except OSError as error:
                raise QemuDiedError(f"QEMU ended: it did not {what}") from error
            answers: dict[int, dict[str, Any]] = {}
            failed: QemuError | None = None
            while len(answers) < len(commands):
                message = self._message(deadline, what)
                if isinstance(message.get("id"), int) and message["id"] >= first:
                    answers[message["id"]] = message
                elif message.get("event") in CHANGES:
                    self._when[message["event"]] = _monotonic(message)
                    if meanwhile is not None and message["event"] == "STOP":
                        try:
                            meanwhile()
                        except QemuError as error:
                            failed = error
                        meanwhile = None
        for (name, _), number in zip(commands, sorted(answers), strict=True):
            refusal = answers[number].get("error")
            if refusal is not None:
                raise QemuError(f"QEMU refused `{name}`: {refusal.get('desc', refusal)}")
        if failed is not None:
            raise failed
        if meanwhile is not None:  # it stood before
            meanwhile()
        return [answers[number].get("return") for number in sorted(answers)]

    def when(self, change: str) -> int | None:
        """CLOCK_MONOTONIC when the last commands made it STOP or RESUME, as QEMU tells; None: they did not."""
        return self._when.get(change)

    def forget_events(self) -> None:
        """Take what has come while no command was under way, so that QEMU need not keep it."""
        if not self._lock.acquire(blocking=False):  # whoever waits for an answer takes them
            return
        try:
            self._socket.settimeout(0)
            self._data += self._socket.recv(READ_BYTES)
            self._data = self._data[self._data.rfind(b"\n") + 1 :]
        except OSError:  # nothing there, or closed
            return
        finally:
            self._lock.release()

    def _message(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._data:
            left = deadline - time.monotonic()
            if left <= 0:
                raise QemuSlowError(f"QEMU did not {what}")
            self._socket.settimeout(left)
            try:
                came = self._socket.recv(READ_BYTES)
            except TimeoutError:
                continue
            except OSError:
                came = b""
            if not came:
                raise QemuDiedError(f"QEMU ended: it did not {what}")
            self._data += came
            if len(self._data) > LINE_BYTES_MAX:
                raise QemuError(f"QEMU sent more than {LINE_BYTES_MAX} bytes that are no answer")
        line, _, self._data = self._data.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QemuError(f"QEMU does not speak QMP: {line[:80]!r}") from error
        return message if isinstance(message, dict) else {}


def _order(name: str, arguments: dict[str, Any], number: int) -> str:
    """As short as can be: QEMU reads a monitor byte by byte, with seven system calls for each."""
    what = {"execute": name, "arguments": arguments, "id": number}
    return json.dumps({key: value for key, value in what.items() if value != {}}, separators=(",", ":"))


def _monotonic(event: dict[str, Any]) -> int | None:
    """When it happened, on the clock that does not jump: between the two clocks, only now counts."""
    try:
        stamp = event["timestamp"]
        age = time.time_ns() - (int(stamp["seconds"]) * 10**9 + int(stamp["microseconds"]) * 1000)
    except (KeyError, TypeError, ValueError):
        return None
    return time.monotonic_ns() - max(0, age)
