# SPDX-License-Identifier: Apache-2.0
"""A pointer of the C library in Python's hands: closed once, never used after it, views of its memory counted."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Container
from typing import Any

from colocache._native import check, ffi
from colocache.errors import ClosedError, OrderError


class Handle:
    """Guards one C object. `with handle as pointer:` around each call; close waits for none and refuses if one runs.

    It belongs to the process that made it: after a fork the child's uses raise ClosedError, its close does nothing.
    `let_go` is what can be given back while views of its memory live: a lock, threads.
    """

    def __init__(
        self, what: str, pointer: Any, close: Callable[[Any], int], let_go: Callable[[Any], int] | None = None
    ) -> None:
        self.what = what
        self._pointer = pointer
        self._close = close
        self._let_go = let_go
        self._left = False  # a `with` was left while views lived: closed for everybody, memory goes with the last view
        self._pid = os.getpid()
        # Reentrant: the end of a view may close the handle from inside any allocation, one under this lock included.
        self._lock = threading.RLock()
        self._running = 0
        self._views: dict[int, tuple[weakref.ref[Any], str]] = {}  # by the id of their buffer; of what memory

    def __enter__(self) -> Any:
        with self._lock:
            self._running += 1  # first: from here on nothing closes it
            if not self.closed and os.getpid() == self._pid:
                return self._pointer
            self._running -= 1
        if self.closed:
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
            if not self._left:
                warnings.warn(f"a {self.what} was never closed", ResourceWarning, stacklevel=2)

    @property
    def closed(self) -> bool:
        return self._pointer is None or self._left

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
                if self._left:
                    return
                of = ", ".join(sorted({of for _, of in self._views.values()}))
                raise BufferError(
                    f"{len(self._views)} views of the {self.what} are still alive ({of}): drop them before close"
                )
            if self._running:
                raise OrderError(f"{self._running} calls on the {self.what} are still running: end them before close")
            pointer, self._pointer = self._pointer, None
        check(self._close(pointer))

    def leave(self) -> None:
        """The end of a `with`: closed for everybody at once; memory that views show stays until the last is gone."""
        try:
            self.close()
        except BufferError:
            with self._lock:
                if self._running:
                    raise OrderError(f"{self._running} calls on the {self.what} are still running") from None
                self._left = True
            if self._let_go is not None:
                check(self._let_go(self._pointer))
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

    def check_no_views(self, of: Container[str]) -> None:
        """BufferError, which names them, while views of these memories are alive."""
        if any(name in of for _, name in self._views.values()):
            gc.collect()
        alive = sorted({name for _, name in self._views.values() if name in of})
        if alive:
            raise BufferError(f"views of the {self.what} are still alive ({', '.join(alive)}): drop them first")

    def memory(self, pointer: Any, len_bytes: int, of: str) -> memoryview:
        """A writable view of the object's memory, `of` what; it counts until nothing refers to it any more."""
        if len_bytes == 0:
            return memoryview(bytearray())
        buffer = ffi.buffer(pointer, len_bytes)
        key = id(buffer)
        self._views[key] = (weakref.ref(buffer, lambda _: self._view_gone(key)), of)
        return memoryview(buffer)


_leaving: set[Handle] = set()
