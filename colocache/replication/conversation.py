# SPDX-License-Identifier: Apache-2.0
"""The conversation as one table: what each message means where the conversation stands, and what two HELLOs make.

Both sides ask it (`meaning_of`, `meet`), and tests/test_conversation_model.py compares it with what the model checker's
two sides hear. A message that the table does not have where it comes ends the session with one sentence.

How it goes when nothing is wrong, N being the epoch:

    P GREETING   HELLO ->             S AT_THE_DOOR
                 <- HELLO             S STREAMS, if there are further streams: STREAM -> on each
    P ACCEPTED   <- CHECKPOINT_READY  S READY
    P BETWEEN    PAGES(N), OUTPUT(N), INPUT -> S BETWEEN, both machines running; DISK -> at any time until both stand
                 CHECKPOINT_REQUEST(N) ->
    P REQUESTED  <- CHECKPOINT_REPLY(N)   S PAUSED
                 PAGES(N), OUTPUT(N), VMSTATE_SEND(N) ->  S COMPLETING
                 PAGES(N), OUTPUT(N), INPUT(N), DISKS(N), VMSTATE_SIZE(N) ->
    P SENT       <- VMSTATE_RECEIVED(N)   after the seal; the secondary reads nothing until it runs again
    P SEALED     <- VMSTATE_LOADED(N)     S BETWEEN
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from typing import NamedTuple

from colocache.replication.errors import ProtocolError
from colocache.replication.hello import Hello
from colocache.replication.messages import AbortKind, Message, MessageType, decode_reason


class Meaning(Enum):
    """What a message says, with the sentence."""

    ALIVE = "the peer lives; nothing else"
    ANSWER = "what this state waits for"
    JOINS = "a further stream of a session shows its token"
    PAGES = "pages for the cache"
    OUTPUT = "what the primary's machine sent, kept for a takeover"
    TYPED = "what the world typed at the primary, kept for a takeover"
    TAKEN_IN = "how much of it the state of this epoch has taken in"
    DISK = "what the primary's machine wrote to a disk, kept for the epoch's seal"
    DISKS = "how many of these writes there were"
    CHECKPOINT = "a checkpoint begins"
    CHECKPOINT_WANTED = "the secondary asks for a checkpoint"
    EPOCH_GIVEN_UP = "the epoch is over and the session goes on: what it carried comes again with the next"
    SESSION_ENDS = "this connection is over; the pair may meet again"
    REFUSED = "the two do not belong together"
    SECONDARY_LOST = "the epoch is sealed and can't be run: the primary is alone"
    TOOK_OVER = "the secondary is the machine the world sees: the primary stands still"
    ENDED = "the primary was ended by its operator"


class Of(Enum):
    """Which epoch number a message must carry there."""

    ANY = "nobody looks at it"
    NONE = "0"
    THIS = "the epoch of the checkpoint"
    OPEN = "the epoch of which pages have come, and newer than every one before"


@dataclass(frozen=True)
class Hears:
    """One entry: `message` (an ABORT of `kind`) for the epoch `of` has this meaning."""

    message: MessageType
    meaning: Meaning
    of: Of = Of.ANY
    kind: AbortKind | None = None


@dataclass(frozen=True)
class Place:
    """Where a side stands: who speaks to it, what must come (for a sentence), and what that means for it."""

    sentence: str
    speaker: str
    awaits: str
    hears: tuple[Hears, ...]


M, A = MessageType, AbortKind
_ENDS = Hears(M.ABORT, Meaning.SESSION_ENDS, kind=A.SESSION)
_TOOK_OVER = Hears(M.ABORT, Meaning.TOOK_OVER, kind=A.TOOK_OVER)
_WANTED = Hears(M.CHECKPOINT_REQUEST, Meaning.CHECKPOINT_WANTED, Of.NONE)
_OUTPUT = Hears(M.OUTPUT, Meaning.OUTPUT, Of.OPEN)
_TYPED = Hears(M.INPUT, Meaning.TYPED, Of.NONE)
_DISK = Hears(M.DISK, Meaning.DISK, Of.NONE)
_PING, _PONG = Hears(M.PING, Meaning.ALIVE), Hears(M.PONG, Meaning.ALIVE)
_GIVEN_UP = Hears(M.ABORT, Meaning.EPOCH_GIVEN_UP, Of.THIS, A.CHECKPOINT)


class State(Enum):
    """Where one side of a conversation stands. AT_THE_DOOR to COMPLETING are the secondary's, the others the primary's.

    Between VMSTATE_SIZE and LOADED the secondary reads nothing: the epoch is finished whatever the primary says.
    """

    AT_THE_DOOR = Place(
        "somebody came and has not said who it is",
        "peer",
        "HELLO",
        (Hears(M.HELLO, Meaning.ANSWER), Hears(M.STREAM, Meaning.JOINS)),
    )
    STREAMS = Place(
        "a primary was answered, and its further streams must come",
        "primary",
        "its streams",
        (_PING, _ENDS, Hears(M.ABORT, Meaning.REFUSED, kind=A.REFUSED)),
    )
    READY = Place(
        "the secondary said CHECKPOINT_READY and has heard nothing since: the primary may still refuse it",
        "primary",
        "pages or CHECKPOINT_REQUEST",
        (
            Hears(M.PAGES, Meaning.PAGES),
            _OUTPUT,
            _TYPED,
            _DISK,
            _PING,
            Hears(M.CHECKPOINT_REQUEST, Meaning.CHECKPOINT, Of.OPEN),
            Hears(M.ABORT, Meaning.EPOCH_GIVEN_UP, Of.OPEN, A.CHECKPOINT),
            Hears(M.ABORT, Meaning.ENDED, kind=A.END),
            Hears(M.ABORT, Meaning.REFUSED, kind=A.REFUSED),
            _ENDS,
        ),
    )
    BETWEEN = Place(
        "between two checkpoints, both machines run",
        "primary",
        "pages or CHECKPOINT_REQUEST",
        (
            Hears(M.PAGES, Meaning.PAGES),
            _OUTPUT,
            _TYPED,
            _DISK,
            _PING,
            Hears(M.CHECKPOINT_REQUEST, Meaning.CHECKPOINT, Of.OPEN),
            Hears(M.ABORT, Meaning.EPOCH_GIVEN_UP, Of.OPEN, A.CHECKPOINT),
            Hears(M.ABORT, Meaning.ENDED, kind=A.END),
            _ENDS,
        ),
    )
    PAUSED = Place(
        "the secondary's machine stands, the primary's must",
        "primary",
        "VMSTATE_SEND",
        (
            Hears(M.PAGES, Meaning.PAGES, Of.THIS),  # of a far primary, which wrote much before it heard of this
            Hears(M.OUTPUT, Meaning.OUTPUT, Of.THIS),
            Hears(M.VMSTATE_SEND, Meaning.ANSWER, Of.THIS),
            _TYPED,
            _DISK,
            _PING,
            _GIVEN_UP,
            _ENDS,
        ),
    )
    COMPLETING = Place(
        "both machines stand, the device state is here, the last pages come",
        "primary",
        "VMSTATE_SIZE",
        (
            Hears(M.PAGES, Meaning.PAGES, Of.THIS),
            Hears(M.OUTPUT, Meaning.OUTPUT, Of.THIS),
            Hears(M.INPUT, Meaning.TAKEN_IN, Of.THIS),
            _TYPED,
            _DISK,
            Hears(M.DISKS, Meaning.DISKS, Of.THIS),
            Hears(M.VMSTATE_SIZE, Meaning.ANSWER, Of.THIS),
            _PING,
            _GIVEN_UP,
            _ENDS,
        ),
    )
    ON_A_STREAM = Place(
        "a further stream: pages, and PING(N) where those of an epoch end",
        "primary",
        "pages",
        (Hears(M.PAGES, Meaning.PAGES), _PING),
    )

    GREETING = Place(
        "the primary said HELLO",
        "secondary",
        "HELLO",
        (Hears(M.HELLO, Meaning.ANSWER), Hears(M.ABORT, Meaning.REFUSED, kind=A.REFUSED),
         Hears(M.ABORT, Meaning.REFUSED, kind=A.SESSION), _TOOK_OVER),
    )  # fmt: skip
    ACCEPTED = Place(
        "the two belong together, and the secondary gets ready",
        "secondary",
        "CHECKPOINT_READY",
        (Hears(M.CHECKPOINT_READY, Meaning.ANSWER), _PONG, _ENDS, _TOOK_OVER),
    )
    AT_REST = Place(
        "between two checkpoints, both machines run",
        "secondary",
        "PONG",
        (_PONG, _WANTED, _ENDS, _TOOK_OVER),
    )
    REQUESTED = Place(
        "the primary asked the secondary to stop its machine",
        "secondary",
        "CHECKPOINT_REPLY",
        (Hears(M.CHECKPOINT_REPLY, Meaning.ANSWER, Of.THIS), _PONG, _WANTED, _GIVEN_UP, _ENDS, _TOOK_OVER),
    )
    SENT = Place(
        "all of the epoch was sent: whether it is sealed only the answer tells",
        "secondary",
        "VMSTATE_RECEIVED",
        (Hears(M.VMSTATE_RECEIVED, Meaning.ANSWER, Of.THIS), _PONG, _WANTED, _GIVEN_UP, _ENDS, _TOOK_OVER),
    )
    TAKING_BACK = Place(
        "the primary gave up the epoch and waits until no page of it can come late on another stream",
        "secondary",
        "ABORT",
        (Hears(M.ABORT, Meaning.ANSWER, Of.THIS, A.CHECKPOINT), _PONG, _WANTED, _ENDS, _TOOK_OVER),
    )
    SEALED = Place(
        "the epoch is sealed, the primary runs again, the secondary flushes and loads",
        "secondary",
        "VMSTATE_LOADED",
        (
            Hears(M.VMSTATE_LOADED, Meaning.ANSWER, Of.THIS),
            _PONG,
            _WANTED,
            Hears(M.ABORT, Meaning.SECONDARY_LOST, Of.THIS, A.LOAD),
            _ENDS,
            _TOOK_OVER,
        ),
    )


NUMBERED = (M.CHECKPOINT_REPLY, M.VMSTATE_SEND, M.VMSTATE_SIZE, M.VMSTATE_RECEIVED, M.VMSTATE_LOADED)


def meaning_of(state: State, message: Message, *, this: int = 0, fits: Callable[[int], bool] = bool) -> Meaning:
    """What `message` means in `state`. ProtocolError: nothing, which ends the session.

    `this`: the epoch of the checkpoint that is under way; `fits`: may this number be that of the open epoch?
    """
    for entry in state.value.hears:
        if entry.message is message.type and (entry.kind is None or entry.kind == message.a):
            of, epoch = entry.of, message.epoch
            if (
                of is Of.ANY
                or (of is Of.NONE and epoch == 0)
                or (of is Of.THIS and epoch == this)
                or (of is Of.OPEN and fits(epoch))
            ):
                return entry.meaning
    raise out_of_order(state, message, this)


def out_of_order(state: State, message: Message, this: int = 0) -> ProtocolError:
    """The sentence about a message that may not come in `state`."""
    place: Place = state.value
    awaited = f"{place.awaits}({this})" if this and place.awaits in {kind.name for kind in NUMBERED} else place.awaits
    what = f"the {place.speaker} sent {message}"
    if message.type is MessageType.ABORT:
        return ProtocolError(f"{what} of kind {message.a} where {awaited} must come: {decode_reason(message.body)}")
    return ProtocolError(f"{what} where {awaited} must come")


# ---- what two HELLOs make ----


class Meeting(Enum):
    """What a primary and a secondary are to each other when both have said HELLO."""

    FRESH = "nothing is sealed: all of RAM is sent"
    GO_ON = "the newest sealed epoch is the same on both sides: what is unacknowledged is sent again"
    HEARD_LATE = "the epoch that was in flight is sealed: its RECEIVED was lost, and this is it"
    TOOK_OVER = "the secondary is the machine the world sees: the primary stands still"
    DECLARED_LOST = "the primary went on alone: this secondary must never take over"
    REFUSED = "the two do not belong together"


def meet(own: Hello, peer: Hello) -> tuple[Meeting, str]:
    """What the two HELLOs make, the same on both sides, and the sentence about it."""
    different = _difference(own, peer)
    if different is not None:
        return Meeting.REFUSED, different
    two = _Two(own, peer) if own.role == "primary" else _Two(peer, own)
    for meeting, when, sentence in _MEETINGS:
        if when(two):
            return meeting, sentence.format(p=two.p, s=two.s)
    raise AssertionError("the last row takes what the others leave")


class _Two(NamedTuple):
    p: Hello  # the primary's
    s: Hello  # the secondary's


# Asked in this order.
_MEETINGS: tuple[tuple[Meeting, Callable[[_Two], bool], str], ...] = (
    (
        Meeting.TOOK_OVER,
        lambda two: two.s.lost,
        (
            "the secondary took over at epoch {s.sealed_epoch}: this primary stands still, because the world "
            "must see one machine only"
        ),
    ),
    (Meeting.REFUSED, lambda two: two.s.history is None, "the secondary tells no history"),
    (
        Meeting.DECLARED_LOST,
        lambda two: two.p.lost and two.p.history == two.s.history and two.s.sealed_epoch > 0,
        "the primary declared this secondary lost: start a fresh one",
    ),
    # Nothing is sealed on either side: whose memory it was does not matter.
    (Meeting.FRESH, lambda two: two.s.sealed_epoch == 0 and two.p.sealed_epoch == 0, Meeting.FRESH.value),
    # The operator's --rejoin: the secondary that held the primary's epoch is given up, and this one takes its place.
    (Meeting.FRESH, lambda two: two.s.sealed_epoch == 0 and two.p.rejoin, Meeting.FRESH.value),
    (
        Meeting.REFUSED,
        lambda two: two.s.sealed_epoch == 0,
        (
            "this secondary is fresh, and the primary's own held epoch {p.sealed_epoch}: if that one is gone for good, "
            "start the primary with --rejoin to let a fresh one take its place"
        ),
    ),
    (
        Meeting.REFUSED,
        lambda two: two.p.history is None or two.p.lost,
        "the secondary holds epoch {s.sealed_epoch} of another primary: start a fresh one",
    ),
    (
        Meeting.REFUSED,
        lambda two: two.p.history != two.s.history,
        "the secondary has another history: its memory is not that of this pair",
    ),
    (Meeting.GO_ON, lambda two: two.s.sealed_epoch == two.p.sealed_epoch, Meeting.GO_ON.value),
    (Meeting.HEARD_LATE, lambda two: two.s.sealed_epoch == two.p.in_flight, Meeting.HEARD_LATE.value),
    (
        Meeting.REFUSED,
        lambda _two: True,
        (
            "the secondary's newest sealed epoch is {s.sealed_epoch}; the primary knows {p.sealed_epoch} to be sealed "
            "and sent {p.in_flight} since"
        ),
    ),
)


def _differing(own: str, peer: str) -> str:
    """The names of what differs, where both tell the same things as NAME HASH; "" where they do not."""
    here, there = own.split(", "), peer.split(", ")
    if len(here) != len(there):
        return ""
    other = [(a.rpartition(" ")[0], b.rpartition(" ")[0]) for a, b in zip(here, there, strict=True) if a != b]
    return ", ".join(mine for mine, _ in other) if all(mine and mine == theirs for mine, theirs in other) else ""


def _difference(own: Hello, peer: Hello) -> str | None:
    """Why these two can't be a pair whatever they hold, as one sentence; None if they can."""
    if own.role == peer.role:
        return f"both sides are a {own.role}: connect a primary to a secondary"
    if own.pair != peer.pair:
        return f"the peer belongs to pair {peer.pair!r}, this side to {own.pair!r}: give both the same --pair"
    for index, (here, there) in enumerate(zip_longest(own.disks, peer.disks)):
        if here != there:
            return (
                f"disk {index} has {there or 'no'} bytes at the peer and {here or 'no'} here: give both sides the same "
                f"number of --disk, and the secondary raw images of the sizes of the primary's disks"
            )
    if own.machine != peer.machine:
        names = _differing(own.machine, peer.machine)
        which = f"they differ in {names}; " if names else ""
        return (
            f"the peer's machine is {peer.machine!r}, this side's {own.machine!r}: {which}start both with the same "
            f"options and files"
        )
    if own.streams != peer.streams:
        return f"the peer uses {peer.streams} streams, this side {own.streams}: give both the same --streams"
    for index, (mine, theirs) in enumerate(zip_longest(own.blocks, peer.blocks)):
        if mine == theirs:
            continue
        if mine and theirs:
            return f"RAM block {index} is {theirs} at the peer and {mine} here"
        return (
            f"RAM block {index}, {mine or theirs}, is {'here' if mine else 'at the peer'} and not "
            f"{'at the peer' if mine else 'here'}: add or remove it on both sides, in the same order"
        )
    if len(own.blocks) != len(peer.blocks):
        return f"the peer has had {len(peer.blocks)} RAM blocks, this side {len(own.blocks)}: pages go by their index"
    return None
