# SPDX-License-Identifier: Apache-2.0
"""The primary's further streams: pages of an epoch go over several connections at once.

The control connection is stream 0. A page always travels on the same stream, so its versions stay in order. After its
pages each further stream carries PING(N): the secondary's receiving thread then looks up from its C loop.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

from colocache import Sender, SendResult
from colocache.errors import PeerLostError, reason_of
from colocache.replication.address import Address
from colocache.replication.channel import Channel
from colocache.replication.hello import Hello
from colocache.replication.messages import MessageType
from colocache.replication.transport import Wrap


def open_streams(channel: Channel, address: Address, wrap: Wrap, peer: Hello, timeout: float) -> None:
    """Connect the further streams of the session that the secondary's HELLO began; they end with `channel`.

    `timeout`: longest wait in seconds for each connection, and later for a message on it.
    """
    token = peer.stream_token()
    for index in range(1, peer.streams):
        try:
            connection = address.connect(channel.peer_timeout)
        except OSError as error:
            raise PeerLostError(f"stream {index} of {peer.streams} does not connect: {reason_of(error)}") from error
        stream = Channel(wrap(connection), peer_timeout=timeout)
        channel.streams = (*channel.streams, stream)
        stream.send(MessageType.STREAM, a=index, b=peer.streams, body=token)


class OutStreams:
    """Sends on all streams of `channel` at once. One thread calls it; `close` after the channel was shut down."""

    def __init__(self, channel: Channel) -> None:
        self._channels = (channel, *channel.streams)
        others = len(channel.streams)
        self._pool = ThreadPoolExecutor(others, thread_name_prefix="colocache-stream") if others else None

    def __len__(self) -> int:
        return len(self._channels)

    def send(self, sender: Sender, *, epoch: int, timeout: float, max_pages: int = 0) -> list[SendResult]:
        """Send pending pages of `epoch`, about `max_pages` in all (0 = all); what went over each stream.

        The first error of any stream is raised, after all have ended: the session is over then.
        """
        n = len(self._channels)
        share = max(1, max_pages // n) if max_pages else 0

        def send_stripe(index: int) -> SendResult:
            channel = self._channels[index]
            try:
                result = channel.send_pages(
                    sender, epoch=epoch, timeout=timeout, max_pages=share, stripe=index, n_stripes=n
                )
                if index and result.n_pages:
                    channel.send(MessageType.PING, epoch=epoch)
            except BaseException:
                # So that the others don't wait for a peer that is lost. The control connection may still say why.
                for other in self._channels[1:]:
                    other.shut_down()
                raise
            return result

        others: list[Future[SendResult]] = []
        try:
            if self._pool is not None:
                others = [self._pool.submit(send_stripe, index) for index in range(1, n)]
            first = send_stripe(0)
        finally:
            wait(others)
        return [first, *(other.result() for other in others)]

    def close(self) -> None:
        """End the sending threads; the streams belong to the channel."""
        if self._pool is not None:
            self._pool.shutdown()
