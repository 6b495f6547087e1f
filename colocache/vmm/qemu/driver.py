# SPDX-License-Identifier: Apache-2.0
"""The one thread of this process that starts QEMUs, speaks with them and sees them die.

It lives as long as the process. A QEMU asks the kernel to be killed when the *thread* that started it ends, so a thread
that comes and goes must not start one.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from colocache.vmm.qemu.errors import QemuSlowError

T = TypeVar("T")
HELD_SECONDS = 0.05  # the thread stands for no longer, whatever is done meanwhile


class Driver:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._over: threading.Event | None = None  # of a hold
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="colocache-qemu", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T], what: str, timeout: float) -> T:
        """The result of `work`, run in the thread; QemuSlowError after `timeout` seconds."""
        self.let_go()
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout)
        except FutureTimeoutError:
            future.cancel()
            raise QemuSlowError(f"QEMU did not {what} within {timeout:g} s") from None

    def start(
        self, command: list[str], fds: list[int], environment: dict[str, str], errors: int
    ) -> subprocess.Popen[bytes]:
        """A new process with these descriptors; its standard error goes to the descriptor `errors`."""

        async def spawn() -> subprocess.Popen[bytes]:
            # In a session of its own: Ctrl-C reaches the pair's processes, which end it in order.
            return subprocess.Popen(  # noqa: ASYNC220 -- it has to be this thread
                command,
                pass_fds=fds,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )

        return self.call(spawn(), "start", 30.0)

    def soon(self, function: Callable[..., object], *args: Any) -> None:
        """Run function(*args) in the thread, some time soon."""
        self.loop.call_soon_threadsafe(function, *args)

    def hold(self) -> None:
        """The thread does nothing from now on: what it does in Python, another that is in a hurry waits for.

        Until let_go or the next call, and no longer than HELD_SECONDS.
        """
        self.let_go()
        held, over = threading.Event(), threading.Event()

        def stand() -> None:
            held.set()
            over.wait(HELD_SECONDS)

        self._over = over
        self.soon(stand)
        held.wait(HELD_SECONDS)

    def let_go(self) -> None:
        """It goes on. Any thread, and also if it was not held."""
        over, self._over = self._over, None
        if over is not None:
            over.set()


_driver: Driver | None = None
_making = threading.Lock()


def driver() -> Driver:
    """This process's; a fork makes its own."""
    global _driver  # noqa: PLW0603 -- one thread a process
    with _making:
        if _driver is None or _driver.pid != os.getpid():
            _driver = Driver()
        return _driver
