# SPDX-License-Identifier: Apache-2.0
"""One connection of a primary: the disks and the initial copy, then pages in the background and a checkpoint (which is
primary_checkpoint.py's) in turn, until it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from colocache.disks.write import Write
from colocache.errors import ColocacheError, PeerLostError, TimedOutError
from colocache.replication.channel import Channel
from colocache.replication.ending import end_with
from colocache.replication.errors import ProtocolError, SecondaryLostError
from colocache.replication.events import Events
from colocache.replication.inbox import Inbox
from colocache.replication.messages import AbortKind, MessageType, encode_input
from colocache.replication.mirrors import Mirrors, NoMirrors
from colocache.replication.observer import Observer
from colocache.replication.options import PrimaryOptions
from colocache.replication.primary_checkpoint import PrimaryCheckpoint
from colocache.replication.primary_room import PrimaryRoom
from colocache.replication.primary_sending import PrimarySending
from colocache.replication.pvm import Pvm
from colocache.replication.results import SentCheckpoint
from colocache.replication.rounds import Rounds
from colocache.replication.signals import Flag
from colocache.replication.trace import Trace

INITIAL_ROUND_PAGES = 8192  # between two of these the secondary copies what has come to its guest RAM
INITIAL_PASSES = 3  # over what the guest dirtied during the pass before
BACKGROUND_ROUNDS = 4  # per interval
BACKGROUND_SECONDS_MIN = 0.05
SLICE_SECONDS = 0.1  # a wait in Python that must notice a signal
OUTPUT_LOOK_SECONDS = 0.001  # at least, between two looks whether output waits
DISK_LOOK_SECONDS = 0.05  # while disks are copied for the first time


class PrimarySession:
    """Talks to one secondary until the end, or until an error says why there is no more talking."""

    def __init__(
        self,
        pvm: Pvm,
        channel: Channel,
        options: PrimaryOptions,
        events: Events,
        *,
        stop: threading.Event,
        checkpoint_wanted: Flag,
        observer: Observer,
        mirrors: Mirrors | NoMirrors,
        done: Callable[[SentCheckpoint], None],
        tick: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
    ) -> None:
        """`done` hears of each checkpoint; `tick` is called every now and then and may end the session by raising."""
        self._pvm = pvm
        self._options = options
        self._timing = options.timing
        self._events = events
        self._stop = stop
        self._checkpoint_wanted = checkpoint_wanted
        self._observer = observer
        self._mirrors = mirrors
        self._channel = channel
        self._room = PrimaryRoom(pvm, events)
        self._tick = tick
        self._inbox = Inbox(channel, self._look_round)
        trace = trace or Trace()
        self._sending = PrimarySending(pvm, channel, trace, timeout=self._timing.checkpoint_timeout)
        self._rounds = Rounds(self._sending.sync, self._sending.round, pvm.machine.dirty_hint)
        self._checkpoint = PrimaryCheckpoint(
            pvm,
            channel,
            options,
            events,
            inbox=self._inbox,
            sending=self._sending,
            rounds=self._rounds,
            room=self._room,
            observer=observer,
            mirrors=mirrors,
            done=done,
            trace=trace,
        )

    def run(self, fresh: bool) -> None:
        """Until the wanted checkpoints are done or the primary is stopped; then the secondary is told so."""
        self._inbox.start()
        self._checkpoint.told(self._pvm.allowance)
        self._channel.start_heartbeat(MessageType.PING, self._timing.ping_interval)
        self._pvm.open_epoch()
        self._pvm.typed.again(self._pass_on)
        try:
            self._bring_disks(fresh)
            if fresh:
                self._initial_copy()
            wanted = self._options.checkpoints
            now = True  # a pair that has just met is not in step yet
            while not self._stop.is_set() and (not wanted or self._pvm.pair.checkpoints < wanted):
                if not now:
                    self._between_checkpoints()
                    if self._stop.is_set():
                        break
                now = False
                last = self._pvm.machine.powered_off
                self._checkpoint_wanted.clear()
                self._inbox.checkpoint_wanted.clear()
                if self._checkpoint.take() and last:
                    end_with(self._channel, AbortKind.END, "its guest powered off")
                    return
            if self._observer.stays():
                self._stay()
        except (PeerLostError, TimedOutError) as error:
            if self._channel.over:
                raise TimedOutError(self._channel.over) from error
            raise self._inbox.why_ended(error) from error
        except ProtocolError as error:
            end_with(self._channel, AbortKind.SESSION, str(error))
            raise
        end_with(self._channel, AbortKind.END, "the primary was ended by its operator")

    def _look_round(self) -> None:
        """Now and then while this side waits."""
        self._tick()
        self._room.look()

    def close(self) -> None:
        """End the reading thread and the connection."""
        self._inbox.stop()  # breaks the connection: a write that waits on it is told
        self._mirrors.disconnected()
        self._pvm.typed.again(None)
        self._sending.streams.close()
        self._channel.close()

    # ---- input, disks, the initial copy ----

    def _pass_on(self, offset: int, data: bytes) -> None:
        """What the world typed, before this side's machine is given it. In whatever thread has it."""
        self._channel.send(MessageType.INPUT, body=encode_input(offset, data))

    def _send_write(self, write: Write) -> None:
        """In the thread of a disk."""
        self._channel.send_write(write, self._timing.checkpoint_timeout)

    def _bring_disks(self, fresh: bool) -> None:
        """If `fresh`, all of every disk, before memory: the guest writes both meanwhile, and disks take longer.
        SecondaryLostError: they can't be brought to this secondary, which is told."""
        try:
            self._mirrors.connected(self._send_write, fresh=fresh, limit_bytes=self._pvm.disk_log)
            while fresh and not self._mirrors.ready() and not self._stop.is_set():
                self._inbox.check_idle()
                self._check_machine()
                self._inbox.arrived.wait(DISK_LOOK_SECONDS)
        except SecondaryLostError as error:
            end_with(self._channel, AbortKind.END, f"the primary goes on alone: {error}")  # as in a checkpoint
            raise

    def _initial_copy(self) -> None:
        """All of RAM while the machine runs, then what it dirtied meanwhile, until little is left."""
        begin, total = time.monotonic(), 0
        for _ in range(INITIAL_PASSES):
            while self._pvm.pending_pages and not self._stop.is_set():
                total += self._sending.pages(INITIAL_ROUND_PAGES)
                # receive_stream hands out the PING, and the secondary uses the moment to copy ahead.
                self._channel.send(MessageType.PING)
                self._inbox.check_idle()
            self._pvm.sync()
        seconds = time.monotonic() - begin
        self._events.emit(
            "initial",
            f"the initial copy sent {total} pages in {seconds:.2f} s",
            pages=total,
            seconds=round(seconds, 4),
            bytes=self._pvm.sent.n_bytes,
        )

    # ---- between checkpoints, and after the last ----

    def _between_checkpoints(self) -> None:
        """Until the next checkpoint is due: by time, on request of either side, or because much is dirty."""
        begin = time.monotonic()
        due = begin + self._options.interval
        step = self._options.round_delay or max(BACKGROUND_SECONDS_MIN, self._options.interval / BACKGROUND_ROUNDS)
        next_round = begin + step
        delay = self._options.output_delay
        while not self._stop.is_set():
            now = time.monotonic()
            self._inbox.check_idle()
            self._check_machine()
            oldest = self._pvm.output.oldest() if delay else None
            if oldest is not None:
                due = min(due, oldest + delay)
            look = self._inbox.slice_seconds
            if delay:
                look = min(look, max(delay / 4, OUTPUT_LOOK_SECONDS))
            wanted = self._inbox.checkpoint_wanted.is_set() or self._checkpoint_wanted.is_set()
            if now >= due or wanted or self._above_dirty_limit() or self._pvm.machine.powered_off:
                return
            if self._room.near():
                return
            if now >= next_round:
                hint = self._pvm.machine.dirty_hint()  # 0: nothing, or nobody can tell
                if self._options.background and not 0 < hint < self._options.round_pages:
                    self._rounds.one()
                self._sending.output()
                next_round = time.monotonic() + step
                continue
            self._inbox.arrived.wait(max(0.0, min(due, next_round, now + look) - now))

    def _above_dirty_limit(self) -> bool:
        limit = self._options.dirty_limit_pages
        return bool(limit) and self._pvm.dirty_pages() >= limit

    def _check_machine(self) -> None:
        failure = self._pvm.machine.failure
        if failure is not None:
            reason = f"the primary's machine failed: {failure}"
            end_with(self._channel, AbortKind.SESSION, reason)
            raise ColocacheError(reason)

    def _stay(self) -> None:
        """Stay connected without checkpoints, until stopped or killed."""
        self._room.lift()
        self._events.emit("holding", "no more checkpoints; running on")
        while not self._stop.is_set():
            self._inbox.check_idle()
            self._check_machine()
            self._inbox.arrived.wait(SLICE_SECONDS)
