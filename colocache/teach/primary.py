# SPDX-License-Identifier: Apache-2.0
"""The lesson's primary: real guest RAM and the engine's own Sender; only the guest program is ours."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType

from colocache import BlockSpec, Cache, Memory, RamImage, Sender, bitmap, message_header
from colocache.teach import tags

BLOCK = "ram"
MESSAGE = 1  # any message that is no PAGES packet ends a receive_stream
CHUNK_PAGES = 16  # 64 KiB: fits any socket's buffer, so that one thread can hold both ends
WAIT_SECONDS = 10.0


def bits_text(words: bitmap.Words, n_pages: int) -> str:
    """A bitmap as one character per page: 1 set, 0 not."""
    text = ["0"] * n_pages
    for pfn in bitmap.to_pfns(words):
        text[int(pfn)] = "1"
    return "".join(text)


class Primary:
    """A PVM without a CPU: `write` is what its guest would do, `log` what KVM's dirty log would say."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        with contextlib.ExitStack() as stack:
            self.ram = stack.enter_context(RamImage.create(BlockSpec(BLOCK, n_pages * tags.PAGE_BYTES), backing="shm"))
            self.sender = stack.enter_context(Sender())
            self.sender.add_block(BLOCK, self.ram.addr, n_pages * tags.PAGE_BYTES)
            self._probe = stack.enter_context(_Probe(n_pages))
            self._open = stack.pop_all()
        self.log: set[int] = set()
        self.epoch = 1  # the checkpoint that its writes belong to
        self.alive = True

    def write(self, pfns: list[int]) -> None:
        tags.stamp(self.ram.view, pfns, "P", self.epoch)
        self.log.update(pfns)

    def sync(self) -> None:
        """The dirty log into unacked and pending; it is cleared before a page is read."""
        words, self.log = bitmap.from_pfns(self.log, self.n_pages), set()
        self.sender.sync_words(0, words)

    def send(self, sock: socket.socket, epoch: int, max_pages: int) -> int:
        """Pending pages as packets of `epoch`, then a message that ends the receiver's wait."""
        sent = self.sender.send(sock, epoch=epoch, timeout=WAIT_SECONDS, max_pages=max_pages)
        sock.sendall(message_header(MESSAGE, epoch, 0))
        return sent.n_pages

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
        self._open.__exit__(kind, error, trace)


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
