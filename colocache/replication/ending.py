# SPDX-License-Identifier: Apache-2.0
"""How a side ends a connection with a word: an ABORT, and a moment in which the peer can read it.

A side that must not wait at all has `Channel.last_word` instead, and one that serves others meanwhile
`WaitingRoom.see_out`.
"""

from __future__ import annotations

import select
import time

from colocache.replication.channel import Channel
from colocache.replication.messages import AbortKind

LINGER_SECONDS = 0.5  # how long a side that closes after an ABORT reads on, so that the ABORT is not lost by a reset
LINGER_BYTES_MAX = 256 << 20


def end_with(channel: Channel, kind: AbortKind, reason: str, *, epoch: int = 0) -> None:
    """Tell the peer what is over and why, and let it read that. Never raises: a peer that is gone needs no telling."""
    channel.abort(kind, reason, epoch=epoch)
    linger(channel)


def linger(channel: Channel) -> None:
    """After a last message: let the peer read it. Closing with unread bytes in the socket would reset the connection
    and throw our message away with it."""
    channel.end_sending()
    until, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES_MAX
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while left > 0 and (wait := until - time.monotonic()) > 0 and poll.poll(wait * 1000):
        n = channel.discard()
        if n == 0:
            return
        left -= n or 0
