# SPDX-License-Identifier: Apache-2.0
"""The primary's half: its output is held with the number of its epoch until that is sealed. Knows no sockets.

What always holds, and which verbs see to it:

* Nothing of an epoch leaves before that epoch is known to be sealed: `received` frees what carries its number or less
  and nothing else. Too late is safe, too early never.
* The number moves only while the machine stands and all that it sent was put in: `move`. So what carries a number was
  sent before the state of that epoch was saved.
* Before the first `move`, and after `free`, nothing is held: no secondary could take over, or none may.
* Nothing is dropped, and everything leaves in the order in which it was put in. A queue that is full asks for a
  checkpoint, and whoever feeds it reads no more from its machine, which is thereby held up.

=========  ==============================  ===============================================
verb       queue                           number of what is put in from now on
=========  ==============================  ===============================================
put        one piece more, or it leaves
move                                       `epoch`; what was put in before keeps its own
received   what carries <= epoch leaves
free       all of it leaves                none: it leaves at once
take       what the peer was not given yet
again      the peer was given nothing
=========  ==============================  ===============================================
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from colocache.errors import OrderError
from colocache.outputs.piece import HELD_BYTES_MAX, Piece
from colocache.outputs.travel import Origin

Emit = Callable[[int, bytes], None]  # channel, data: to the world


class Output(Protocol):
    """What a primary's machine is told of its output: HeldOutput, or a test's own."""

    def move(self, epoch: int) -> None:
        """The machine stands, and what it sent was put in: what it sends from now on is of `epoch`."""

    def received(self, epoch: int) -> None:
        """`epoch` is sealed."""

    def free(self) -> None:
        """Nobody could take over: all of it may leave, until the next `move`."""

    def take(self) -> list[Piece]:
        """What is held and was not taken yet: the peer is given it."""

    def again(self) -> None:
        """The peer has nothing: what is held is to be given to it again."""

    def origin(self) -> Origin:
        """Where this side's front shows it."""

    def oldest(self) -> float | None:
        """When the oldest piece that is held was put in, CLOCK_MONOTONIC in seconds; None: nothing is held."""


class NoOutput:
    """Of a machine whose output nobody looks at."""

    def move(self, epoch: int) -> None:
        """See Output."""

    def received(self, epoch: int) -> None:
        """See Output."""

    def free(self) -> None:
        """See Output."""

    def take(self) -> list[Piece]:
        """See Output."""
        return []

    def again(self) -> None:
        """See Output."""

    def origin(self) -> Origin:
        """See Output."""
        return Origin()

    def oldest(self) -> float | None:
        """See Output."""
        return None


class HeldOutput:
    """See the head of this file. Any thread; `emit` is called under the queue's lock, so that order is kept."""

    def __init__(
        self,
        emit: Emit,
        *,
        limit_bytes: int = HELD_BYTES_MAX,
        on_full: Callable[[], None] = lambda: None,
        origin: Callable[[], Origin] = Origin,
    ) -> None:
        """`on_full` asks for a checkpoint; `origin` is its front's."""
        self._emit = emit
        self._limit = limit_bytes
        self._on_full = on_full
        self.origin = origin
        self._lock = threading.Lock()
        self._pieces: deque[tuple[Piece, float]] = deque()  # with the time at which each was put in, CLOCK_MONOTONIC
        self._n_taken = 0  # of them, from the left: the peer was given these
        self._cost = 0
        self._sent: Counter[int] = Counter()  # bytes put in, by channel
        self._number = 0  # 0: nothing is held

    @property
    def full(self) -> bool:
        """Whoever feeds it reads no more from its machine until this is False."""
        return self._cost >= self._limit

    @property
    def held_bytes(self) -> int:
        """What it holds, with what each piece costs besides."""
        return self._cost

    def put(self, channel: int, data: bytes) -> None:
        """The machine sent this. Taken also when the queue is full: what a machine sent before it stood."""
        with self._lock:
            piece = Piece(self._number, channel, self._sent[channel], data)
            self._sent[channel] += len(data)
            if not self._number:
                self._emit(channel, data)
                return
            was_full = self.full
            self._pieces.append((piece, time.monotonic()))
            self._cost += piece.cost
            became_full = self.full and not was_full
        if became_full:
            self._on_full()

    def move(self, epoch: int) -> None:
        """See Output."""
        with self._lock:
            if epoch < self._number:
                raise OrderError(f"output is of epoch {self._number} already and can't become of epoch {epoch}")
            self._number = epoch

    def received(self, epoch: int) -> None:
        """See Output."""
        with self._lock:
            while self._pieces and self._pieces[0][0].epoch <= epoch:
                self._let_out()

    def free(self) -> None:
        """See Output."""
        with self._lock:
            while self._pieces:
                self._let_out()
            self._number = 0

    def _let_out(self) -> None:
        piece, _ = self._pieces.popleft()
        self._n_taken = max(0, self._n_taken - 1)
        self._cost -= piece.cost
        self._emit(piece.channel, piece.data)

    # ---- the peer's copy ----

    def take(self) -> list[Piece]:
        """See Output."""
        with self._lock:
            taken = [self._pieces[at][0] for at in range(self._n_taken, len(self._pieces))]
            self._n_taken = len(self._pieces)
            return taken

    def again(self) -> None:
        """See Output."""
        with self._lock:
            self._n_taken = 0

    def oldest(self) -> float | None:
        """See Output."""
        with self._lock:
            return self._pieces[0][1] if self._pieces else None
