# SPDX-License-Identifier: Apache-2.0
"""HELLO, the first message of both sides: who speaks, what it knows of its pair, and what memory it has.

The body is a JSON object with exactly the fields of `Hello`. Whoever reads it trusts nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colocache.choices import PAIR_BYTES_MAX, STREAMS_MAX
from colocache.disks.write import DISKS_MAX
from colocache.replication.errors import ProtocolError
from colocache.replication.messages import CONVERSATION_VERSION, EPOCH_LIMIT, U64_MAX
from colocache.spec import BLOCKS_MAX

MACHINE_BYTES_MAX = 256


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
    the newest epoch that this side knows to be sealed, `used_epoch` the newest number it has used or seen, `in_flight`
    a primary's epoch that was sent whole and never answered (0: there is none). `lost` from a primary: "I declared this
    history's secondary lost"; from a secondary: "I took over". `rejoin` from a primary: its operator allows it to give
    up its history for a fresh secondary. `machine` says what kind of machine it is; the two must be equal, and so must
    `streams`, the number of connections that carry pages. `session` (16 bytes) is made by the secondary for each
    connection and names it to its further streams. `blocks` are those of the next epoch by their index, which pages on
    the wire name; None for one that was removed, whose index is not used again. `disks` are their sizes in bytes,
    `disk_log` is how many bytes of writes to them the secondary keeps for an epoch (0: any number, or a primary's).
    """

    role: str
    pair: str
    history: bytes | None
    sealed_epoch: int
    used_epoch: int
    lost: bool
    machine: str
    blocks: tuple[HelloBlock | None, ...]
    wire_version: int = CONVERSATION_VERSION
    streams: int = 1
    session: bytes | None = None
    in_flight: int = 0
    rejoin: bool = False
    disks: tuple[int, ...] = ()
    disk_log: int = 0

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
                "blocks": [b and [b.name, b.len_bytes, b.page_size] for b in self.blocks],
                "streams": self.streams,
                "session": self.session.hex() if self.session is not None else None,
                "in_flight": self.in_flight,
                "rejoin": self.rejoin,
                "disks": list(self.disks),
                "disk_log": self.disk_log,
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
            if version != CONVERSATION_VERSION:
                # Said before the other fields are looked at: another version may have others.
                raise ValueError(f"it speaks version {version} of the conversation, this side {CONVERSATION_VERSION}")
            if set(fields) != _FIELDS:
                raise ValueError(f"its fields are not those of version {CONVERSATION_VERSION}")
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
                in_flight=_epoch_number(fields, "in_flight"),
                rejoin=_boolean(fields, "rejoin"),
                disks=_disks(fields["disks"]),
                disk_log=_number(fields, "disk_log"),
            )
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the peer's HELLO can't be read: {_one_line(error)}") from error


_FIELDS = {
    "wire_version", "role", "pair", "history", "sealed_epoch", "used_epoch", "lost", "machine", "blocks", "streams",
    "session", "in_flight", "rejoin", "disks", "disk_log",
}  # fmt: skip


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a field occurs twice")
    return made


def _integer(digits: str) -> int:
    if len(digits) > 20:  # U64_MAX has 20 digits; int() of a long text would take quadratic time
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not a whole number")


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= U64_MAX:
        raise ValueError(f"{name} is not a number from 0 to 2^64-1")
    return value


def _epoch_number(fields: dict[str, Any], name: str) -> int:
    value = _number(fields, name)
    if value >= EPOCH_LIMIT:
        raise ValueError(f"{name} is {value}; epoch numbers are below 2^48")
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
        raise ValueError(f"{name} is not printable text of 1 to {bytes_max} bytes")
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


def _disks(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > DISKS_MAX:
        raise ValueError(f"disks is not a list of at most {DISKS_MAX}")
    return tuple(_number({"the size of a disk": size}, "the size of a disk") for size in value)


def _blocks(value: object) -> tuple[HelloBlock | None, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= BLOCKS_MAX:
        raise ValueError(f"blocks is not a list of 1 to {BLOCKS_MAX}")
    blocks: list[HelloBlock | None] = []
    for item in value:
        if item is None:
            blocks.append(None)
            continue
        if not isinstance(item, list) or len(item) != 3:
            raise ValueError("a block is not [name, len_bytes, page_size]")
        fields = {"len_bytes": item[1], "page_size": item[2]}
        name = _string(item[0], "the name of a block", 255)
        page_size, len_bytes = _number(fields, "page_size"), _number(fields, "len_bytes")
        if not 4096 <= page_size <= 2 << 20 or page_size & (page_size - 1):
            raise ValueError(f"pages of {page_size} bytes are not a power of two from 4096 to 2 MiB")
        if len_bytes == 0 or len_bytes % page_size:
            raise ValueError(f"a block of {len_bytes} bytes is not a multiple of its pages of {page_size}")
        blocks.append(HelloBlock(name, len_bytes, page_size))
    names = [b.name for b in blocks if b is not None]
    if len(set(names)) != len(names):
        raise ValueError("two blocks have the same name")
    return tuple(blocks)
