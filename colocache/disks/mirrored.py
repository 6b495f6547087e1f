# SPDX-License-Identifier: Apache-2.0
"""The primary's half: what its machine writes to its disks goes to the secondary, in the pair's own conversation.

What always holds, and which verbs see to it:

* A write is answered when it is in the stream of the pair and among the unacked blocks, or only among these if there is
  no connection: a link that is dead holds no guest up.
* Unacked blocks are forgotten when an epoch that contains them is known to be sealed, and by nothing else: `received`.
  What is written after `in_flight` belongs to the next epoch. Marked and sent under one lock, so that no write stands
  on either side of that line with one foot.
* More than the secondary's log has room for is held up, but for what a machine that is stopped waits for: `stopping`.

===========  ====================  =====================  ==================
verb         connection            unacked                of the epoch in flight
===========  ====================  =====================  ==================
write        carries it            its blocks
connect      there is one
disconnect   there is none
in_flight                          none                   what was unacked
received                                                  none
give_up                            with those in flight   none
===========  ====================  =====================  ==================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from colocache.disks.blocks import Blocks
from colocache.disks.write import COST_BYTES, RESERVE_BYTES, Kind, Total, Write
from colocache.errors import PeerLostError, TimedOutError

LOOK_SECONDS = 0.05

Send = Callable[[Write], None]


@dataclass(frozen=True)
class Flight:
    """What an epoch has of the disks: what its connection carried for it, and the blocks that are unacked with it."""

    carried: Total = field(default_factory=Total)
    unacked_blocks: int = 0


class Disks(Protocol):
    """What a primary's machine is told of its disks: MirroredDisks, NoDisks, or a test's own."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each."""

    def connect(self, send: Send, *, limit_bytes: int = 0) -> None:
        """From now on writes go to `send`, which raises PeerLostError or TimedOutError when there is no more going.
        The secondary keeps `limit_bytes` of them for an epoch (0 = any number)."""

    def disconnect(self) -> None:
        """No more."""

    def stopping(self, on: bool) -> None:
        """The machine is about to be stopped, which waits for its writes; False: it runs again."""

    @property
    def flight(self) -> Flight:
        """What the epoch in flight, or the newest that was, has of the disks."""

    def in_flight(self) -> Total:
        """The machine stands, and the epoch is about to be sent whole: what this connection has carried."""

    def received(self) -> None:
        """The epoch in flight is sealed."""

    def give_up(self) -> None:
        """It is not and will not be."""


class NoDisks:
    """Of a machine without any."""

    sizes: tuple[int, ...] = ()
    flight = Flight()

    def connect(self, send: Send, *, limit_bytes: int = 0) -> None:
        """See Disks."""

    def disconnect(self) -> None:
        """See Disks."""

    def stopping(self, on: bool) -> None:
        """See Disks."""

    def in_flight(self) -> Total:
        """See Disks."""
        return Total()

    def received(self) -> None:
        """See Disks."""

    def give_up(self) -> None:
        """See Disks."""


class MirroredDisks:
    """See the head of this file. Any thread. `on_full` asks for a checkpoint."""

    def __init__(self, sizes: Sequence[int], *, on_full: Callable[[], None] = lambda: None) -> None:
        self.sizes = tuple(sizes)
        self._on_full = on_full
        self._unacked = [Blocks(size) for size in sizes]
        self._flight = [Blocks(size) for size in sizes]
        self._change = threading.Condition()
        self._send: Send | None = None
        self._room = 0  # bytes in the secondary's log for an epoch, without the reserve; 0 = any number
        self._bytes = 0  # that this connection brought into its open log
        self._flight_bytes = 0
        self._stopping = False
        # That the connection carried: so far, for sealed epochs, with the one in flight.
        self._total = self._sealed_total = self._flight_total = Total()
        self.flight = Flight()
        self.n_bytes = 0  # written by the machine, in all
        self.held_up = 0  # writes that waited for room

    @property
    def unacked_blocks(self) -> int:
        """Blocks whose arrival in a sealed epoch is not known."""
        with self._change:
            return sum(len(one) for one in (*self._unacked, *self._flight))

    @property
    def unacked_bytes(self) -> int:
        """Bytes of these blocks."""
        with self._change:
            return sum(length for one in (*self._unacked, *self._flight) for _, length in one.runs())

    def exported(self, disk: int) -> MirroredDisk:
        """One of them, for an export."""
        return MirroredDisk(self, disk, self.sizes[disk])

    def write(self, write: Write) -> None:
        """The machine writes this. Back when it may be told that it is done."""
        with self._change:
            self._wait_for_room()
            self._unacked[write.disk].add(write.offset, write.length)
            self.n_bytes += len(write.data)
            if self._send is not None:
                self._carry(write)

    def _carry(self, write: Write) -> None:
        send = self._send
        if send is None:
            return
        try:
            send(write)
        except (PeerLostError, TimedOutError):
            self._send = None  # the session finds out by itself; the guest goes on
            self._change.notify_all()
            return
        self._total = self._total.plus(write)
        self._bytes += len(write.data) + COST_BYTES

    # ---- what a pair that meets again still needs ----

    def unacked_runs(self, disk: int) -> list[tuple[int, int]]:
        """(offset, length) of what is unacked and not in flight, in parts that fit one write."""
        with self._change:
            return list(self._unacked[disk].runs())

    def send_again(self, disk: int, offset: int, length: int, read: Callable[[int, int], bytearray]) -> None:
        """What `read` finds where blocks are unacked. It is no new write.

        Under the lock, and so before or after every write of the machine: one that was sent before is done on the disk
        already, and is read; one that is not read yet is sent after this.
        """
        with self._change:
            if self._send is not None:
                self._carry(Write(disk, Kind.WRITE, offset, length, read(offset, length)))

    def _wait_for_room(self) -> None:
        if not self._full():
            return
        self.held_up += 1
        while self._full():
            self._on_full()
            self._change.wait(LOOK_SECONDS)

    def _full(self) -> bool:
        return bool(self._room) and self._send is not None and not self._stopping and self._bytes >= self._room

    # ---- the connection ----

    def connect(self, send: Send, *, limit_bytes: int = 0) -> None:
        """See Disks."""
        with self._change:
            self._send = send
            self._total = self._sealed_total = self._flight_total = Total()
            self._bytes = self._flight_bytes = 0
            self._room = max(1, limit_bytes - self.reserve) if limit_bytes else 0

    @property
    def reserve(self) -> int:
        """Bytes of the secondary's log that are kept for what a machine that is stopped has under way."""
        return len(self.sizes) * RESERVE_BYTES

    def disconnect(self) -> None:
        """See Disks. The connection is broken: whoever sends on it has been told."""
        with self._change:
            self._send = None
            self._change.notify_all()

    # ---- an epoch ----

    def stopping(self, on: bool) -> None:
        """See Disks."""
        self._stopping = on  # without the lock: whoever holds it may be in a send
        if on and self._change.acquire(blocking=False):
            self._change.notify_all()
            self._change.release()

    def in_flight(self) -> Total:
        """See Disks."""
        with self._change:
            for flight, unacked in zip(self._flight, self._unacked, strict=True):
                flight.add_all(unacked)
                unacked.clear()
            self._flight_bytes = self._bytes
            self.flight = Flight(self._total.minus(self._sealed_total), sum(map(len, self._flight)))
            self._flight_total = self._total
            return self._total

    def received(self) -> None:
        """See Disks."""
        with self._change:
            for flight in self._flight:
                flight.clear()
            self._bytes -= self._flight_bytes
            self._flight_bytes = 0
            self._sealed_total = self._flight_total
            self._change.notify_all()

    def give_up(self) -> None:
        """See Disks."""
        with self._change:
            for flight, unacked in zip(self._flight, self._unacked, strict=True):
                unacked.add_all(flight)
                flight.clear()
            self._flight_bytes = 0


class MirroredDisk:
    """What an export serves: see nbd.Disk."""

    def __init__(self, disks: MirroredDisks, number: int, size: int) -> None:
        self.size = size
        self._disks, self._number = disks, number

    def write(self, offset: int, data: memoryview) -> None:
        """See nbd.Disk."""
        self._disks.write(Write(self._number, Kind.WRITE, offset, len(data), data))

    def zero(self, offset: int, length: int) -> None:
        """See nbd.Disk."""
        self._disks.write(Write(self._number, Kind.ZERO, offset, length))

    def trim(self, offset: int, length: int) -> None:
        """See nbd.Disk."""
        self._disks.write(Write(self._number, Kind.TRIM, offset, length))
