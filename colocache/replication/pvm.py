# SPDX-License-Identifier: Apache-2.0
"""The primary's virtual machine and its sender, together: what must still be sent, and what is known of its pair.

What always holds, and which verbs see to it:

* Every page that was taken from the dirty log since the last epoch known to be sealed is in the sender's *unacked*.
  Only `received` and `meet` (the peer says that the epoch in flight is sealed) empty it.
* While the fate of an epoch is unknown (`pair.in_flight`) nothing goes from the log into unacked: if that epoch turns
  out to be sealed, unacked is emptied, and with it would go pages that are not in it. User space may still mark pages:
  they are pending, and what is pending stays unacked.
* A number is used from its first page on and never again: `open_epoch`.
* The machine runs unless it stands for a checkpoint, or another may be the one that the world sees.
* Console input is kept until an epoch that has taken it in is known to be sealed (outputs/typed.py).
* A write to a disk that a secondary may not have is among its unacked blocks (disks/mirrored.py): they follow the
  sender's unacked, verb by verb.
* Output of an epoch leaves when that epoch is known to be sealed, and all of it while no secondary could take over:
  before the first epoch is in flight, and once this machine is declared alone.

=============  ========================================  =======================================  =================
verb           machine                                   sender                                   pair
=============  ========================================  =======================================  =================
boot           boots and runs
pause, resume  stands, runs
sync                                                     log to unacked, pending (lost: all)
send                                                     pending pages leave, and stay unacked
open_epoch                                                                                        used_epoch + 1
in_flight                                                                                         in_flight = epoch
received                                                 unacked is emptied                       sealed = in_flight
give_up                                                  unacked is pending again                 used_epoch + 1
loaded                                                                                            checkpoints + 1
meet           its log is discarded if all is sent       all of RAM, or resend, or as received    as the two agree
declare_alone                                                                                     history is lost
=============  ========================================  =======================================  =================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from colocache import Sender, SendResult
from colocache.disks.mirrored import Disks, NoDisks
from colocache.disks.write import Total
from colocache.errors import LogLostError, OrderError
from colocache.outputs.held import NoOutput, Output
from colocache.outputs.typed import TypedInput
from colocache.replication.conversation import Meeting
from colocache.replication.hello import Hello
from colocache.vmm.machine import Machine, VerifyReport


@dataclass(frozen=True)
class PairState:
    """What a primary knows about its secondary, across connections."""

    history: bytes | None = None  # of the secondary it is paired with
    lost_history: bytes | None = None  # of the secondary it declared lost
    sealed_epoch: int = 0  # newest epoch known to be sealed
    used_epoch: int = 0  # newest number used
    in_flight: int = 0  # epoch whose device state may have arrived whole, and whose RECEIVED has not; 0 = none
    checkpoints: int = 0  # done, in all


@dataclass(frozen=True)
class Sent:
    """Pages sent for the open epoch, in the background and in the checkpoint."""

    n_pages: int = 0
    n_zero: int = 0
    n_bytes: int = 0


class Streams(Protocol):
    """What pages go out on: OutStreams, or a test's or a lesson's own."""

    def send(self, sender: Sender, *, epoch: int, timeout: float, max_pages: int = 0) -> Sequence[SendResult]:
        """Send pending pages of `epoch`, about `max_pages` in all (0 = all)."""
        ...


class Pvm:
    """The machine whose pages `sender` sends. One thread, but mark_dirty."""

    def __init__(
        self,
        machine: Machine,
        sender: Sender,
        *,
        output: Output | None = None,
        typed: TypedInput | None = None,
        disks: Disks | None = None,
    ) -> None:
        self.machine = machine
        self.sender = sender
        self.output = output or NoOutput()
        self.typed = typed or TypedInput(live=True)
        self.disks = disks or NoDisks()
        self.disk_log = 0  # bytes of writes to disks that the secondary keeps for an epoch; 0 = any number
        self._pair = PairState()
        self._sent = Sent()
        self._epoch = 0
        self._running = False
        self.allowance = 0  # pages that the secondary takes before the next checkpoint; 0 = any number

    @property
    def pair(self) -> PairState:
        """What is known of the pair now."""
        return self._pair

    @property
    def epoch(self) -> int:
        """The open epoch, which pages that are sent now belong to; 0 = none was opened yet."""
        return self._epoch

    @property
    def sent(self) -> Sent:
        """What was sent of the open epoch."""
        return self._sent

    @property
    def unacked_pages(self) -> int:
        """Pages whose arrival in a sealed epoch is not known."""
        return self.sender.count()[1]

    @property
    def pending_pages(self) -> int:
        """Pages that are still to be sent."""
        return self.sender.count()[0]

    def dirty_pages(self) -> int:
        """About how many pages the next checkpoint will carry."""
        return max(self.unacked_pages, self.machine.dirty_hint())

    def beyond(self, allowance: int) -> bool:
        """Has the open epoch more pages than this? Never of 0."""
        return bool(allowance) and self.unacked_pages > allowance

    @property
    def running(self) -> bool:
        """Does the machine run?"""
        return self._running

    # ---- the machine ----

    def boot(self) -> None:
        """Boot the machine and let it run."""
        self.machine.boot()
        self.resume()

    def pause(self) -> int | None:
        """Stop the machine at a step boundary: since when it stands, as Machine.pause says.

        From now on it is given no console input: what it has taken in is its state's."""
        self.typed.stand()
        self.disks.stopping(True)
        since = self.machine.pause()
        self._running = False
        return since

    def resume(self) -> int | None:
        """Let the machine run, if it does not: since when it runs, as Machine.resume says."""
        since = None
        if not self._running:
            self.disks.stopping(False)
            since = self.machine.resume()
            self._running = True
            self.typed.run()
        return since

    def verify(self) -> VerifyReport:
        """Compare all of RAM with the guest's history. Leaves the machine standing."""
        self.pause()
        return self.machine.verify()

    # ---- pages ----

    def mark_dirty(self, block: int, first_pfn: int, n_pages: int) -> None:
        """User space wrote guest RAM. Any thread, at any time."""
        self.sender.mark_dirty(block, first_pfn, n_pages)

    def sync(self) -> None:
        """Take the dirty log into unacked and pending; one that can't be read counts as all ones."""
        if self._pair.in_flight:
            raise OrderError(
                f"the log can't be taken while nobody knows whether epoch {self._pair.in_flight} is sealed"
            )
        try:
            self.machine.sync_dirty_log(self.sender)
        except LogLostError:
            self.sender.mark_all()

    def send(self, streams: Streams, *, timeout: float, max_pages: int = 0) -> int:
        """Send pending pages of the open epoch, about `max_pages` (0 = all): how many went."""
        results = streams.send(self.sender, epoch=self._epoch, timeout=timeout, max_pages=max_pages)
        n_pages = sum(result.n_pages for result in results)
        self._sent = Sent(
            self._sent.n_pages + n_pages,
            self._sent.n_zero + sum(result.n_zero for result in results),
            self._sent.n_bytes + sum(result.n_bytes for result in results),
        )
        return n_pages

    # ---- an epoch ----

    def open_epoch(self) -> int:
        """Begin a new epoch: its number. What was sent under the number before is not of it."""
        self._epoch = self._pair.used_epoch + 1
        self._pair = replace(self._pair, used_epoch=self._epoch)
        self._sent = Sent()
        return self._epoch

    def in_flight(self) -> Total:
        """The open epoch is about to be sent whole: from now on it may be sealed without our ever hearing of it. What
        the connection has carried of its disks."""
        self._pair = replace(self._pair, in_flight=self._epoch)
        # The secondary could take over from it: what comes after is withheld, also by a machine that was alone.
        self.output.move(self._epoch + 1)
        self.typed.in_flight(self._epoch)
        return self.disks.in_flight()

    def of_disks(self) -> dict[str, int]:
        """What the newest epoch that was sent has of the disks: fields of its result."""
        flight = self.disks.flight
        carried = flight.carried
        return {
            "disk_writes": carried.n_writes,
            "disk_bytes": carried.n_bytes,
            "unacked_blocks": flight.unacked_blocks,
        }

    def room_again(self) -> None:
        """The epoch in flight is sealed, and the secondary's log of its disks has room again: else a machine that runs
        before `received` would wait for it."""
        self.disks.received()

    def received(self) -> None:
        """The epoch in flight is sealed: its pages are acknowledged, and its output may leave."""
        epoch = self._pair.in_flight
        if not epoch:
            raise OrderError("no epoch is in flight that could have been received")
        self.sender.received()
        self.room_again()
        self._pair = replace(self._pair, in_flight=0, sealed_epoch=epoch)
        self.output.received(epoch)
        self.typed.received(epoch)

    def give_up(self) -> None:
        """The open epoch will not be sealed: what it carried goes out again, under the next number."""
        self._pair = replace(self._pair, in_flight=0)
        self.sender.resend()
        self.disks.give_up()
        self.open_epoch()

    def loaded(self) -> None:
        """The secondary runs from the sealed epoch: the checkpoint is through."""
        self._pair = replace(self._pair, checkpoints=self._pair.checkpoints + 1)

    # ---- the pair ----

    def meet(self, meeting: Meeting, peer: Hello) -> None:
        """Agree with a secondary on the newest sealed epoch; after this the sender knows what to send."""
        if meeting is Meeting.FRESH:
            self.send_all()
            self.disks.give_up()
            self._pair = replace(self._pair, history=peer.history, lost_history=None, sealed_epoch=0)
        elif meeting is Meeting.HEARD_LATE:
            # Nothing was taken from the log since: unacked is that epoch and what was marked meanwhile, which is
            # pending and stays.
            self.received()
        elif meeting is Meeting.GO_ON:
            self.sender.resend()
            self.disks.give_up()
        else:
            raise OrderError(f"these two are no pair: {meeting.value}")
        self.output.again()
        used = max(self._pair.used_epoch, peer.used_epoch, peer.sealed_epoch)
        self._pair = replace(self._pair, in_flight=0, used_epoch=used)

    def send_all(self) -> None:
        """All of RAM is to be sent."""
        # The log first: what is written after this is in it, what was written before goes with all of RAM.
        self.machine.discard_dirty_log()
        self.sender.mark_all()

    def declare_alone(self) -> None:
        """The secondary is given up for good: all output may leave, and that secondary must never take over."""
        if self._pair.history is not None:
            self._pair = replace(self._pair, lost_history=self._pair.history, history=None)
        self._pair = replace(self._pair, in_flight=0)
        self.output.free()
        self.typed.free()
