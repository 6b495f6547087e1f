# SPDX-License-Identifier: Apache-2.0
"""One image without a cache: a block of a primary's guest RAM."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from types import TracebackType

import numpy as np
import numpy.typing as npt

from colocache import backing as bk
from colocache.errors import ClosedError, ColocacheError, MemoryShortError, SystemCallError, UnsupportedError, reason_of
from colocache.spec import BlockSpec

MAP_NORESERVE = 0x4000  # Python 3.13 has a name for it


class RamImage:
    """Guest RAM of one block, mapped at `addr`, zero bytes at first; gone with its last process. `fd`: its file.

    `view` is (n_pages, page_size) uint8, writable. Context manager: closing with other views of it alive raises
    BufferError, leaving a `with` leaves the memory to them.
    """

    spec: BlockSpec
    addr: int
    backing: str
    why: str
    fd: int

    def __init__(self, spec: BlockSpec, mapping: mmap.mmap, fd: int, backing: str, why: str) -> None:
        """Not for users: see create."""
        self.spec, self.backing, self.why = spec, backing, why
        self.fd = fd
        self._mapping = mapping
        self._view: npt.NDArray[np.uint8] | None = None
        self._make_view()
        self.addr = int(self.view.ctypes.data)

    @classmethod
    def create(cls, spec: BlockSpec, backing: str = "auto", *, reserve: bool = True) -> RamImage:
        """Make and map the image. MemoryShortError (how much is missing, and the command), UnsupportedError."""
        refused: list[str] = []
        for kind in dict.fromkeys(bk.nameless(kind) for kind in bk.kinds(backing)):
            try:
                bk.check_room(kind, kind.size_of(spec.len_bytes), reserve=reserve)
                mapping, fd = cls._map(kind, spec, reserve=reserve)
                return cls(spec, mapping, fd, kind.backing, "; ".join([kind.why, *refused]))
            except (MemoryShortError, UnsupportedError, SystemCallError) as error:
                refused.append(f"not {kind.backing}: {error}")
                last: ColocacheError = error
        raise last

    @staticmethod
    def _map(kind: bk.Kind, spec: BlockSpec, *, reserve: bool) -> tuple[mmap.mmap, int]:
        fd = bk.nameless_file(kind, f"colocache.ram.{spec.name}"[:200])
        try:
            size = bk.size_file(kind, fd, spec.len_bytes, reserve=reserve)
            flags = mmap.MAP_SHARED if reserve else mmap.MAP_SHARED | MAP_NORESERVE
            return mmap.mmap(fd, size, flags), fd
        except BaseException as error:
            os.close(fd)
            if not isinstance(error, OSError):
                raise
            code = error.errno or errno.EIO
            raise SystemCallError(f"block {spec.name} can't be mapped: {reason_of(error)}", errno=code) from error

    def _make_view(self) -> None:
        whole = np.frombuffer(self._mapping, np.uint8, self.spec.len_bytes)
        self._view = whole.reshape(self.spec.n_pages, self.spec.page_size)

    @property
    def view(self) -> npt.NDArray[np.uint8]:
        if self._view is None:
            raise ClosedError(f"guest RAM of block {self.spec.name} is closed")
        return self._view

    def close(self) -> None:
        """Unmap. BufferError while views of it are alive; a second close is fine."""
        self._view = None
        try:
            self._mapping.close()
        except BufferError as error:
            self._make_view()
            raise BufferError(f"views of block {self.spec.name} are still alive: drop them before close") from error
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> RamImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BufferError):  # closed for everybody; unmapped with the last view
            self.close()
        self._view = None

    def __repr__(self) -> str:
        return f"<RamImage {self.spec.name}: {self.spec.n_pages} pages of {self.spec.page_size}, {self.backing}>"
