# SPDX-License-Identifier: Apache-2.0
"""Pieces of output as they travel to the secondary, with what its front must know of the primary's.

origin (24 bytes), then for each piece: channel (u8), offset (u64), length (u32), data; all little-endian
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from colocache.errors import PacketError
from colocache.outputs.piece import CARD, Piece

BODY_BYTES_MAX = 1 << 20
PIECE_BYTES_MAX = BODY_BYTES_MAX // 2
HEAD, PIECE = struct.Struct("<16sq"), struct.Struct("<BQI")


class Origin(NamedTuple):
    """Where the primary's front shows the console: a file that another process of the same host can know again.

    `identity` of the file, 16 bytes, zeros if it is none; `base`: its size before offset 0 of the console was added.
    """

    identity: bytes = bytes(16)
    base: int = 0


def pack(pieces: Iterable[Piece], origin: Origin) -> Iterator[bytes]:
    """Bodies of at most BODY_BYTES_MAX bytes that hold these pieces; none if there are none."""
    body = bytearray()
    for piece in pieces:
        for at in range(0, len(piece.data), PIECE_BYTES_MAX):
            data = piece.data[at : at + PIECE_BYTES_MAX]
            if body and len(body) + PIECE.size + len(data) > BODY_BYTES_MAX:
                yield bytes(body)
                body.clear()
            if not body:
                body += HEAD.pack(*origin)
            body += PIECE.pack(piece.channel, piece.offset + at, len(data)) + data
    if body:
        yield bytes(body)


def unpack(epoch: int, body: bytes) -> tuple[Origin, list[Piece]]:
    """The pieces again, all of them of `epoch`. PacketError: this is no such body."""
    pieces = []
    try:
        origin, at = Origin(*HEAD.unpack_from(body)), HEAD.size
        while at < len(body):
            channel, offset, n_bytes = PIECE.unpack_from(body, at)
            at += PIECE.size
            if channel > CARD or at + n_bytes > len(body):
                raise PacketError(f"a piece of output of {n_bytes} bytes on channel {channel} at byte {at} is damaged")
            pieces.append(Piece(epoch, channel, offset, body[at : at + n_bytes]))
            at += n_bytes
    except struct.error as error:
        raise PacketError(f"output of {len(body)} bytes is damaged: {error}") from error
    return origin, pieces
