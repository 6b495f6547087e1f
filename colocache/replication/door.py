# SPDX-License-Identifier: Apache-2.0
"""The secondary's door: who comes, who is let in as its primary, and who is told why not.

A stranger, whatever it says, ends its own connection and nothing else.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable

from colocache import Cache
from colocache.disks.apart import Disks, NoDisks
from colocache.errors import PeerLostError, TimedOutError
from colocache.replication.blocks import next_blocks
from colocache.replication.channel import Channel
from colocache.replication.conversation import Meaning, Meeting, State, meaning_of, meet
from colocache.replication.ending import end_with, linger
from colocache.replication.errors import DeclaredLostError, ProtocolError, RefusedError
from colocache.replication.events import Events
from colocache.replication.hello import Hello
from colocache.replication.messages import AbortKind, Message, MessageType, split_u64
from colocache.replication.options import SecondaryOptions
from colocache.replication.streams_in import take_streams
from colocache.replication.transport import PlainTransport, Wrap
from colocache.replication.waiting_room import WaitingRoom

STREAMS_SHARE = 0.8  # of the peer timeout, for the further streams to come: the primary still listens then
REPEAT_SECONDS = 5.0  # the same reason is told again only after this: a primary tries ten times a second


class Door:
    """Waits on `listener` for the primary of the pair. Context manager."""

    def __init__(
        self,
        cache: Cache,
        listener: socket.socket,
        *,
        machine_name: str,
        options: SecondaryOptions,
        events: Events,
        wrap: Wrap = PlainTransport,
        ready: Callable[[], int] = lambda: 0,
        disks: Disks | None = None,
    ) -> None:
        self._disks: Disks = disks or NoDisks()
        self._cache = cache
        self._machine_name = machine_name
        self._options = options
        self._ready = ready  # pages that the primary may have, which CHECKPOINT_READY tells
        self._events = events
        self._room = WaitingRoom(
            listener,
            peer_timeout=options.timing.peer_timeout,
            device_state_max=cache.status().device_state_max_bytes,
            wrap=wrap,
        )
        self._told: dict[str, float] = {}  # when each reason was told last

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self._room.close()

    def next_primary(self, deadline: float, halted: Callable[[], bool]) -> Channel | None:
        """A primary that belongs to this secondary, after HELLO both ways and CHECKPOINT_READY.

        None at the deadline, or `halted()`. PeerLostError, TimedOutError, ProtocolError, SessionEndedError: it came and
        was lost again. DeclaredLostError: it went on alone; this side must not take over.
        """
        while (came := self._room.next(deadline, halted)) is not None:
            channel, first = came
            try:
                if self._greet(channel, first):
                    return channel
                self._room.see_out(channel)  # the room closes it: one that does not read costs nobody time
            except BaseException:
                channel.close()
                raise
        return None

    def see_out(self, channel: Channel) -> None:
        """Close it when its peer has read what was said last, or a little later; nobody waits for that."""
        self._room.see_out(channel)

    def turn_away(self) -> None:
        """After a takeover: a primary that was not dead is told, so that it stands still. Never waits long."""
        came = self._room.next(time.monotonic(), last_word=0.0)
        if came is None:
            return
        with came[0] as channel:
            if isinstance(came[1], ProtocolError):
                return
            try:
                channel.send(MessageType.HELLO, body=self._own_hello(lost=True).encode())
            except (PeerLostError, TimedOutError):
                return
            linger(channel)
        self._events.emit("refused", "a primary came after the takeover and was told so", reason="took over")

    def refuse(self, reason: str) -> None:
        """Report that somebody was rejected; the same reason not more often than every REPEAT_SECONDS."""
        now = time.monotonic()
        if now - self._told.get(reason, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            if len(self._told) >= 100:  # strangers choose the words
                self._told.clear()
            self._told[reason] = now
            self._events.emit("refused", f"rejected a peer: {reason}", reason=reason)

    def _own_hello(self, *, lost: bool = False) -> Hello:
        status = self._cache.status()
        return Hello(
            role="secondary",
            pair=self._options.pair,
            history=bytes(status.history_id),
            sealed_epoch=status.sealed_epoch,
            used_epoch=max(status.receiving_epoch, status.sealed_epoch),
            lost=lost,
            machine=self._machine_name,
            blocks=next_blocks(self._cache),
            streams=self._options.streams,
            session=secrets.token_bytes(16),
            disks=self._disks.sizes,
            disk_log=self._disks.limit_bytes,
        )

    def _greet(self, channel: Channel, first: Message | ProtocolError) -> bool:
        """HELLO both ways. False: whoever came was no primary of ours, and was told why."""
        own = self._own_hello()
        try:
            if isinstance(first, ProtocolError):
                raise first
            if meaning_of(State.AT_THE_DOOR, first) is Meaning.JOINS:
                # Of a primary that was lost before its streams were taken.
                channel.abort(AbortKind.REFUSED, "the stream belongs to a session that is over")
                return False
            meeting, sentence = meet(own, Hello.decode(first.body))
        except ProtocolError as error:
            channel.abort(AbortKind.SESSION, str(error))
            self.refuse(str(error))
            return False
        if meeting is Meeting.DECLARED_LOST:
            end_with(channel, AbortKind.REFUSED, sentence)
            raise DeclaredLostError(sentence)
        if meeting not in (Meeting.FRESH, Meeting.GO_ON, Meeting.HEARD_LATE):
            channel.abort(AbortKind.REFUSED, sentence)
            self.refuse(sentence)
            return False
        return self._let_in(channel, own)

    def _let_in(self, channel: Channel, own: Hello) -> bool:
        self._room.close()
        try:
            channel.send(MessageType.HELLO, body=own.encode())
            take_streams(
                self._room,
                channel,
                own,
                seconds=STREAMS_SHARE * self._options.timing.peer_timeout,
                refused=lambda reason: self.refuse(f"a stream: {reason}"),
            )
            self._room.close()
            low, high = split_u64(self._ready())
            channel.send(MessageType.CHECKPOINT_READY, a=low, b=high)
        except (TimedOutError, ProtocolError) as error:
            end_with(channel, AbortKind.SESSION, str(error))
            raise
        except RefusedError as error:
            self.refuse(str(error))
            return False
        self._events.emit(
            "hello",
            f"paired with a primary, newest sealed epoch {own.sealed_epoch}",
            sealed_epoch=own.sealed_epoch,
            used_epoch=own.used_epoch,
        )
        return True
