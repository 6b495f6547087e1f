# SPDX-License-Identifier: Apache-2.0
"""A primary's disks over its connections: mirrored from the first one on, sent again after one that was lost."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from colocache import scratch
from colocache.disks import mirrored
from colocache.disks.export import Export
from colocache.disks.mark import Mark
from colocache.disks.mirrored import MirroredDisks
from colocache.disks.nbd_client import Reader
from colocache.disks.write import Write
from colocache.errors import ColocacheError
from colocache.replication.errors import SecondaryLostError
from colocache.replication.events import Events


class MirrorState(Protocol):
    """How the mirror of a disk is."""

    @property
    def ready(self) -> bool:
        """All of it has been copied, and each write since."""

    @property
    def trouble(self) -> str:
        """Why it has failed; "": it has not."""


class MachineDisks(Protocol):
    """What a machine does with its disks when it is told to: vmm/qemu/guest_disks.py."""

    sizes: tuple[int, ...]

    def begin_mirror(self, exports: Sequence[socket.socket], *, speed: int = 0) -> None:
        """Copy each disk to the NBD server at the other end of its export, and each write before the guest hears that
        it is done."""

    def become_primary(self, pair: str, epoch: int) -> Sequence[tuple[str, Mark]]:
        """Mark each disk as a primary's, ahead of this epoch: those whose marks said something else, with them."""

    def mirrors(self) -> Sequence[MirrorState]:
        """How they are."""

    def end_mirror(self) -> None:
        """No more of it."""

    def serve(self, path: str) -> None:
        """Let each disk be read at `path`; with "" no longer."""

    def name(self, disk: int) -> str:
        """The name of its export there."""


class Mirrors:
    """The disks of a machine that has some. One thread, but for `disks`."""

    def __init__(self, machine: MachineDisks, disks: MirroredDisks, events: Events, *, speed: int = 0) -> None:
        self.disks: mirrored.Disks = disks
        self._disks = disks
        self._machine = machine
        self._events = events
        self._speed = speed
        self._exports: list[Export] = []

    def primary_from(self, pair: str, epoch: int) -> None:
        """Before its machine runs, whenever it has met a secondary, and after each checkpoint, while it runs: its disks
        are ahead of this epoch."""
        for path, was in self._machine.become_primary(pair, epoch):
            self._events.emit("disk", f"{path} {was}; it is a primary's now", path=path, mark=was.as_json())

    def connected(self, send: Callable[[Write], None], *, fresh: bool, limit_bytes: int) -> None:
        """A connection stands. `fresh`: all of every disk goes over it. SecondaryLostError."""
        self._disks.connect(send, limit_bytes=limit_bytes)
        if not fresh:
            self._check_fits(limit_bytes)
            try:
                self._send_again()
            except (ColocacheError, OSError) as error:
                raise SecondaryLostError(f"the guest's disks can't be read, to be sent again: {error}") from error
            return
        self.end()
        try:
            for number in range(len(self.disks.sizes)):
                self._exports.append(Export(self._disks.exported(number)))
            self._machine.begin_mirror([one.client for one in self._exports], speed=self._speed)
        except (ColocacheError, OSError) as error:
            raise SecondaryLostError(f"the guest's disks can't be mirrored: {error}") from error
        finally:
            for one in self._exports:
                one.given()
        self._events.emit(
            "mirroring", f"{sum(self.disks.sizes) / 1e6:.0f} MB of disks are copied", bytes=sum(self.disks.sizes)
        )

    def _check_fits(self, limit_bytes: int) -> None:
        unacked = self._disks.unacked_bytes
        if limit_bytes and unacked > limit_bytes - self._disks.reserve:
            raise SecondaryLostError(
                f"{unacked} bytes of disks were written since the newest sealed epoch, and the secondary's log takes "
                f"{limit_bytes - self._disks.reserve}: start a fresh one, with a larger --disk-log-limit"
            )

    def _send_again(self) -> None:
        """What is unacked, as the disk holds it now."""
        runs = [(disk, run) for disk in range(len(self.disks.sizes)) for run in self._disks.unacked_runs(disk)]
        if not runs:
            return
        with scratch.folder("disk") as folder:
            path = str(folder / "nbd")
            self._machine.serve(path)
            try:
                for disk in sorted({disk for disk, _ in runs}):
                    with Reader(path, self._machine.name(disk)) as reader:
                        for offset, length in (run for one, run in runs if one == disk):
                            self._disks.send_again(disk, offset, length, reader.read)
            finally:
                with contextlib.suppress(ColocacheError):
                    self._machine.serve("")
        n_bytes = sum(length for _, (_, length) in runs)
        self._events.emit("disks_again", f"{n_bytes / 1e6:.1f} MB of disks were sent again", bytes=n_bytes)

    def ready(self) -> bool:
        """Is all of every disk at the secondary? SecondaryLostError: one can't be mirrored."""
        return all(one.ready for one in self._sound())

    def check(self) -> None:
        """The machine stands: every write that its guest knows to be done has been sent. SecondaryLostError: not so."""
        if not self.ready():
            raise SecondaryLostError("a disk's mirror is not in step any more")

    def _sound(self) -> Sequence[MirrorState]:
        states = self._machine.mirrors()
        for number, state in enumerate(states):
            if state.trouble:
                raise SecondaryLostError(f"the mirror of disk {number} failed: {state.trouble}")
        return states

    def disconnected(self) -> None:
        """The connection is gone, and whoever sent on it was told so."""
        self._disks.disconnect()

    def end(self) -> None:
        """Mirror no more."""
        exports, self._exports = self._exports, []
        if exports:
            with contextlib.suppress(ColocacheError):  # a machine that is dead mirrors nothing
                self._machine.end_mirror()
        for one in exports:
            one.close()


class NoMirrors:
    """Of a machine whose disks nobody mirrors."""

    def __init__(self) -> None:
        self.disks: mirrored.Disks = mirrored.NoDisks()

    def primary_from(self, pair: str, epoch: int) -> None:
        """See Mirrors."""

    def connected(self, send: Callable[[Write], None], *, fresh: bool, limit_bytes: int) -> None:
        """See Mirrors."""

    def ready(self) -> bool:
        """See Mirrors."""
        return True

    def check(self) -> None:
        """See Mirrors."""

    def disconnected(self) -> None:
        """See Mirrors."""

    def end(self) -> None:
        """See Mirrors."""
