# SPDX-License-Identifier: Apache-2.0
"""A process of the lesson's that is told what to do, one JSON line each, and answers each with a line.

It is killed with whoever started it, and can be killed for real at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from colocache.children import die_with_parent, python_command
from colocache.errors import ColocacheError
from colocache.teach.primary import WAIT_SECONDS


class ChildError(ColocacheError):
    """The child did not do what it was told."""


class SpokenProcess:
    """The parent's side; the child calls `module`.main(), which reads its orders from `orders`."""

    def __init__(self, module: str, fds: Sequence[int], first: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            python_command(module, "main"),
            start_new_session=True,  # Ctrl-C is the parent's, who ends the child
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds, text=True,
        )  # fmt: skip
        self.say({**first, "parent": os.getpid()})

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, line: dict[str, Any]) -> None:
        """Tell it, and do not wait."""
        assert self._process.stdin is not None  # noqa: S101 a pipe was asked for
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its answer. ChildError if it has none but an error, is dead, or does not answer in time."""
        if not select.select([self.answers], [], [], WAIT_SECONDS)[0]:
            raise ChildError(f"the lesson's child process did not answer for {WAIT_SECONDS:g} s")
        assert self._process.stdout is not None  # noqa: S101 a pipe was asked for
        line = self._process.stdout.readline()
        if not line:
            raise ChildError(f"the lesson's child process ended with {self._process.wait()} before it answered")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    @property
    def answers(self) -> int:
        """A descriptor that can be read when there is an answer."""
        assert self._process.stdout is not None  # noqa: S101 a pipe was asked for
        return self._process.stdout.fileno()

    def wait(self) -> int:
        """For its end: the number of the signal it died of."""
        return -self._process.wait(WAIT_SECONDS)

    def kill(self) -> int:
        """SIGKILL, and see it dead; the number of the signal it died of."""
        self._process.kill()
        return self.wait()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> SpokenProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- the child's side ----


def obey(serve: Callable[[dict[str, Any], Iterator[dict[str, Any]]], None]) -> None:
    """Let `serve` have the first line and then the orders, until they end."""
    with contextlib.suppress(KeyboardInterrupt):
        lines = (json.loads(line) for line in sys.stdin)
        if first := next(lines, None):
            die_with_parent(first["parent"])  # one that stands still would never see it go
            serve(first, lines)


def answer(line: dict[str, Any]) -> None:
    """To the parent."""
    print(json.dumps(line), flush=True)
