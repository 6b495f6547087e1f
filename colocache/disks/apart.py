# SPDX-License-Identifier: Apache-2.0
"""The secondary's half: its images, and the two logs in which the primary's writes wait. Knows no sockets.

What always holds, and which verbs see to it:

* An image is the disk of the newest committed epoch, and of none else, from the first seal on; before it whatever comes
  goes straight there.
* What comes is in the open log, in its order. The seal that names it (`sealing` tells how) makes it the sealed one.
* The sealed log is applied before its epoch is called committed, and again by every `attach`: the same bytes at the
  same places, so twice is harmless. It is kept until the next epoch is sealed.
* An epoch that is given up leaves the open log as it is: the guest was told that these writes are done, so they belong
  to the next epoch. A primary that comes back sends all that is not sealed again: `lost`.

=========  ======================  =======================================  ==================
verb       open log                sealed log                               images
=========  ======================  =======================================  ==================
come       one write more                                                   (before epoch 1: it)
lost       empty
sealed     becomes the sealed one  is empty, and the open one
apply                                                                       become the epoch
attach     empty                   as the commit record names it, applied   become the epoch
=========  ======================  =======================================  ==================
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from colocache import Attachment
from colocache.disks.epoch_log import EpochLog, Extent
from colocache.disks.image import Image
from colocache.disks.mark import Mark, Was, can_mark, read_mark, write_mark
from colocache.disks.write import RESERVE_BYTES, Total, unpack
from colocache.errors import ArgumentError, CorruptError, IncompleteError, OrderError, TooLargeError, reason_of

LOG_LIMIT_DEFAULT = 1 << 30


@dataclass(frozen=True)
class Applied:
    """What the newest `apply` did to the images: writes, bytes of log, nanoseconds."""

    n_writes: int = 0
    n_bytes: int = 0
    ns: int = 0


class Disks(Protocol):
    """What a secondary's machine is told of its disks: ApartDisks, NoDisks, or a test's own."""

    epoch: int  # newest that is sealed; whoever seals says it

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each."""

    @property
    def limit_bytes(self) -> int:
        """Bytes of writes that an epoch may have."""

    def come(self, body: bytes) -> None:
        """A DISK message. PacketError, TooLargeError, SystemCallError."""

    def told(self, total: Total) -> None:
        """The primary's count of what this connection has carried, before SIZE."""

    def lost(self) -> None:
        """A connection begins: what the one before carried for no sealed epoch comes again."""

    def sealing(self) -> Attachment:
        """The epoch is about to be sealed with what has come. IncompleteError."""

    def sealed(self) -> None:
        """It is."""

    def apply(self) -> None:
        """The images become the sealed epoch. CorruptError, SystemCallError: not wholly, and it may be repeated."""

    def tidy(self) -> None:
        """No machine stands: what took room and is not needed goes."""

    @property
    def applied(self) -> Applied:
        """The newest."""

    def take_over(self) -> None:
        """The images are the world's: nothing that comes is theirs any more."""


class NoDisks:
    """Of a machine whose disks nobody looks at."""

    sizes: tuple[int, ...] = ()
    limit_bytes = 0
    applied = Applied()
    epoch = 0
    were: tuple[Mark | None, ...] = ()

    def come(self, body: bytes) -> None:
        """See Disks."""
        unpack(body, self.sizes)

    def attach(self, sealed_epoch: int, found: Attachment) -> None:
        """See ApartDisks."""

    def close(self) -> None:
        """See ApartDisks."""

    def told(self, total: Total) -> None:
        """See Disks."""

    def lost(self) -> None:
        """See Disks."""

    def sealing(self) -> Attachment:
        """See Disks."""
        return Attachment()

    def sealed(self) -> None:
        """See Disks."""

    def apply(self) -> None:
        """See Disks."""

    def tidy(self) -> None:
        """See Disks."""

    def take_over(self) -> None:
        """See Disks."""


class ApartDisks:
    """See the head of this file. One thread. Owns images and logs."""

    def __init__(
        self,
        images: Sequence[Image],
        logs: tuple[EpochLog, EpochLog],
        *,
        limit_bytes: int = LOG_LIMIT_DEFAULT,
        mark: Mark | None = None,
    ) -> None:
        self.images = tuple(images)
        self.sizes = tuple(image.size for image in images)
        self.limit_bytes = limit_bytes
        self._logs = logs
        self._slot = 0  # of the sealed log
        self._direct = True  # nothing is sealed: there is no epoch that an image must stay
        self._over = False
        self._total = Total()
        self._told: Total | None = None
        self.applied = Applied()
        self.epoch = 0
        self._mark = mark
        self.were = tuple(read_mark(image.fd) for image in images)  # before this process

    @property
    def open(self) -> EpochLog:
        """The open log."""
        return self._logs[1 - self._slot]

    @property
    def sealed_log(self) -> EpochLog:
        """The sealed log."""
        return self._logs[self._slot]

    def come(self, body: bytes) -> None:
        """See Disks."""
        if self._over:
            raise OrderError("the disks are the world's: no write of a primary is taken")
        write = unpack(body, self.sizes)
        if self._direct:
            self.images[write.disk].apply(write)
        else:
            if self.open.extent.n_bytes + len(write.data) > self.limit_bytes:
                raise TooLargeError(
                    f"the primary wrote more than the {self.limit_bytes} bytes that the log of disk writes may have"
                )
            self.open.append(write)
        self._total = self._total.plus(write)
        self._told = None

    def told(self, total: Total) -> None:
        """See Disks."""
        self._told = total

    def lost(self) -> None:
        """See Disks."""
        self._total, self._told = Total(), None
        self.open.empty()

    def sealing(self) -> Attachment:
        """See Disks."""
        if self._told != self._total:
            told = "nothing" if self._told is None else str(self._told)
            raise IncompleteError(f"{self._total} to disks have come, and the primary told of {told}")
        extent = self.open.extent
        return Attachment(1 - self._slot, extent.n_bytes, extent.checksum)

    def sealed(self) -> None:
        """See Disks."""
        self._direct = False
        self._told = None
        self._slot = 1 - self._slot
        self.open.empty()

    def apply(self) -> None:
        """See Disks."""
        log, begin, n_writes = self.sealed_log, time.monotonic_ns(), 0
        if self._mark:
            self._write_mark(self._mark.at(self._mark.epoch, self.epoch))
        for write in log.read(log.extent, self.sizes):
            self.images[write.disk].apply(write)
            n_writes += 1
        if self._mark:
            self._write_mark(self._mark.at(self.epoch))
        self.applied = Applied(n_writes, log.extent.n_bytes, time.monotonic_ns() - begin)

    def _write_mark(self, mark: Mark) -> None:
        self._mark = mark
        for image in self.images:
            write_mark(image.fd, mark)

    def attach(self, sealed_epoch: int, found: Attachment) -> None:
        """In a process that attached to a region: the images become its sealed epoch.

        CorruptError: the log is not what the epoch's record says, and no image was touched.
        """
        for log in self._logs:
            log.take(Extent())
        self.epoch = sealed_epoch
        if sealed_epoch:
            self._check_marks(sealed_epoch)
            if found.slot not in (0, 1):
                raise CorruptError(f"epoch {sealed_epoch} names log {found.slot} of two")
            self._direct = False
            self._slot = found.slot
            extent = Extent(found.n_bytes, found.checksum)
            self.sealed_log.verify(extent, self.sizes)
            self.sealed_log.take(extent)
            self.apply()
        else:
            self.sealed_log.empty()
            if self._mark:
                self._write_mark(self._mark)
        self.open.empty()
        self.tidy()

    def _check_marks(self, sealed_epoch: int) -> None:
        """ArgumentError: an image is not the one that the region's epochs were applied to."""
        for image, was in zip(self.images, self.were, strict=True):
            if self._mark is None or (was is None and not can_mark(image.fd)):
                continue  # nobody can tell
            if was is None or was.ahead or was.region_id != self._mark.region_id:
                raise ArgumentError(
                    f"the image {image.path} is not of epoch {sealed_epoch} of region {self._mark.region}: it "
                    f"{was or 'has no mark, as one has that another program made'}",
                    hint="give the region's own image; another is used for a fresh region, which takes a whole copy",
                )
            self._mark = replace(was, pair=self._mark.pair, region=self._mark.region)

    def tidy(self) -> None:
        """See Disks."""
        self.open.give_back()

    def take_over(self) -> None:
        """See Disks. What was written to the images goes to their medium, beside the guest."""
        if not self._over:
            self._over = True
            if self._mark:
                self._write_mark(replace(self._mark, was=Was.TOOK_OVER, epoch=self.epoch, applying=0))
            for image in self.images:
                image.sync_beside()

    def close(self) -> None:
        """Let go of the files."""
        for image in self.images:
            image.close()
        for log in self._logs:
            log.close()


def log_paths(images: Sequence[str], folder: str, name: str) -> tuple[str, str]:
    """Where the two logs of region `name` are: in `folder`, or beside the first image."""
    where = Path(folder) if folder else Path(images[0]).absolute().parent
    return str(where / f"{name}.disk-log.0"), str(where / f"{name}.disk-log.1")


def _open_log(path: str) -> int:
    """Open and locked: `clean` leaves what has a lock. One that it removed between the two is made anew. OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):  # noqa: PTH116 -- samestat's own kind
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def open_disks(
    paths: Sequence[str],
    folder: str,
    name: str,
    *,
    limit_bytes: int = LOG_LIMIT_DEFAULT,
    mark: Mark | None = None,
) -> ApartDisks | NoDisks:
    """The disks whose images lie at `paths`, with the logs of region `name` in `folder` ("" = beside the first image).

    `mark` is what they are from now on, before their first epoch. Attach to them, whatever they hold. ArgumentError,
    BusyError.
    """
    if not paths:
        return NoDisks()
    least = 2 * RESERVE_BYTES * len(paths)
    if limit_bytes < least:
        raise ArgumentError(
            f"a log of {limit_bytes} bytes is too small for {len(paths)} disks, whose machine may have "
            f"{least // 2} under way when it stops",
            hint=f"give --disk-log-limit {-(-least >> 20)}M or more",
        )
    images: list[Image] = []
    logs: list[EpochLog] = []
    try:
        images += [Image(path) for path in paths]
        for path in log_paths(paths, folder, name):
            try:
                fd = _open_log(path)
            except OSError as error:
                raise ArgumentError(
                    f"the log of disk writes {path} can't be made: {reason_of(error)}",
                    hint="--disk-log names another folder",
                ) from error
            logs.append(EpochLog(fd, path))
    except BaseException:
        for one in images:
            one.close()
        for log in logs:
            log.close()
        raise
    return ApartDisks(images, (logs[0], logs[1]), limit_bytes=limit_bytes, mark=mark)
