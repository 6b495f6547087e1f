# SPDX-License-Identifier: Apache-2.0
"""The messages between primary and secondary: their numbers, their bodies and the bounds of these. Moves no bytes.

Every message is a header of 40 bytes (`colocache.message_header`: type, epoch, length of the body, two 32-bit words a
and b, a checksum over all of it) and a body. Numbers 0 to 6 are QEMU's COLO messages; ours begin at 0x100.

====================  =========  ======================================================================
message               direction  epoch, a, b, body
====================  =========  ======================================================================
CHECKPOINT_READY      S→P        after HELLO: the secondary waits for pages
CHECKPOINT_REQUEST    P→S        epoch N; S→P with epoch 0: "please take a checkpoint"
CHECKPOINT_REPLY      S→P        epoch N: the secondary's VM stands still
VMSTATE_SEND          P→S        epoch N: the primary's VM stands still, its last pages follow
VMSTATE_SIZE          P→S        epoch N; b:a = pages sent for N (64 bits); body: the device state
VMSTATE_RECEIVED      S→P        epoch N is sealed
VMSTATE_LOADED        S→P        epoch N runs; b:a = nanoseconds the secondary spent comparing hashes
PAGES                 P→S        made and taken apart by the C library, never here
HELLO                 both       body: JSON, see `Hello`
ABORT                 both       epoch or 0; a = `AbortKind`; body: the reason as UTF-8; from P for an epoch: b = pages
                                 sent for it (at most 2^32-1); with several streams S answers it with the same
PING, PONG            P→S, S→P   "I live": sent when nothing else was for a while; PING(N) in a checkpoint:
                                 b:a = nanoseconds the primary spent making hashes
STREAM                P→S        the first message on a further connection: a = its index from 1, b = number of streams;
                                 body: see `Hello.stream_token`. Then PAGES, and PING(N) where they end for now
====================  =========  ======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from colocache.choices import STREAMS_MAX
from colocache.replication.errors import ProtocolError
from colocache.spec import BLOCKS_MAX

WIRE_VERSION = 1
HELLO_BYTES_MAX = 512 << 10  # 256 blocks with the longest names, escaped, and some room
REASON_BYTES_MAX = 1024
PAIR_BYTES_MAX = 64
MACHINE_BYTES_MAX = 256
STREAM_TOKEN_BYTES_MAX = 32 + PAIR_BYTES_MAX
U64_MAX = (1 << 64) - 1


class MessageType(IntEnum):
    """Number of a message in its header."""

    CHECKPOINT_READY = 0
    CHECKPOINT_REQUEST = 1
    CHECKPOINT_REPLY = 2
    VMSTATE_SEND = 3
    VMSTATE_SIZE = 4
    VMSTATE_RECEIVED = 5
    VMSTATE_LOADED = 6
    PAGES = 0x100
    HELLO = 0x101
    ABORT = 0x102
    PING = 0x103
    PONG = 0x104
    STREAM = 0x105


class AbortKind(IntEnum):
    """What an ABORT gives up. Where it makes no sense it ends the session like anything else out of order."""

    CHECKPOINT = 1  # this epoch only, which is not sealed yet; the session goes on
    SESSION = 2  # this connection, at any time: it is closed after the message; the pair may reconnect
    REFUSED = 3  # the pair: the two do not belong together; the first word after the peer's HELLO or STREAM
    LOAD = 4  # the secondary: its device state did not load after the flush; from S instead of LOADED
    END = 5  # nothing is wrong: the primary was ended by its operator; from P, between checkpoints


def name_of(number: int) -> str:
    """Name of a message for a sentence, also of one that does not exist."""
    try:
        return MessageType(number).name
    except ValueError:
        return f"message {number:#x}"


def body_bytes_max(message: MessageType, device_state_max: int) -> int:
    """Longest body that may follow; asked before any memory is taken for it."""
    if message is MessageType.HELLO:
        return HELLO_BYTES_MAX
    if message is MessageType.ABORT:
        return REASON_BYTES_MAX
    if message is MessageType.VMSTATE_SIZE:
        return device_state_max
    if message is MessageType.STREAM:
        return STREAM_TOKEN_BYTES_MAX
    return 0


def split_u64(value: int) -> tuple[int, int]:
    """A 64-bit number as the words (a, b) of a header."""
    if not 0 <= value <= U64_MAX:
        raise ValueError(f"{value} does not fit into 64 bits")
    return value & 0xFFFFFFFF, value >> 32


def join_u64(a: int, b: int) -> int:
    """The 64-bit number in the words (a, b) of a header."""
    return b << 32 | a


def encode_reason(reason: str) -> bytes:
    """A reason as the body of an ABORT, cut at a character if it is too long."""
    return reason.encode("utf-8", "replace")[:REASON_BYTES_MAX].decode("utf-8", "ignore").encode()


def decode_reason(body: bytes) -> str:
    """The reason in the body of an ABORT, fit for one line of a terminal."""
    text = body[:REASON_BYTES_MAX].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text).strip() or "no reason given"


@dataclass(frozen=True)
class HelloBlock:
    """A RAM block as its owner sees it."""

    name: str
    len_bytes: int
    page_size: int

    def __str__(self) -> str:
        return f"{self.name} ({self.len_bytes} bytes in pages of {self.page_size})"


@dataclass(frozen=True)
class Hello:
    """The first message of both sides.

    `history` is the id made with the initial copy (16 bytes); a primary that has none yet says None. `sealed_epoch` is
    the newest epoch that this side knows to be sealed, `used_epoch` the newest number it has used or seen. `lost` from
    a primary: "I declared this history's secondary lost"; from a secondary: "I took over". `machine` says what kind of
    machine it is; the two must be equal, and so must `streams`, the number of connections that carry pages. `session`
    (16 bytes) is made by the secondary for each connection and names it to its further streams.
    """

    role: str
    pair: str
    history: bytes | None
    sealed_epoch: int
    used_epoch: int
    lost: bool
    machine: str
    blocks: tuple[HelloBlock, ...]
    wire_version: int = WIRE_VERSION
    streams: int = 1
    session: bytes | None = None

    def stream_token(self) -> bytes:
        """Of a secondary's HELLO: what a further stream must show to belong to this session."""
        return (self.session or b"") + (self.history or b"") + self.pair.encode()

    def encode(self) -> bytes:
        """The body of the message."""
        return json.dumps(
            {
                "wire_version": self.wire_version,
                "role": self.role,
                "pair": self.pair,
                "history": self.history.hex() if self.history is not None else None,
                "sealed_epoch": self.sealed_epoch,
                "used_epoch": self.used_epoch,
                "lost": self.lost,
                "machine": self.machine,
                "blocks": [[b.name, b.len_bytes, b.page_size] for b in self.blocks],
                "streams": self.streams,
                "session": self.session.hex() if self.session is not None else None,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def decode(cls, body: bytes) -> Hello:
        """Read the peer's HELLO; anything that is not exactly one raises ProtocolError."""
        try:
            fields = json.loads(
                body.decode("utf-8"),
                object_pairs_hook=_object,
                parse_int=_integer,
                parse_float=_refuse,
                parse_constant=_refuse,
            )
            if not isinstance(fields, dict):
                raise ValueError("it is not an object")
            version = _number(fields, "wire_version")
            if version != WIRE_VERSION:
                # Said before the other fields are looked at: another version may have others.
                raise ValueError(f"it speaks wire version {version}, this side {WIRE_VERSION}")
            if set(fields) != _FIELDS:
                raise ValueError(f"its fields are not those of version {WIRE_VERSION}")
            return cls(
                role=_choice(fields, "role", ("primary", "secondary")),
                pair=_text(fields, "pair", PAIR_BYTES_MAX),
                history=_id(fields, "history"),
                sealed_epoch=_epoch_number(fields, "sealed_epoch"),
                used_epoch=_epoch_number(fields, "used_epoch"),
                lost=_boolean(fields, "lost"),
                machine=_text(fields, "machine", MACHINE_BYTES_MAX),
                blocks=_blocks(fields["blocks"]),
                streams=_streams(fields),
                session=_id(fields, "session"),
            )
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the peer's HELLO can't be read: {_one_line(error)}") from error


def check_pair(own: Hello, peer: Hello) -> str | None:
    """Why these two can't be a pair, as one sentence; None if they can. Says nothing about histories."""
    if own.role == peer.role:
        return f"both sides are a {own.role}: connect a primary to a secondary"
    if own.pair != peer.pair:
        return f"the peer belongs to pair {peer.pair!r}, this side to {own.pair!r}: give both the same --pair"
    if own.machine != peer.machine:
        return f"the peer's machine is {peer.machine!r}, this side's {own.machine!r}: start both with the same options"
    if own.streams != peer.streams:
        return f"the peer uses {peer.streams} streams, this side {own.streams}: give both the same --streams"
    if own.blocks != peer.blocks:
        for index, (mine, theirs) in enumerate(zip(own.blocks, peer.blocks, strict=False)):
            if mine != theirs:
                return f"RAM block {index} is {theirs} at the peer and {mine} here"
        return f"the peer has {len(peer.blocks)} RAM blocks, this side {len(own.blocks)}"
    return None


_FIELDS = {
    "wire_version", "role", "pair", "history", "sealed_epoch", "used_epoch", "lost", "machine", "blocks", "streams",
    "session",
}  # fmt: skip


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a field stands there twice")
    return made


def _integer(digits: str) -> int:
    if len(digits) > 20:  # U64_MAX has 20 digits; int() of a long text would take quadratic time
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is no whole number")


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= U64_MAX:
        raise ValueError(f"{name} is no number from 0 to 2^64-1")
    return value


def _epoch_number(fields: dict[str, Any], name: str) -> int:
    """Below 2^63, so that a pair can't be driven to the end of its numbers by a HELLO."""
    value = _number(fields, name)
    if value >= 1 << 63:
        raise ValueError(f"{name} is {value}, and no pair has ever come that far")
    return value


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is neither true nor false")
    return value


def _text(fields: dict[str, Any], name: str, bytes_max: int) -> str:
    return _string(fields[name], name, bytes_max)


def _string(value: object, name: str, bytes_max: int) -> str:
    # isprintable() also refuses lone surrogates, which JSON can spell and UTF-8 can't.
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value.encode()) <= bytes_max:
        raise ValueError(f"{name} is no printable text of 1 to {bytes_max} bytes")
    return value


def _choice(fields: dict[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = fields[name]
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is not one of {', '.join(choices)}")
    return value


def _streams(fields: dict[str, Any]) -> int:
    streams = _number(fields, "streams")
    if not 1 <= streams <= STREAMS_MAX:
        raise ValueError(f"{streams} streams are not 1 to {STREAMS_MAX}")
    return streams


def _id(fields: dict[str, Any], name: str) -> bytes | None:
    value = fields[name]
    if value is None:
        return None
    if not isinstance(value, str) or len(value) != 32 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{name} is not 32 hexadecimal digits")
    return bytes.fromhex(value)


def _blocks(value: object) -> tuple[HelloBlock, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= BLOCKS_MAX:
        raise ValueError(f"blocks is no list of 1 to {BLOCKS_MAX}")
    blocks = []
    for item in value:
        if not isinstance(item, list) or len(item) != 3:
            raise ValueError("a block is not [name, len_bytes, page_size]")
        fields = {"len_bytes": item[1], "page_size": item[2]}
        name = _string(item[0], "the name of a block", 255)
        page_size, len_bytes = _number(fields, "page_size"), _number(fields, "len_bytes")
        if not 4096 <= page_size <= 2 << 20 or page_size & (page_size - 1):
            raise ValueError(f"pages of {page_size} bytes are no power of two from 4096 to 2 MiB")
        if len_bytes == 0 or len_bytes % page_size:
            raise ValueError(f"a block of {len_bytes} bytes is no multiple of its pages of {page_size}")
        blocks.append(HelloBlock(name, len_bytes, page_size))
    if len({b.name for b in blocks}) != len(blocks):
        raise ValueError("two blocks have the same name")
    return tuple(blocks)
