# SPDX-License-Identifier: Apache-2.0
"""What the C library calls back into Python: the check of a device state before its seal, and the log."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from colocache._handle import Handle
from colocache._native import ffi

Check = Callable[[memoryview], object]
LogSink = Callable[[int, str], object]  # level 0 debug, 1 info, 2 warning; a sentence


class Asked:
    """A check that C asks, and what it raised."""

    def __init__(self, handle: Handle, check: Check | None) -> None:
        self.handle, self.check = handle, check
        self.error: BaseException | None = None


def _outside(_kind: type[BaseException], error: BaseException, trace: TracebackType) -> None:
    """Ctrl-C in the few instructions of a callback that are not in its own try: seal still must raise it."""
    asked = trace.tb_frame.f_locals.get("asked") if trace is not None else None
    if isinstance(asked, Asked) and asked.error is None:
        asked.error = error


@ffi.def_extern(name="colocache_py_check", error=1, onerror=_outside)  # type: ignore[untyped-decorator]
def _py_check(context: Any, state: Any, len_bytes: int) -> int:
    asked: Asked = ffi.from_handle(context)
    try:
        if asked.check is not None:
            asked.check(asked.handle.memory(state, len_bytes, "device state").toreadonly())
    except BaseException as error:  # noqa: BLE001 an exception can't pass through C: seal raises it
        asked.error = error
        return 1
    return 0


@ffi.def_extern(name="colocache_py_log")  # type: ignore[untyped-decorator]
def _py_log(context: Any, level: int, sentence: Any) -> None:
    sink: LogSink = ffi.from_handle(context)
    sink(level, ffi.string(sentence).decode("utf-8", "replace"))
