# SPDX-License-Identifier: Apache-2.0
"""One connection of a primary: the initial copy, pages in the background, and the checkpoint as a conversation."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from colocache import SendResult
from colocache.errors import ColocacheError, LogLostError, PeerLostError, TimedOutError
from colocache.replication.channel import Channel
from colocache.replication.errors import ProtocolError
from colocache.replication.inbox import CheckpointAbortedError, Inbox
from colocache.replication.messages import AbortKind, MessageType, join_u64, split_u64
from colocache.replication.results import SentCheckpoint
from colocache.replication.streams_out import OutStreams

if TYPE_CHECKING:
    from colocache.replication.primary import Primary

INITIAL_ROUND_PAGES = 8192  # between two of these the secondary copies what has come to its guest RAM
INITIAL_PASSES = 3  # over what the guest dirtied during the pass before
BACKGROUND_ROUNDS = 4  # per interval
BACKGROUND_SECONDS_MIN = 0.05
SLICE_SECONDS = 0.1  # a wait in Python that must notice a signal
SAVE_FAILURES_MAX = 3  # in a row


class PrimarySession:
    """Talks to one secondary until the end, or until an error says why there is no more talking."""

    def __init__(self, primary: Primary, channel: Channel) -> None:
        self._primary = primary
        self._machine = primary.machine
        self._sender = primary.sender
        self._options = primary.options
        self._timing = primary.timing
        self._channel = channel
        self._streams = OutStreams(channel)
        self._inbox = Inbox(channel)
        self._sent = _Sent()  # for the open epoch
        self._save_failures = 0
        self._epoch = 0  # the open one: pages sent now belong to it

    def _open_next_epoch(self) -> None:
        """A number is used from its first page on, and an aborted one is not used again."""
        self._primary.state.used_epoch += 1
        self._epoch = self._primary.state.used_epoch
        self._sent = _Sent()

    def run(self, fresh: bool) -> None:
        """Until the wanted checkpoints are done or the primary is stopped; then the secondary is told so."""
        self._inbox.start()
        self._channel.start_heartbeat(MessageType.PING, self._timing.ping_interval)
        self._open_next_epoch()
        try:
            if fresh:
                self._initial_copy()
            wanted = self._options.checkpoints
            state = self._primary.state
            now = True  # a pair that has just met is not in step yet
            while not self._primary.stop.is_set() and (not wanted or state.checkpoints < wanted):
                if not now:
                    self._between_checkpoints()
                    if self._primary.stop.is_set():
                        break
                now = False
                self._checkpoint()
            if self._options.hold:
                self._hold()
        except (PeerLostError, TimedOutError) as error:
            raise self._inbox.why_ended(error) from error
        except ProtocolError as error:
            self._channel.abort(AbortKind.SESSION, str(error))
            self._channel.linger()
            raise
        self._channel.abort(AbortKind.END, "the primary was ended by its operator")
        self._channel.linger()

    def close(self) -> None:
        """End the reading thread and the connection."""
        self._inbox.stop()
        self._streams.close()
        self._channel.close()

    # ---- pages ----

    def _sync(self) -> None:
        """Take the dirty log into pending and unacked; one that can't be read counts as all ones."""
        try:
            self._machine.sync_dirty_log(self._sender)
        except LogLostError:
            self._sender.mark_all()

    def _send(self, max_pages: int = 0) -> int:
        # A secondary that flushes takes nothing for a while: that is back-pressure. Silence is the inbox's to notice.
        results = self._streams.send(
            self._sender, epoch=self._epoch, timeout=self._timing.checkpoint_timeout, max_pages=max_pages
        )
        for result in results:
            self._sent.add(result)
        return sum(result.n_pages for result in results)

    def _initial_copy(self) -> None:
        """All of RAM while the machine runs, then what it dirtied meanwhile, until little is left."""
        begin, total = time.monotonic(), 0
        for _ in range(INITIAL_PASSES):
            while self._sender.count()[0] and not self._primary.stop.is_set():
                total += self._send(INITIAL_ROUND_PAGES)
                # receive_stream hands out the PING, and the secondary uses the moment to copy ahead.
                self._channel.send(MessageType.PING)
                self._inbox.check_idle()
            self._sync()
        seconds = time.monotonic() - begin
        self._primary.events.emit(
            "initial",
            f"the initial copy sent {total} pages in {seconds:.2f} s",
            pages=total,
            seconds=round(seconds, 4),
            bytes=self._sent.n_bytes,
        )

    def _between_checkpoints(self) -> None:
        """Until the next checkpoint is due: by time, on request of either side, or because much is dirty."""
        begin = time.monotonic()
        due = begin + self._options.interval
        step = max(BACKGROUND_SECONDS_MIN, self._options.interval / BACKGROUND_ROUNDS)
        next_round = begin + step
        while not self._primary.stop.is_set():
            now = time.monotonic()
            self._inbox.check_idle()
            self._check_machine()
            wanted = self._inbox.checkpoint_wanted.is_set() or self._primary.checkpoint_wanted.is_set()
            if now >= due or wanted or self._above_dirty_limit():
                return
            if now >= next_round:
                if self._options.background:
                    self._sync()
                    self._send()
                next_round = time.monotonic() + step
                continue
            self._inbox.arrived.wait(max(0.0, min(due, next_round, now + SLICE_SECONDS) - now))

    def _above_dirty_limit(self) -> bool:
        limit = self._options.dirty_limit_pages
        return bool(limit) and max(self._sender.count()[1], self._machine.dirty_hint()) >= limit

    def _check_machine(self) -> None:
        if self._machine.failure is not None:
            reason = f"the primary's machine failed: {self._machine.failure}"
            self._channel.abort(AbortKind.SESSION, reason)
            self._channel.linger()
            raise ColocacheError(reason)

    def _hold(self) -> None:
        """Stay connected without checkpoints, until stopped or killed."""
        self._primary.events.emit("holding", "no more checkpoints; running on")
        while not self._primary.stop.is_set():
            self._inbox.check_idle()
            self._check_machine()
            self._inbox.arrived.wait(SLICE_SECONDS)

    # ---- the checkpoint ----

    def _checkpoint(self) -> None:
        primary, epoch = self._primary, self._epoch
        primary.checkpoint_wanted.clear()
        self._inbox.checkpoint_wanted.clear()
        try:
            result = self._converse(epoch)
        except CheckpointAbortedError as error:
            self._given_up(epoch, f"the secondary gave up epoch {epoch}: {error}")
            return
        self._save_failures = 0
        primary.checkpoint_done(result)

    def _given_up(self, epoch: int, reason: str) -> None:
        """The epoch is lost, the pair is not: what it carried is sent again with the next one."""
        primary = self._primary
        primary.state.in_flight = 0
        self._sender.resend()
        self._open_next_epoch()
        primary.resume_machine()
        primary.events.emit("aborted", reason, epoch=epoch, reason=reason)

    def _converse(self, epoch: int) -> SentCheckpoint:
        primary, channel, timeout = self._primary, self._channel, self._timing.checkpoint_timeout
        number = primary.state.checkpoints + 1
        background = self._sent.n_pages
        channel.send(MessageType.CHECKPOINT_REQUEST, epoch=epoch)
        self._inbox.expect(MessageType.CHECKPOINT_REPLY, epoch, timeout)

        primary.pause_machine()
        stopped = time.monotonic_ns()
        self._sync()
        channel.send(MessageType.VMSTATE_SEND, epoch=epoch)
        self._maybe_die("receiving", number)
        self._send()
        with_hashes = self._options.wants_hashes(number)
        begin = time.monotonic_ns()
        try:
            state = self._machine.save_device_state(with_hashes=with_hashes)
        except ColocacheError as error:
            self._save_failures += 1
            if self._save_failures >= SAVE_FAILURES_MAX:
                raise
            reason = f"the primary's device state can't be saved: {error}"
            channel.abort(AbortKind.CHECKPOINT, reason, epoch=epoch, n_pages=self._sent.n_pages)
            if len(self._streams) > 1:
                # Pages of the next epoch must not overtake the ABORT on another stream: the secondary answers it.
                with contextlib.suppress(CheckpointAbortedError):
                    self._inbox.expect(MessageType.VMSTATE_RECEIVED, epoch, timeout)
            raise CheckpointAbortedError(f"its own device state can't be saved: {error}") from error
        hash_ns = time.monotonic_ns() - begin if with_hashes else 0
        if with_hashes:
            low, high = split_u64(hash_ns)
            channel.send(MessageType.PING, epoch=epoch, a=low, b=high)
        low, high = split_u64(self._sent.n_pages)
        # From the first byte of this message on the secondary may seal without our ever hearing of it.
        primary.state.in_flight = epoch
        channel.send(MessageType.VMSTATE_SIZE, epoch=epoch, a=low, b=high, body=state)
        self._inbox.expect(MessageType.VMSTATE_RECEIVED, epoch, timeout)
        self._maybe_die("sealed", number)
        self._sender.received()
        primary.state.in_flight = 0
        primary.state.sealed_epoch = epoch
        sent = self._sent
        self._open_next_epoch()
        primary.release_output(epoch)
        loaded = self._inbox.expect(MessageType.VMSTATE_LOADED, epoch, timeout)
        hash_ns += join_u64(loaded.a, loaded.b)
        primary.resume_machine()
        return SentCheckpoint(
            epoch=epoch,
            sent_pages=sent.n_pages,
            background_pages=background,
            zero_pages=sent.n_zero,
            n_bytes=sent.n_bytes,
            state_bytes=len(state),
            pause_ns=max(0, time.monotonic_ns() - stopped - hash_ns),
            hash_ns=hash_ns,
        )

    def _maybe_die(self, point: str, number: int) -> None:
        """For the demo and the tests: die like a host that loses power, at exactly this point."""
        if self._options.die_at != point or self._options.die_at_checkpoint != number:
            return
        if point == "receiving":
            pending = self._sender.count()[0]
            if pending > 1:
                self._send(pending // 2)
        self._primary.events.emit("dying", f"killing itself: {point}", point=point, epoch=self._epoch)
        os.kill(os.getpid(), signal.SIGKILL)


class _Sent:
    """Pages sent for the open epoch, in the background and in the checkpoint."""

    def __init__(self) -> None:
        self.n_pages = self.n_zero = self.n_bytes = 0

    def add(self, result: SendResult) -> None:
        self.n_pages += result.n_pages
        self.n_zero += result.n_zero
        self.n_bytes += result.n_bytes
