# SPDX-License-Identifier: Apache-2.0
"""QEMU's option strings: `key=value,key=value`, a comma inside a value written twice, sizes with a suffix."""

from __future__ import annotations

import re
from fractions import Fraction

from colocache.errors import ArgumentError

SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)([bkmgtpe]?)", re.IGNORECASE)


def parse(text: str, implied: str | None = None) -> dict[str, str]:
    """The pairs of an option string, in order; where a key comes twice the last one counts, as in QEMU.

    A first part without `=` is the value of the key `implied`; any other such part is that key switched on.
    """
    pairs: dict[str, str] = {}
    for position, part in enumerate(split(text)):
        key, equals, value = part.partition("=")
        if equals:
            pairs[key] = value
        elif position == 0 and implied is not None:
            pairs[implied] = part
        elif part:
            pairs[part] = "on"
    return pairs


def split(text: str) -> list[str]:
    """The parts between single commas, double ones undone."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def escape(value: str) -> str:
    """`value` as it stands inside an option string."""
    return value.replace(",", ",,")


def size_bytes(text: str, default_suffix: str = "B") -> int:
    """A size as QEMU reads it: `512`, `1.5G`. ArgumentError if it is none."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise ArgumentError(f"{text!r} is no size: give a number and one of {', '.join(SUFFIXES)}, as in 512M")
    number, suffix = found.groups()
    scaled = Fraction(number) * (1 << SUFFIXES[(suffix or default_suffix).upper()])
    if scaled >= 1 << 63:
        raise ArgumentError(f"a size of {text} is more than 2^63 - 1 bytes")
    return int(scaled)


def is_on(value: str) -> bool:
    """Whether a switch with this value is on."""
    return value in {"on", "yes", "true", "y"}
