# SPDX-License-Identifier: Apache-2.0
"""The messages between primary and secondary: their numbers, their bodies and the bounds of these. Moves no bytes.

What each may mean where the conversation stands is in conversation.py; this is what they carry.

Every message is a header of 40 bytes (`colocache.message_header`: type, epoch, length of the body, two 32-bit words a
and b, a checksum over all of it) and a body. Numbers 0 to 6 are QEMU's COLO messages; ours begin at 0x100.

====================  =========  ======================================================================
message               direction  epoch, a, b, body
====================  =========  ======================================================================
CHECKPOINT_READY      S→P        after HELLO: the secondary waits for pages; b:a = pages that the primary may have
                                 until the next checkpoint (64 bits; 0 = any number)
CHECKPOINT_REQUEST    P→S        epoch N; b:a = about how many pages it has; S→P with epoch 0: "please take
                                 a checkpoint"
CHECKPOINT_REPLY      S→P        epoch N: the secondary's VM stands still; b:a = pages that N may have (0 = any number)
VMSTATE_SEND          P→S        epoch N: the primary's VM stands still, its last pages follow; body: the device state
VMSTATE_SIZE          P→S        epoch N: that was all of it; b:a = pages sent for N (64 bits)
VMSTATE_RECEIVED      S→P        epoch N is sealed; b:a as in CHECKPOINT_READY
VMSTATE_LOADED        S→P        epoch N runs
INPUT                 P→S        epoch 0: console input, kept for a takeover; body: offset of its first byte (64 bits),
                                 then the bytes. Epoch N: so much of it the state of N has taken in; body: 64 bits
PAGES                 P→S        made and taken apart by the C library, never here
DISK                  P→S        a write to a disk (disks/write.py); it belongs to the epoch before whose SIZE it comes
DISKS                 P→S        epoch N, before SIZE: the number of writes that this connection has carried, and bytes
HELLO                 both       body: JSON, see hello.py
ABORT                 both       epoch or 0; a = `AbortKind`; body: the reason as UTF-8; from P for an epoch: b = pages
                                 sent for it (at most 2^32-1); with several streams S answers it with the same
PING, PONG            P→S, S→P   "I live": sent when nothing else was for a while
STREAM                P→S        the first message on a further connection: a = its index from 1, b = number of streams;
                                 body: see `Hello.stream_token`. Then PAGES, and PING(N) where they end for now
====================  =========  ======================================================================

This is version 7 of it, which HELLO tells; in version 6 the device state came last, with SIZE, version 5 had no disks,
version 4 had no INPUT, in version 3 nobody said how many pages an epoch may have, and version 2 had no OUTPUT. The
framing has a version of its own, in every header, which the C library looks at. Epoch numbers are below 2^48.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from colocache import MSG_PAGES, message_header, parse_header
from colocache.choices import PAIR_BYTES_MAX
from colocache.disks.write import BODY_BYTES_MAX as DISK_BYTES_MAX
from colocache.disks.write import TOTAL
from colocache.errors import PacketError
from colocache.outputs.travel import BODY_BYTES_MAX as OUTPUT_BYTES_MAX
from colocache.outputs.typed import KEPT_BYTES_MAX
from colocache.replication.errors import ProtocolError

CONVERSATION_VERSION = 7
EPOCH_LIMIT = 1 << 48  # numbers are below it, COLOCACHE_EPOCH_MAX: no message drives a pair to the end of its numbers
HELLO_BYTES_MAX = 512 << 10  # 256 blocks with the longest names, escaped, and some room
REASON_BYTES_MAX = 1024
STREAM_TOKEN_BYTES_MAX = 32 + PAIR_BYTES_MAX
U64_MAX = (1 << 64) - 1
OFFSET = struct.Struct("<Q")  # in the body of INPUT


class MessageType(IntEnum):
    """Number of a message in its header."""

    CHECKPOINT_READY = 0
    CHECKPOINT_REQUEST = 1
    CHECKPOINT_REPLY = 2
    VMSTATE_SEND = 3
    VMSTATE_SIZE = 4
    VMSTATE_RECEIVED = 5
    VMSTATE_LOADED = 6
    PAGES = MSG_PAGES
    HELLO = 0x101
    ABORT = 0x102
    PING = 0x103
    PONG = 0x104
    STREAM = 0x105
    OUTPUT = 0x106
    INPUT = 0x107
    DISK = 0x108
    DISKS = 0x109


class AbortKind(IntEnum):
    """What an ABORT gives up. Where it makes no sense it ends the session like anything else out of order."""

    CHECKPOINT = 1  # this epoch only, which is not sealed yet; the session goes on
    SESSION = 2  # this connection, at any time: it is closed after the message; the pair may reconnect
    REFUSED = 3  # the pair: the two do not belong together; the first word after the peer's HELLO or STREAM
    LOAD = 4  # the secondary: its device state did not load after the flush; from S instead of LOADED
    END = 5  # nothing is wrong: the primary was ended by its operator; from P, between checkpoints
    TOOK_OVER = 6  # the primary: the secondary has become the machine the world sees; from S, at any time


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
    if message is MessageType.VMSTATE_SEND:
        return device_state_max
    if message is MessageType.STREAM:
        return STREAM_TOKEN_BYTES_MAX
    if message is MessageType.OUTPUT:
        return OUTPUT_BYTES_MAX
    if message is MessageType.INPUT:
        return OFFSET.size + KEPT_BYTES_MAX
    if message is MessageType.DISK:
        return DISK_BYTES_MAX
    if message is MessageType.DISKS:
        return TOTAL.size
    return 0


class Message(NamedTuple):
    """A message's header, and its body once it was read (a device state is read straight into the cache instead)."""

    type: MessageType
    epoch: int
    body_len: int
    a: int
    b: int
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.type.name}({self.epoch})"


def packed(message: MessageType, *, epoch: int = 0, a: int = 0, b: int = 0, body: bytes = b"") -> list[bytes]:
    """A message as it goes over the wire, in its parts."""
    header = message_header(int(message), epoch, len(body), a, b)
    return [header, body] if body else [header]


def parse_message(header: bytes, device_state_max: int = 0) -> Message:
    """A message without its body, its length within its bound; the C library looked at the epoch. ProtocolError."""
    try:
        fields = parse_header(header)
    except PacketError as error:
        raise ProtocolError(f"what came is no message of colocache: {error}") from error
    try:
        kind = MessageType(fields.type)
    except ValueError:
        raise ProtocolError(f"the peer sent {name_of(fields.type)}, which does not exist") from None
    bound = body_bytes_max(kind, device_state_max)
    if kind is not MessageType.PAGES and fields.body_len > bound:
        raise ProtocolError(f"the peer announced {fields.body_len} bytes for {kind.name}, at most {bound} are allowed")
    return Message(kind, fields.epoch, fields.body_len, fields.a, fields.b)


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


def encode_input(offset: int, data: bytes = b"") -> bytes:
    """The body of an INPUT."""
    return OFFSET.pack(offset) + data


def decode_input(message: Message) -> tuple[int, bytes]:
    """Offset and bytes; of an epoch's, how much its state has taken in. ProtocolError."""
    offset, data = message.body[: OFFSET.size], message.body[OFFSET.size :]
    if len(offset) < OFFSET.size or bool(data) != (message.epoch == 0):
        raise ProtocolError(f"{message} has a body of {len(message.body)} bytes")
    return OFFSET.unpack(offset)[0], data
