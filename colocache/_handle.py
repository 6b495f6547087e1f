# SPDX-License-Identifier: Apache-2.0
"""A pointer of the C library in Python's hands: closed once, never used after it, views of its memory counted."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from colocache._native import check, ffi
from colocache.errors import ClosedError, OrderError


class Handle:
    """Guards one C object. `with handle as pointer:` around each call; close waits for none and refuses if one runs.

    It belongs to the process that made it: after a fork the child's uses raise ClosedError, its close does nothing.
    """

    def __init__(self, what: str, pointer: Any, close: Callable[[Any], int]) -> None:
        self.what = what
        self._pointer = pointer
        self._close = close
        self._pid = os.getpid()
        # Reentrant: the end of a view may close the handle from inside any allocation, one under this lock included.
        self._lock = threading.RLock()
        self._running = 0
        self._views: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Any:
        with self._lock:
            self._running += 1  # first: from here on nothing closes it
            if self._pointer is not None and os.getpid() == self._pid:
                return self._pointer
            self._running -= 1
        if self._pointer is None:
            raise ClosedError(f"the {self.what} is closed")
        raise ClosedError(f"the {self.what} belongs to process {self._pid}, from which this one was forked")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1

    def __del__(self) -> None:
        # Views don't keep their handle alive: memory under them stays mapped rather than vanish.
        if getattr(self, "_pointer", None) is not None and os.getpid() == self._pid:
            if not self._views:
                self.close()
            warnings.warn(f"a {self.what} was never closed", ResourceWarning, stacklevel=2)

    @property
    def closed(self) -> bool:
        return self._pointer is None

    def close(self) -> None:
        """Free the C object, once. BufferError while views are alive, OrderError while another thread is in a call."""
        if self._pointer is None or os.getpid() != self._pid:
            return
        if self._views:
            gc.collect()
        with self._lock:
            if self._pointer is None:
                return
            if self._views:
                raise BufferError(
                    f"{len(self._views)} views of the {self.what} are still alive: drop them before close"
                )
            if self._running:
                raise OrderError(f"{self._running} calls on the {self.what} are still running: end them before close")
            pointer, self._pointer = self._pointer, None
        check(self._close(pointer))

    def leave(self, error: BaseException | None) -> None:
        """The end of a `with`. An error on its way has views in its frames and isn't hidden: closing waits for them."""
        try:
            self.close()
        except BufferError:
            if error is None:
                raise
            _leaving.add(self)  # alive until its last view is gone
            self._leave_if_unused()

    def _leave_if_unused(self) -> None:
        if self in _leaving and not self._views:
            with contextlib.suppress(OrderError):
                self.close()
            _leaving.discard(self)

    def _view_gone(self, key: int) -> None:
        self._views.pop(key, None)
        self._leave_if_unused()

    def memory(self, pointer: Any, len_bytes: int) -> memoryview:
        """A writable view of the object's memory; it counts until the last thing that refers to it is gone."""
        if len_bytes == 0:
            return memoryview(bytearray())
        buffer = ffi.buffer(pointer, len_bytes)
        key = id(buffer)
        self._views[key] = weakref.ref(buffer, lambda _: self._view_gone(key))
        return memoryview(buffer)


_leaving: set[Handle] = set()
