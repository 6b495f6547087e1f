# SPDX-License-Identifier: Apache-2.0
"""The secondary's half: what the primary's world has not seen yet, and its own machine's output, apart. No sockets.

What always holds, and which verbs see to it:

* Before `take_over` nothing leaves.
* What this machine sent since its last load is its own branch's: `loaded` drops it, `take_over` lets it out.
* What the primary sent came here before its epoch was sealed (`arrived`), and is forgotten when the primary has let it
  out (`released`). A takeover from epoch N lets out what is left up to N, first; newer is forgotten: the state that
  this machine goes on from has not sent it.

==========  ==================================  ====================
verb        the primary's                       its own
==========  ==================================  ====================
put                                             one piece more
arrived     one piece more
released    what carries <= epoch is forgotten
lost        what carries > epoch is forgotten
loaded                                          dropped
take_over   what carries <= epoch leaves        leaves, and all that comes
==========  ==================================  ====================
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from colocache.errors import TooLargeError
from colocache.outputs.held import Emit
from colocache.outputs.piece import COST_BYTES, HELD_BYTES_MAX, Piece
from colocache.outputs.travel import Origin

ARRIVED_BYTES_MAX = 4 * HELD_BYTES_MAX  # that a primary may send; its own limit is far below


def nothing_seen(_origin: Origin, _channel: int) -> int:
    """Of a front that can't tell what the primary's front has shown."""
    return 0


class ApartOutput:
    """See the head of this file. Any thread; `emit` is called under its lock.

    `seen(origin, channel)`: up to which offset the world has seen that channel, where this side's front can tell.
    `show` is called before the first `emit`.
    """

    def __init__(
        self,
        emit: Emit,
        *,
        limit_bytes: int = HELD_BYTES_MAX,
        seen: Callable[[Origin, int], int] = nothing_seen,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        self._emit = emit
        self._show = show
        self._limit = limit_bytes
        self._seen = seen
        self._origin = Origin()
        self._lock = threading.Lock()
        self._arrived: list[Piece] = []
        self._arrived_cost = 0
        self._own: list[tuple[int, bytes]] = []
        self._own_cost = 0
        self._live = False

    @property
    def full(self) -> bool:
        """Whoever feeds it with this machine's own output reads no more of it until this is False."""
        return self._own_cost >= self._limit

    def put(self, channel: int, data: bytes) -> None:
        """This side's machine sent this."""
        with self._lock:
            if self._live:
                self._emit(channel, data)
            else:
                self._own.append((channel, data))
                self._own_cost += len(data) + COST_BYTES

    def arrived(self, piece: Piece, origin: Origin = Origin()) -> None:  # noqa: B008 -- it never changes
        """The primary's machine sent this, and the world has not seen it. TooLargeError."""
        with self._lock:
            self._origin = origin
            if self._arrived_cost + piece.cost > ARRIVED_BYTES_MAX:
                raise TooLargeError(
                    f"the primary sent more than {ARRIVED_BYTES_MAX >> 20} MiB of output for epochs that are not sealed"
                )
            self._arrived.append(piece)
            self._arrived_cost += piece.cost

    def released(self, epoch: int) -> None:
        """The primary has let out what is of `epoch` and before."""
        self._keep(lambda piece: piece.epoch > epoch)

    def lost(self, epoch: int) -> None:
        """The connection is gone, and `epoch` is the newest that is sealed: what is newer comes again, or never."""
        self._keep(lambda piece: piece.epoch <= epoch)

    def _keep(self, which: Callable[[Piece], bool]) -> None:
        with self._lock:
            self._arrived = [piece for piece in self._arrived if which(piece)]
            self._arrived_cost = sum(piece.cost for piece in self._arrived)

    def loaded(self) -> None:
        """This machine became the primary's: its own branch never was."""
        with self._lock:
            self._own, self._own_cost = [], 0

    def take_over(self, epoch: int) -> None:
        """This machine, which goes on from `epoch`, is the one that the world sees."""
        with self._lock:
            if self._live:
                return
            self._show()
            for piece in self._arrived:
                if piece.epoch <= epoch:
                    left = piece.data[max(0, self._seen(self._origin, piece.channel) - piece.offset) :]
                    if left:
                        self._emit(piece.channel, left)
            for channel, data in self._own:
                self._emit(channel, data)
            self._arrived, self._own = [], []
            self._arrived_cost = self._own_cost = 0
            self._live = True
