# SPDX-License-Identifier: Apache-2.0
"""The lesson's primary: real guest RAM and the Pvm that replication uses; only the guest program is ours."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType

from colocache import BlockSpec, Cache, Memory, RamImage, Sender, SendResult, bitmap, message_header
from colocache.replication.pvm import Pvm
from colocache.teach import tags
from colocache.teach.guest import BLOCK, ScriptedGuest
from colocache.vmm.machine import Ram

MESSAGE = 1  # any message that is no PAGES packet ends a receive_stream
CHUNK_PAGES = 16  # 64 KiB: fits any socket's buffer, so that one thread can hold both ends
WAIT_SECONDS = 10.0


def bits_text(words: bitmap.Words, n_pages: int) -> str:
    """A bitmap as one character per page: 1 set, 0 not."""
    text = ["0"] * n_pages
    for pfn in bitmap.to_pfns(words):
        text[int(pfn)] = "1"
    return "".join(text)


class OneSocket:
    """What a Pvm sends its pages on: after them a message that ends the receiver's wait."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, sender: Sender, *, epoch: int, timeout: float, max_pages: int = 0) -> list[SendResult]:
        """Pending pages of `epoch`, at most `max_pages`."""
        sent = sender.send(self._sock, epoch=epoch, timeout=timeout, max_pages=max_pages)
        self._sock.sendall(message_header(MESSAGE, epoch, 0))
        return [sent]


class Primary:
    """A PVM without a CPU: `write` is what its guest would do."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        with contextlib.ExitStack() as stack:
            self.ram = stack.enter_context(RamImage.create(BlockSpec(BLOCK, n_pages * tags.PAGE_BYTES), backing="shm"))
            self.sender = stack.enter_context(Sender())
            index = self.sender.add_block(BLOCK, self.ram.addr, n_pages * tags.PAGE_BYTES)
            self._guest = ScriptedGuest([Ram(BLOCK, index, tags.PAGE_BYTES, n_pages, self.ram.addr)])
            self._pvm = Pvm(self._guest, self.sender)
            self._probe = stack.enter_context(_Probe(n_pages))
            self._stack = stack.pop_all()
        self.epoch = 1  # the checkpoint that its writes belong to
        self.alive = True

    def write(self, pfns: list[int]) -> None:
        self._guest.write(self.ram.view, pfns, "P", self.epoch)

    def sync(self) -> None:
        """The dirty log into unacked and pending; it is cleared before a page is read."""
        self._pvm.sync()

    def pause(self, epoch: int) -> None:
        """Stand still for checkpoint `epoch`, and take the last of the log."""
        self._open(epoch)
        self._pvm.pause()
        self._pvm.sync()
        self.epoch = epoch + 1

    def received(self) -> None:
        """The device state went out, and RECEIVED came."""
        self._pvm.in_flight()
        self._pvm.received()

    def _open(self, epoch: int) -> None:
        while self._pvm.epoch < epoch:
            self._pvm.open_epoch()

    def send(self, sock: socket.socket, epoch: int, max_pages: int) -> int:
        """Pending pages as packets of `epoch`, then a message that ends the receiver's wait."""
        self._open(epoch)
        return self._pvm.send(OneSocket(sock), timeout=WAIT_SECONDS, max_pages=max_pages)

    def bits(self) -> dict[str, str]:
        """`unacked` and `pending` of the sender, read by asking it to send.

        A sender has no call that shows its bitmaps. But what it sends, it sends from them: first what is pending, then,
        after resend, what is unacked. Then pending is put back; it is always a part of unacked, so nothing changes.
        """
        pending = self._probe.read(self.sender)
        self.sender.resend()
        unacked = self._probe.read(self.sender)
        self.sender.sync_words(0, pending)
        return {"unacked": bits_text(unacked, self.n_pages), "pending": bits_text(pending, self.n_pages)}

    def __enter__(self) -> Primary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


class _Probe:
    """A cache of its own that takes what a sender has pending; its PVM bitmap then says what that was."""

    def __init__(self, n_pages: int) -> None:
        with contextlib.ExitStack() as stack:
            memory = stack.enter_context(
                Memory.create(None, [BlockSpec(BLOCK, n_pages * tags.PAGE_BYTES)], backing="shm")
            )
            self._cache = stack.enter_context(Cache.create(memory, threads=1, device_state_max=4096))
            self._ends = socket.socketpair()
            for end in self._ends:
                stack.enter_context(end)
            self._open = stack.pop_all()
        self._epoch = 0

    def read(self, sender: Sender) -> bitmap.Words:
        self._epoch += 1
        ours, theirs = self._ends
        self._cache.device_state_buffer(self._epoch, 0)  # opens the epoch, even if no page comes
        while sender.send(ours, epoch=self._epoch, timeout=WAIT_SECONDS, max_pages=CHUNK_PAGES).n_pages:
            ours.sendall(message_header(MESSAGE, self._epoch, 0))
            self._cache.receive_stream(theirs, timeout=WAIT_SECONDS, epoch=self._epoch)
        words = self._cache.blocks[BLOCK].pvm_bitmap
        self._cache.seal(self._epoch)
        self._cache.flush()
        self._cache.loaded()
        return words

    def __enter__(self) -> _Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
