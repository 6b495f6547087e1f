# SPDX-License-Identifier: Apache-2.0
"""What a primary sends of its machine over one connection: pages and output, in the background and in a checkpoint."""

from __future__ import annotations

import time

from colocache.outputs.travel import pack
from colocache.replication.channel import Channel
from colocache.replication.messages import MessageType, packed
from colocache.replication.pvm import Pvm
from colocache.replication.streams_out import OutStreams
from colocache.replication.trace import Trace

PART_PAGES = 1024  # at once in the background, if there are disks: their writes wait for no more


class PrimarySending:
    """Sends what is pending of `pvm`, and what the log has. The session's thread calls all of it."""

    def __init__(self, pvm: Pvm, channel: Channel, trace: Trace, *, timeout: float) -> None:
        """`timeout`: the longest wait without a byte of it taken by the peer."""
        self._pvm = pvm
        self._channel = channel
        self._trace = trace
        self._timeout = timeout
        self.streams = OutStreams(channel)
        self.output_went = False  # since the last checkpoint

    def sync(self) -> None:
        """Take the log for a round in the background."""
        begin = time.monotonic_ns()
        self._pvm.sync()
        self._trace.add("log of a round", begin, time.monotonic_ns(), self._pvm.epoch)

    def pages(self, max_pages: int = 0) -> int:
        """What is pending, at most so many pages (0 = all): how many those were."""
        # A secondary that flushes takes nothing for a while: that is back-pressure. Silence is the inbox's to notice.
        begin = time.monotonic_ns()
        n_pages = self._pvm.send(self.streams, timeout=self._timeout, max_pages=max_pages)
        self._trace.add(f"send {n_pages} pages", begin, time.monotonic_ns(), self._pvm.epoch)
        return n_pages

    def round(self) -> int:
        """In the background: nothing that the secondary would refuse. In the checkpoint it has more room."""
        if self._pvm.beyond(self._pvm.allowance):
            return 0
        return sum(iter(lambda: self.pages(PART_PAGES), 0)) if self._pvm.disks.sizes else self.pages()

    def output(self) -> None:
        """What the machine sent travels before its epoch is sealed, for a secondary that takes over from that."""
        if parts := self.packed_output():
            self._channel.send_together(parts, self._timeout)  # as pages: it may be stopping its machine meanwhile

    def packed_output(self) -> list[bytes]:
        """The same as messages, for who sends them together with others."""
        output, epoch = self._pvm.output, self._pvm.epoch
        parts = []
        for body in pack(output.take(), output.origin()):
            parts += packed(MessageType.OUTPUT, epoch=epoch, body=body)
        self.output_went = self.output_went or bool(parts)
        return parts
