# SPDX-License-Identifier: Apache-2.0
"""A machine's disks, as replication gives orders about them: mirror them, read one, fold an overlay."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from colocache.disks.mark import Mark, Was, read_mark, write_mark
from colocache.vmm.qemu import mirror
from colocache.vmm.qemu.command_line import CommandLine
from colocache.vmm.qemu.disk import Nodes, node_of
from colocache.vmm.qemu.mirror import MirrorState
from colocache.vmm.qemu.process import QemuProcess


class GuestDisks:
    """Of the machine that `alive` tells the process of. The machine's thread."""

    def __init__(self, line: CommandLine, alive: Callable[[], QemuProcess]) -> None:
        self._disks = line.disks
        self._folder = line.disk_folder
        self._alive = alive
        self.sizes = tuple(disk.size for disk in line.disks)
        self._folding = False

    def nodes(self, *, incoming: bool) -> Nodes:
        """For a new process: of a secondary's, or of a primary's."""
        return Nodes.of_secondary(self._disks, self._folder) if incoming else Nodes.of_primary(self._disks)

    # ---- a primary's ----

    def become_primary(self, pair: str, epoch: int) -> list[tuple[str, Mark]]:
        """Each disk is marked as a primary's, ahead of this epoch: those whose marks said something else, with them."""
        found = [(disk.path, read_mark(disk.path)) for disk in self._disks]
        for path, was in found:
            if was is None or (was.was, was.pair, was.epoch) != (Was.PRIMARY, pair, epoch):
                write_mark(path, Mark(Was.PRIMARY, pair, epoch))
        return [(path, was) for path, was in found if was and was.was is not Was.PRIMARY]

    def begin_mirror(self, exports: Sequence[socket.socket], *, speed: int = 0) -> None:
        """Copy each disk to its export, and every write from now on before the guest hears that it is done."""
        for disk, export in enumerate(exports):
            mirror.begin(self._alive(), disk, export, speed)

    def mirrors(self) -> list[MirrorState]:
        """How the mirror of each disk is."""
        return mirror.states(self._alive(), len(self._disks)) if self._disks else []

    def end_mirror(self) -> None:
        """No more of it; what is under way is given up."""
        if self._disks:
            mirror.end(self._alive(), len(self._disks))

    def serve(self, path: str) -> None:
        """QEMU serves each disk, read-only, at `path`, under the name of its node, to one reader; or no longer ("")."""
        if self._disks:
            mirror.serve(self._alive(), len(self._disks), path)

    def name(self, disk: int) -> str:
        """Of a disk that is served."""
        return node_of(disk)

    # ---- a secondary's, after a takeover ----

    def fold(self) -> bool:
        """What the overlays hold goes into the images, while the guest runs: call it now and then. True: it is done."""
        process = self._alive()
        if not self._folding:
            self._folding = True
            for disk in range(len(self._disks)):
                mirror.begin_fold(process, disk)
        return all(mirror.fold_step(process, disk) for disk in range(len(self._disks)))
