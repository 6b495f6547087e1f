# SPDX-License-Identifier: Apache-2.0
"""QMP with deadlines: the asyncio client of the package qemu.qmp, for callers that wait."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from colocache.extras import install_command
from colocache.vmm.qemu.driver import driver
from colocache.vmm.qemu.errors import QemuDiedError, QemuError

try:
    from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError
except ImportError as error:
    raise QemuError(f"QEMU guests need the Python package qemu.qmp ({error})", hint=install_command("qemu")) from error

COMMAND_SECONDS = 10.0
Event = dict[str, Any]


class Qmp:
    """A conversation over a connected socket, which it owns. Commands may come from any thread, one at a time.

    on_event(event) is called for each event, in the thread of driver.py: it must not wait.
    """

    def __init__(self, connected: socket.socket, on_event: Callable[[Event], None], timeout: float) -> None:
        self._driver = driver()
        self._on_event = on_event
        self._client: QMPClient | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._connected = connected
        try:
            self._driver.call(self._open(connected), "greet", timeout)
        except (QMPError, OSError, EOFError) as error:
            self.close()
            raise QemuDiedError(f"QEMU does not speak QMP: {error}") from error
        except BaseException:
            self.close()
            raise

    async def _open(self, connected: socket.socket) -> None:
        self._client = QMPClient("colocache")
        connected.setblocking(False)
        await self._client.connect(connected)
        self._watcher = asyncio.get_running_loop().create_task(self._watch(self._client))

    async def _watch(self, client: QMPClient) -> None:
        async for event in client.events:
            self._on_event(dict(event))

    def execute(self, command: str, *, timeout: float = COMMAND_SECONDS, **arguments: Any) -> Any:
        """What `command` returns. QemuError if QEMU refuses it, QemuSlowError, QemuDiedError.

        In names of arguments `_` stands for `-`, as in live_migration for live-migration.
        """
        return self.execute_all([(command, arguments)], timeout=timeout)[0]

    def execute_all(self, commands: list[tuple[str, dict[str, Any]]], *, timeout: float = COMMAND_SECONDS) -> list[Any]:
        """What each of `commands` returns, given to QEMU at once and done by it in this order: one wait for all.

        A command that fails does not keep those after it from being done.
        """
        return self._driver.call(self._execute_all(commands), f"answer `{commands[0][0]}`", timeout)

    def give(self, fd: int, name: str) -> None:
        """QEMU gets a copy of this descriptor, which commands of its monitor call by `name`. Errors as of execute."""
        self._driver.call(self._give(fd, name), "take a descriptor", COMMAND_SECONDS)

    async def _give(self, fd: int, name: str) -> None:
        try:
            socket.send_fds(self._connected, [b" "], [fd])  # beside a blank, which means nothing
        except OSError as error:
            raise QemuDiedError(f"QEMU takes no descriptor: {error}") from error
        await self._execute_all([("getfd", {"fdname": name})])

    async def _execute_all(self, commands: list[tuple[str, dict[str, Any]]]) -> list[Any]:
        if self._client is None:
            raise QemuDiedError("the conversation with QEMU is over")
        calls = [
            self._client.execute(name, {k.replace("_", "-"): v for k, v in args.items()}) for name, args in commands
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for (name, _), answer in zip(commands, answers, strict=True):
            if isinstance(answer, ExecuteError):
                raise QemuError(f"QEMU refused `{name}`: {answer}") from answer
            if isinstance(answer, (ExecInterruptedError, StateError)):
                raise QemuDiedError(f"QEMU ended before it answered `{name}`") from answer
            if isinstance(answer, BaseException):
                raise answer
        return list(answers)

    def close(self) -> None:
        """End the conversation. May be called twice."""
        client, self._client = self._client, None
        watcher, self._watcher = self._watcher, None
        if client is None:
            return

        async def end() -> None:
            if watcher is not None:
                watcher.cancel()
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()

        self._driver.call(end(), "hang up", COMMAND_SECONDS)
