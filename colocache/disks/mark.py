# SPDX-License-Identifier: Apache-2.0
"""What a disk's file says of itself: whose it was and of which epoch, so that nobody takes one that is ahead, or half a
copy, for another.

It stands in the file's extended attribute `user.colocache`, beside the guest's bytes and never among them: it goes
where the file goes, is gone with it, is not on a copy that somebody else made, and one call replaces all of it or
nothing. A file system or a device that has no such attributes leaves a disk without a mark: nothing is known of it.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

ATTRIBUTE = "user.colocache"
MARK_BYTES_MAX = 1024
TEXT_MAX = 128


class Was(Enum):
    """What a disk was when its mark was made."""

    PRIMARY = "primary"  # the world's: a machine has written to it, since
    TOOK_OVER = "took over"  # a secondary's image, which became the world's
    COPYING = "copying"  # a secondary's image before its first epoch: a part of a disk
    SECONDARY = "secondary"  # a secondary's image


@dataclass(frozen=True)
class Mark:
    """`epoch`: a secondary's image is of this one, a world's disk is ahead of it. `applying`: the one whose log is
    being applied, 0 = none. `region` and `region_id` are a secondary's; `boot` is the host's run that it is of."""

    was: Was
    pair: str
    epoch: int = 0
    applying: int = 0
    region: str = ""
    region_id: str = ""
    boot: str = ""

    def at(self, epoch: int, applying: int = 0) -> Mark:
        """A secondary's, later."""
        return replace(self, was=Was.SECONDARY if epoch else self.was, epoch=epoch, applying=applying)

    @property
    def ahead(self) -> bool:
        """Was it the world's? Then no secondary's epoch is as new as it."""
        return self.was in (Was.PRIMARY, Was.TOOK_OVER)

    def __str__(self) -> str:
        if self.was is Was.PRIMARY:
            text = f"was the disk of a primary of pair {self.pair}, ahead of epoch {self.epoch} and of everybody"
        elif self.was is Was.TOOK_OVER:
            text = (
                f"was the image of region {self.region} of pair {self.pair}, whose machine took over at epoch "
                f"{self.epoch}: ahead of everybody"
            )
        elif self.was is Was.COPYING:
            text = f"has a part of a disk of pair {self.pair}: its first copy, for region {self.region}, is not whole"
        else:
            text = f"is the image of region {self.region} of pair {self.pair}, epoch {self.epoch}"
            if self.applying:
                text += f" with a part of epoch {self.applying}: what was being applied"
        stale = self.boot and self.boot != boot_id() and self.was is not Was.PRIMARY
        return text + (" (before this host's newest start: what had not reached its medium is lost)" if stale else "")

    def as_json(self) -> dict[str, object]:
        """For inspect."""
        return {**asdict(self), "was": self.was.value, "ahead": self.ahead}


@cache
def boot_id() -> str:
    """Of this run of the host; "" where nobody tells."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def read_mark(disk: int | str) -> Mark | None:
    """Of an open file or a path. None: it has none, or none that can be read."""
    try:
        found = os.getxattr(disk, ATTRIBUTE)
        if len(found) > MARK_BYTES_MAX:
            return None
        fields = json.loads(found)
        return Mark(
            Was(fields["was"]),
            _text(fields["pair"]),
            _number(fields["epoch"]),
            _number(fields["applying"]),
            _text(fields["region"]),
            _text(fields["region_id"]),
            _text(fields["boot"]),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def write_mark(disk: int | str, mark: Mark) -> bool:
    """In the place of what was there; False: here is no place for it."""
    try:
        os.setxattr(disk, ATTRIBUTE, json.dumps(replace(mark, boot=boot_id()).as_json()).encode())
    except OSError:
        return False
    return True


def can_read(path: str) -> bool:
    """Is there such a file, for this user?"""
    return os.access(path, os.R_OK)


def can_mark(disk: int | str) -> bool:
    """Is there a place for one? A long one: a full file system may still have room for a byte beside the inode."""
    try:
        os.setxattr(disk, f"{ATTRIBUTE}.probe", b"x" * MARK_BYTES_MAX)
        os.removexattr(disk, f"{ATTRIBUTE}.probe")
    except OSError:
        return False
    return True


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > TEXT_MAX:
        raise ValueError("no text of a mark")
    return "".join(char if char.isprintable() else "?" for char in value)


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError("no epoch of a mark")
    return value
