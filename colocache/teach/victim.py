# SPDX-License-Identifier: Apache-2.0
"""A secondary in a process of its own, so that it can really be killed.

The parent (`Victim`) makes the memory, hands its descriptors to the child and tells it what to do, one JSON line each;
each answer carries the bitmaps and the state of the control region. So the last answer is what the dead process left,
and the images themselves are the parent's to read: they are shared memory.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from colocache import Cache, Memory
from colocache.errors import ColocacheError
from colocache.teach import tags
from colocache.teach.outside import OutsideSecondary
from colocache.teach.primary import WAIT_SECONDS
from colocache.teach.secondary import Secondary
from colocache.teach.spoken import ChildError, SpokenProcess, answer, obey

CALLS = (
    "write", "receive", "sync", "device_state", "seal", "flush", "loaded", "abort", "failover",
    "memory", "used", "free_staged", "processes", "refill",
    "die", "flush_until", "clear_then_copy",
)  # fmt: skip


class Victim:
    """The parent's side. `call("seal", 2)` is the child's `Secondary.seal(2)`; `outside`: an OutsideSecondary's."""

    def __init__(self, memory: Memory, sock: int, *, outside: bool = False) -> None:
        wake_read, wake_write = os.pipe()
        self._wake = wake_read
        self._list = os.memfd_create("colocache.teach.list")
        fds_there = {"sock": sock, "wake": wake_write, "list": self._list}
        self._process = SpokenProcess(
            "colocache.teach.victim",
            (*memory.fds, *fds_there.values()),
            {"manifest": memory.manifest(), "outside": outside, **fds_there},
        )
        os.close(wake_write)
        self.last: dict[str, Any] = self._process.hear()

    def call(self, name: str, *args: Any) -> Any:
        self._process.say({"call": name, "args": args})
        self.last = self._process.hear()
        return self.last["result"]

    def put_list(self, chosen: list[bool]) -> None:
        """Fill the list in shared memory, one byte per page: for a flush that is wrong on purpose."""
        os.pwrite(self._list, bytes(chosen), 0)

    def get_list(self) -> str:
        """The list as it is now, also after the child's death: one character per page."""
        return "".join("1" if byte else "0" for byte in os.pread(self._list, os.fstat(self._list).st_size, 0))

    def bits(self) -> dict[str, str]:
        found: dict[str, str] = self.last["bits"]
        return found

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.last["status"]
        return found

    def stop_at(self, name: str, *args: Any) -> None:
        """Let the child do something in whose middle it stands still, and wait until it does."""
        self._process.say({"call": name, "args": args})
        heard = select.select([self._wake, self._process.answers], [], [], WAIT_SECONDS)[0]
        if self._wake not in heard or not os.read(self._wake, 1):  # it went all the way, it died, or nothing happened
            raise ChildError("the lesson's child process did not stop where it was told to")

    def kill(self) -> int:
        """SIGKILL; the number of the signal it died of."""
        return self._process.kill()

    def die(self) -> int:
        """The child kills itself at this point; the number of the signal it died of."""
        self._process.say({"call": "die", "args": []})
        return self._process.wait()

    def close(self) -> None:
        self._process.close()
        if self._wake >= 0:
            os.close(self._wake)
            os.close(self._list)
            self._wake = self._list = -1

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- the child's side ----


class _Child(Secondary):
    wake: int
    list_fd: int

    def flush_until(self, pfn: int) -> None:
        """The engine's flush, standing still when it comes to page `pfn`; it never returns.

        From that page on this process may not write guest RAM. The flush's first store there faults; Python notes the
        signal, writes a byte to the wake pipe and returns to the same instruction, which faults again: so the process
        stands in the middle of the flush until it is killed.
        """
        os.set_blocking(self.wake, False)
        signal.signal(signal.SIGSEGV, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        libc = ctypes.CDLL(None, use_errno=True)
        start = self.block.guest_addr + pfn * tags.PAGE_BYTES
        length = (self.n_pages - pfn) * tags.PAGE_BYTES
        if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), 1) != 0:  # PROT_READ
            raise OSError(ctypes.get_errno(), "mprotect")
        self.cache.flush()

    def clear_then_copy(self, n_pages: int) -> None:
        """A flush that is wrong on purpose: it forgets its pages, then copies them; it stands still after n_pages."""
        chosen = [pfn for pfn, byte in enumerate(os.pread(self.list_fd, self.n_pages, 0)) if byte]
        os.pwrite(self.list_fd, bytes(self.n_pages), 0)  # cleared ...
        cached = self.block.cache
        for pfn in chosen[:n_pages]:  # ... before it is copied
            self.ram[pfn] = cached[pfn]
        os.write(self.wake, b".")
        signal.pause()


class _OutsideChild(OutsideSecondary, _Child):
    pass


def main() -> None:
    """Read what to do from stdin until it ends."""
    obey(_serve)


def _serve(start: dict[str, Any], orders: Iterator[dict[str, Any]]) -> None:
    memory = Memory.from_manifest(start["manifest"])
    cache = Cache.create(memory, threads=1, device_state_max=4096)
    svm = (_OutsideChild if start["outside"] else _Child)(memory, cache, start["sock"])
    svm.wake, svm.list_fd = start["wake"], start["list"]
    _answer(svm, None)
    for order in orders:
        try:
            if order["call"] not in CALLS:
                raise ChildError(f"unknown call {order['call']}")
            _answer(svm, getattr(svm, order["call"])(*order["args"]))
        except (ColocacheError, OSError) as error:
            answer({"error": str(error)})


def _answer(svm: Secondary, result: Any) -> None:
    answer({"result": result, "bits": svm.bits(), "status": svm.status()})
