# SPDX-License-Identifier: Apache-2.0
"""Writes the seed corpus of both fuzzers: `seeds.py DIR` makes DIR/wire and DIR/region, a small file for each subject.

fuzz_wire.c and fuzz_region.c tell what the bytes of an input mean.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

PACKET, MESSAGE, RAW, CHANGE = range(4)  # fuzz_wire.c: make_stream
FRESH, IN_STEP = 0, 1
IN_MEMORY = 128  # not on a socket


def small(value: int, n_bytes: int) -> bytes:
    """One byte, or 255 and n_bytes (take_small)."""
    return bytes([value]) if value < 255 else b"\xff" + value.to_bytes(n_bytes, "little")


def packet(
    epoch: int, block: int, *runs: tuple[int, int, int], body: int = 0, checksum: int = 0, missing: int = 0
) -> bytes:
    """PAGES; a run is (first pfn, pages, 1 if they are zero pages); body, checksum: what is added to the right ones."""
    made = bytes([PACKET]) + small(epoch, 8) + small(block, 4) + small(len(runs), 4)
    for first, n_pages, flags in runs:
        made += small(first, 8) + small(n_pages, 4) + small(flags, 4)
    return made + small(body, 8) + small(checksum, 8) + struct.pack("<H", missing)


def message(number: int) -> bytes:
    return bytes([MESSAGE]) + struct.pack("<H", number) + small(3, 8) + small(0, 8) + b"\0\0"


WIRE = {
    "pages-then-a-message": bytes([FRESH]) + packet(1, 0, (0, 3, 0), (10, 1, 1)) + packet(1, 1, (4, 1, 0)) + message(7),
    "next-epoch": bytes([IN_STEP]) + packet(3, 0, (63, 3, 0)) + message(7),
    "an-epoch-of-before": bytes([IN_STEP]) + packet(2, 0, (0, 1, 0)) + message(7),
    "not-the-expected-epoch": bytes([IN_STEP | 2 | 4 << 2]) + packet(3, 0, (0, 1, 0)),
    "the-same-page-twice": bytes([FRESH]) + packet(1, 0, (5, 2, 0), (6, 1, 1), (5, 1, 0)) + message(7),
    "breaks-off": bytes([IN_STEP]) + packet(3, 0, (0, 1, 0)) + packet(3, 0, (2, 4, 0), (9, 1, 1), missing=5000),
    "past-the-end": bytes([FRESH]) + packet(1, 0, (69, 1, 0)) + packet(1, 0, (69, 2, 0)),
    "last-page-of-64-bits": bytes([FRESH]) + packet(1, 0, (2**64 - 1, 1, 0)),
    "many-pages-of-none": bytes([FRESH]) + packet(1, 0, (0, 2**32 - 1, 1)),
    "no-such-block": bytes([FRESH]) + packet(1, 2, (0, 1, 0)),
    "wrong-length": bytes([FRESH]) + packet(1, 0, (0, 1, 0), body=1),
    "wrong-checksum": bytes([FRESH]) + packet(1, 0, (0, 1, 0), checksum=1),
    "unknown-flags": bytes([FRESH]) + packet(1, 0, (0, 1, 2)),
    "a-run-of-no-pages": bytes([FRESH]) + packet(1, 0, (0, 1, 0), (3, 0, 0)),
    "no-runs": bytes([FRESH]) + packet(1, 0),
    "a-changed-byte": bytes([FRESH]) + packet(1, 0, (0, 1, 0)) + bytes([CHANGE]) + struct.pack("<HB", 8, 1),
    "nonsense": bytes([IN_STEP, RAW, 40]) + bytes(range(40)),
    "largest-epoch": bytes([FRESH]) + packet(2**64 - 2, 0, (0, 1, 0)) + message(7),
}

BIT, WORD, SIZE, HOLE, COPY, SUMS = range(6)  # fuzz_region.c: damage
HEAD, TABLE, END, ANYWHERE = range(4)  # take_offset
STATES = 6


def at(where: int, offset: int) -> bytes:
    return bytes([where]) + offset.to_bytes(4 if where == ANYWHERE else 2, "little")


def word(where: int, offset: int, value: int) -> bytes:
    return bytes([WORD]) + at(where, offset) + small(value, 8)


DAMAGE = {
    "none": b"",
    "bit-of-the-head": bytes([BIT]) + at(HEAD, 128) + b"\x01",
    "bit-of-the-commit-word": bytes([BIT]) + at(HEAD, 192) + b"\x01",
    "word-of-an-entry": word(TABLE, 256, 2**64 - 4096),
    "offset-of-bitmaps": word(TABLE, 336, 4096),
    "many-blocks": word(HEAD, 72, 255),
    "bits-of-bitmaps": bytes([BIT]) + at(END, 4095) + b"\xff" + bytes([BIT]) + at(END, 8191) + b"\xff",
    "epoch-of-a-record": word(HEAD, 264, 2),
    "epoch-of-the-other-record": word(HEAD, 392, 2),
    "record-with-a-right-checksum": word(HEAD, 264, 99) + bytes([SUMS]),
    "a-block-was-removed": word(HEAD, 256 + 80, 1) + word(HEAD, 384 + 80, 1) + bytes([SUMS]),
    "all-blocks-were-removed": word(HEAD, 256 + 80, 0) + word(HEAD, 384 + 80, 0) + bytes([SUMS]),
    "more-blocks-than-there-are": word(HEAD, 256 + 72, 3) + word(HEAD, 384 + 72, 3) + bytes([SUMS]),
    "shorter": bytes([SIZE]) + struct.pack("<I", 140 << 10),
    "longer": bytes([SIZE]) + struct.pack("<I", 400 << 10),
    "hole": bytes([HOLE]) + at(END, 4096),
    "one-record-over-the-other": bytes([COPY]) + at(HEAD, 256) + at(HEAD, 384),
    "one-entry-over-the-other": bytes([COPY]) + at(TABLE, 256) + at(TABLE, 768),
}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    files = {f"wire/{name}": data for name, data in WIRE.items()}
    files |= {f"wire/{name}-in-memory": bytes([data[0] | IN_MEMORY]) + data[1:] for name, data in WIRE.items()}
    for state in range(STATES):
        files |= {f"region/{state}-{name}": bytes([state]) + data for name, data in DAMAGE.items()}
    for name, data in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
