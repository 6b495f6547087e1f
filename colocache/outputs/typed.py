# SPDX-License-Identifier: Apache-2.0
"""What the world types: console input on its way into the machine that the world sees, and kept. Knows no sockets.

What always holds, and which verbs see to it:

* Only the machine that the world sees is given input, each byte once and in order: `put`, and after `take_over` what
  was kept.
* A byte goes to the secondary before the machine is given it, while a secondary could take over (from the first
  `in_flight` on, until `free`).
* Which bytes the state of an epoch has taken in is known exactly: while the machine comes to stand it is given nothing,
  and what it was given and has not taken in is taken back: `stand`, then `mark`.
* A byte is kept until an epoch that took it in is sealed: `received`, `sealed`. A takeover from N goes on with the
  first byte that N has not taken in, so none is lost and none comes twice.
* Bounded: there is `room` for so much. Whoever reads from the world reads no more than that, and a queue that becomes
  full asks for a checkpoint.

Offsets count the bytes that the world typed since the machine was booted.

==========  =========================================  =============================================
verb        at the machine that the world sees         at its secondary
==========  =========================================  =============================================
put         one more to give
stand, run  given nothing, given again
in_flight   kept from now on; the epoch has its mark
received    what is before the mark is forgotten
free        what was given is forgotten
again       all that is kept goes to the peer anew
arrived                                                one more is kept; what it has already is none
taken_in                                               the mark of the epoch that may be sealed
sealed                                                 what is before the mark is forgotten
take_over                                              it gives, from the mark on
==========  =========================================  =============================================
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from colocache.errors import PeerLostError, TimedOutError, TooLargeError

KEPT_BYTES_MAX = 64 << 10
PUSH_SECONDS = 0.01  # between two tries with a machine that takes nothing

PassOn = Callable[[int, bytes], None]  # offset, data: to the secondary


class TypedInput:
    """See the head of this file. Any thread. `live`: of the machine that the world sees from the start."""

    def __init__(
        self, *, live: bool = False, limit_bytes: int = KEPT_BYTES_MAX, on_full: Callable[[], None] = lambda: None
    ) -> None:
        self._live = live
        self._limit = limit_bytes
        self._on_full = on_full
        self._changed = threading.Condition()
        self._data = bytearray()
        self._start = 0  # offset of its first byte
        self._given = 0  # up to which the machine was given it
        self._passed = 0  # up to which the peer was told
        self._kept = False  # a secondary could take over
        self._runs = True
        self._marks: dict[int, int] = {}  # epoch that was sent whole, and how much its state has taken in
        self._pass_on: PassOn | None = None
        self._give: Callable[[bytes], int] | None = None
        self._take_back: Callable[[], bytes] = bytes
        self._closed = False
        self._pusher: threading.Thread | None = None

    def plug(self, give: Callable[[bytes], int], take_back: Callable[[], bytes]) -> None:
        """The machine: `give` says how many bytes it took, `take_back` what it was given and has not taken in."""
        with self._changed:
            self._give, self._take_back = give, take_back
            self._pusher = threading.Thread(target=self._push, name="colocache-typed", daemon=True)
            self._pusher.start()

    def close(self) -> None:
        """No machine is given anything any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._pusher is not None:
            self._pusher.join()

    # ---- at the machine that the world sees ----

    @property
    def room(self) -> int:
        """Bytes that may be put now."""
        return max(0, self._limit - len(self._data)) if self._live else 0

    def put(self, data: bytes) -> None:
        """The world typed this; at most `room`."""
        with self._changed:
            self._data += data
            self._flow()
            full = not self.room
        if full:
            self._on_full()

    def stand(self) -> None:
        """The machine is about to stand: it is given nothing from now on."""
        with self._changed:
            self._runs = False
            back = self._take_back() if self._live else b""
            self._given -= len(back)
            if self._given < self._start:  # forgotten already, as nobody could take over
                self._data[:0] = back[: self._start - self._given]
                self._start = self._given
                self._passed = min(self._passed, self._start)

    def run(self) -> None:
        """The machine runs."""
        with self._changed:
            self._runs = True
            self._flow()

    @property
    def mark(self) -> int:
        """How much the machine, which stands, has taken in."""
        return self._given

    def in_flight(self, epoch: int) -> None:
        """The state of `epoch`, of the machine as it stands, may be sealed from now on."""
        with self._changed:
            self._kept = True
            self._marks[epoch] = self._given
            self._flow()

    def received(self, epoch: int) -> None:
        """`epoch` is sealed."""
        with self._changed:
            mark = self._marks.get(epoch)
            self._marks = {later: n for later, n in self._marks.items() if later > epoch}
            if mark is not None:
                self._forget(mark)

    def free(self) -> None:
        """Nobody could take over, until the next in_flight."""
        with self._changed:
            self._kept = False
            self._marks.clear()
            self._flow()

    def again(self, pass_on: PassOn | None) -> None:
        """There is another connection, on which the peer was told nothing; None: there is none."""
        with self._changed:
            self._pass_on, self._passed = pass_on, self._start
            self._flow()

    def _flow(self) -> None:
        """Whatever can go on goes on: first to the peer, then into the machine."""
        end = self._start + len(self._data)
        first = max(self._passed, self._start)
        if self._kept and self._pass_on is not None and first < end:
            try:
                for at in range(first, end, KEPT_BYTES_MAX):
                    self._pass_on(at, bytes(self._data[at - self._start :][:KEPT_BYTES_MAX]))
                self._passed = end
            except (PeerLostError, TimedOutError):
                self._pass_on = None  # the session finds out by itself
        while self._waits and self._give is not None:
            n_bytes = self._give(bytes(self._data[self._given - self._start :]))
            if not n_bytes:
                self._changed.notify_all()
                break
            self._given += n_bytes
        if not self._kept:
            self._forget(self._given)

    @property
    def _waits(self) -> bool:
        return self._live and self._runs and self._given < self._start + len(self._data)

    def _forget(self, offset: int) -> None:
        """What is before it is needed no more."""
        if offset > self._start:
            del self._data[: offset - self._start]
            self._start = offset
            self._given = max(self._given, offset)

    def push(self) -> None:
        """Try again with a machine that took nothing."""
        with self._changed:
            self._flow()

    def _push(self) -> None:
        """The same, in a thread of its own."""
        with self._changed:
            while not self._closed:
                self._changed.wait(PUSH_SECONDS if self._waits else None)
                if self._waits and not self._closed:
                    self._flow()

    # ---- at its secondary ----

    def arrived(self, offset: int, data: bytes) -> None:
        """The world typed this at the primary. TooLargeError."""
        with self._changed:
            end = self._start + len(self._data)
            if offset > end:  # what lies between was taken in by an epoch that was sealed before this side came
                self._data.clear()
                self._start = self._given = end = offset
            self._data += data[end - offset :]
            if len(self._data) > 2 * KEPT_BYTES_MAX:
                raise TooLargeError(
                    f"the primary sent more than {2 * KEPT_BYTES_MAX >> 10} KiB of console input that no epoch took in"
                )

    def taken_in(self, epoch: int, n_bytes: int) -> None:
        """The state of `epoch`, which is arriving, has taken in so much."""
        with self._changed:
            self._marks = {epoch: n_bytes}

    def sealed(self, epoch: int) -> None:
        """`epoch` is sealed."""
        self.received(epoch)

    def take_over(self, epoch: int) -> None:
        """This side's machine, which goes on from `epoch`, is the one that the world sees."""
        self.received(epoch)
        with self._changed:
            self._marks.clear()
            self._live = True
            self._flow()
