# SPDX-License-Identifier: Apache-2.0
"""The lesson's secondary: the Svm that replication uses, over shared memory; only the guest program is ours.

The same class runs in the lesson's process or in a child that can be killed (victim.py), so every method takes and
returns what JSON can say.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from types import TracebackType
from typing import Any

import numpy as np

from colocache import Cache, Memory
from colocache.replication.events import Events
from colocache.replication.svm import Svm
from colocache.teach import tags
from colocache.teach.guest import BLOCK, ScriptedGuest
from colocache.teach.primary import WAIT_SECONDS, bits_text
from colocache.vmm.machine import Ram


def map_image(fd: int, offset: int, n_pages: int) -> tuple[mmap.mmap, tags.Pages]:
    """An image as a VMM would map it: shared, and seen by nobody's dirty log but its own."""
    mapping = mmap.mmap(fd, n_pages * tags.PAGE_BYTES, offset=offset)
    return mapping, np.frombuffer(mapping, np.uint8).reshape(n_pages, tags.PAGE_BYTES)


class Secondary:
    """An SVM without a CPU: `write` is what its guest would do, and `sync` hands over what its dirty log says.

    With bounded memory the guest writes through the engine's private mapping, of which there is no log.
    """

    def __init__(self, memory: Memory, cache: Cache, sock: int) -> None:
        self.cache, self._sock = cache, sock
        self.block = cache.blocks[0]
        self.n_pages = self.block.n_pages
        self.bounded = memory.memory_mode == "bounded"
        images = memory.images[0]
        if not self.bounded:
            self._mapping, self.ram = map_image(images.guest_fd, images.guest_offset, self.n_pages)
        address, fd = self.block.guest_addr, images.guest_fd
        self._guest = self._make_guest(Ram(BLOCK, 0, tags.PAGE_BYTES, self.n_pages, address, fd, self.bounded))
        self._svm = Svm(cache, self._guest, Events("lesson", machine_readable=False, quiet=True))

    def _make_guest(self, ram: Ram) -> ScriptedGuest:
        return ScriptedGuest([ram])

    def write(self, pfns: list[int], epoch: int) -> None:
        """What the SVM's guest does, on the way to `epoch`."""
        if self.bounded:
            with self.block.writable() as pages:
                self._guest.write(pages, pfns, "S", epoch)
        else:
            self._guest.write(self.ram, pfns, "S", epoch)

    def memory(self) -> list[str]:
        """What the SVM's guest sees."""
        return list(tags.read(self.block.guest))

    def used(self) -> dict[str, int]:
        """Bounded memory: bytes of private copies, as the kernel counts them, and of staged pages."""
        return {"private": self.cache.private_bytes(), "staged": self.cache.status().staged_bytes}

    def free_staged(self) -> None:
        """Bounded memory: give back what a committed epoch took."""
        self._svm.tidy()

    def receive(self, epoch: int) -> int:
        """Packets into the cache, until a message of another kind."""
        return self.cache.receive_stream(self._sock, timeout=WAIT_SECONDS, epoch=epoch)[1]

    def sync(self) -> None:
        """Get, OR into the SVM bitmap, clear."""
        self._svm.sync()

    def device_state(self, epoch: int) -> None:
        """The PVM's registers of this epoch: here, a line of text."""
        self._svm.put_device_state(epoch, f"registers of the PVM at epoch {epoch}".encode())

    def seal(self, epoch: int) -> dict[str, int]:
        result = self._svm.seal(epoch)
        return {"pvm": result.pvm_pages, "svm": result.svm_pages, "both": result.both_pages}

    def flush(self) -> int:
        """Pages copied."""
        return self._svm.flush().n_pages

    def loaded(self) -> bool:
        """True: a failover was asked for meanwhile, take over now."""
        return self._svm.load(self.cache.status().sealed_epoch)[1]

    def abort(self, epoch: int, reason: str) -> bool:
        """True: a failover was asked for meanwhile, take over now."""
        return self.cache.abort(epoch, reason)

    def failover(self) -> dict[str, Any]:
        answer = self.cache.failover()
        return {"now": answer.now, "epoch": answer.epoch, "sentence": str(answer)}

    def bits(self) -> dict[str, str]:
        """The three bitmaps of the control region, one character per page."""
        block, n_pages = self.block, self.n_pages
        found = {"pvm": block.pvm_bitmap, "svm": block.svm_bitmap, "flush": block.flush_set}
        return {name: bits_text(words, n_pages) for name, words in found.items()}

    def status(self) -> dict[str, Any]:
        now = self.cache.status()
        return {
            "phase": now.phase.name.lower(),
            "sealed": now.sealed_epoch,
            "committed": now.committed_epoch,
            "receiving": now.receiving_epoch,
        }

    def die(self) -> None:
        """SIGKILL, here and now. Only ever called in a child."""
        os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """Unmap what is its own; the cache is closed by whoever made it."""
        if self.bounded:
            return
        del self.ram
        with contextlib.suppress(BufferError):  # a view in a traceback's frame: it goes with the process
            self._mapping.close()

    def __enter__(self) -> Secondary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
