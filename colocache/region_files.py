# SPDX-License-Identifier: Apache-2.0
"""The files of one region, as one process has them: made, found, noted, and removed so that no name is lost."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from colocache import backing as bk
from colocache import spill
from colocache.errors import ArgumentError, ClosedError, ColocacheError, LengthError, NoStateError, reason_of
from colocache.names import file_name, hold, identity, is_still, open_file, remove_file, signals_wait
from colocache.regions import remove_region
from colocache.spec import BlockSpec


class RegionFiles:
    """Descriptors and names of a region's control object and images; what is left of them goes when Python exits."""

    name: str
    backing: str
    control_fd: int

    def __init__(self, name: str, backing: str) -> None:
        self.name, self.backing = name, backing
        self.control_fd = -1
        self._fds: list[int] = []
        self._made: list[tuple[Path, str, tuple[int, int]]] = []  # folder, file, device and inode
        self._pid = os.getpid()
        self._opened = False  # another process made them

    # ---- making and finding ----

    def _new_file(self, folder: Path, part: str) -> int:
        file = file_name(self.name, part)
        with signals_wait():
            if self._opened:  # what a process left that died before its block was one of the region's
                remove_file(folder, file)
            fd = open_file(folder, file, create=True)
            self._fds.append(fd)
            self._made.append((folder, file, identity(fd)))
            if not self._opened:
                _unfinished.add(self)
        return fd

    def _new_spill(self, folder: Path) -> int:
        """An empty spill file in `folder`, and first the link that tells where it is."""
        file = file_name(self.name, spill.PART)
        link = bk.SHM_DIR / file
        with signals_wait():
            if self._opened:  # one whose file is gone
                remove_file(bk.SHM_DIR, file)
            try:
                link.symlink_to(folder / file)
            except OSError as error:
                raise ArgumentError(f"{link} can't be made: {reason_of(error)}") from error
            made = link.lstat()
            self._made.append((bk.SHM_DIR, file, (made.st_dev, made.st_ino)))
            if not self._opened:
                _unfinished.add(self)
            fd = open_file(folder, file, create=True)
            self._fds.append(fd)
        return fd

    def _new_image(self, kind: bk.Kind, part: str, spec: BlockSpec, *, reserve: bool) -> int:
        if kind.folder is None:
            fd = bk.nameless_file(kind, file_name(self.name, part))
            self._fds.append(fd)
        else:
            fd = self._new_file(kind.folder, part)
        bk.size_file(kind, fd, spec.len_bytes, reserve=reserve)
        return fd

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Files that are made in the body are closed and removed again if it raises."""
        n_fds, n_made = len(self._fds), len(self._made)
        try:
            yield
        except BaseException:
            self._close_some(self._fds[n_fds:])
            for folder, file, _which in self._made[n_made:]:
                remove_file(folder, file)
            del self._made[n_made:]
            raise

    def _old_image(self, part: str, len_bytes: int) -> int:
        file = file_name(self.name, part)
        for folder in [bk.SHM_DIR, *bk.hugetlbfs_mounts()]:
            if (folder / file).exists():
                fd = open_file(folder, file)
                self._fds.append(fd)
                if os.fstat(fd).st_size < len_bytes:
                    raise LengthError(f"{folder / file} is {os.fstat(fd).st_size} bytes, its block has {len_bytes}")
                self.backing = "shm" if folder == bk.SHM_DIR else "hugetlb"
                return fd
        raise NoStateError(
            f"region {self.name} has no image {file}: its memory had no name and went with its last process",
            hint=f"`colocache clean {self.name}` removes the rest",
        )

    # ---- the end ----

    def check_open(self) -> None:
        """ClosedError after close."""
        if not self._fds:
            raise ClosedError(f"the memory of region {self.name} is closed")

    def close(self) -> None:
        """Close the descriptors. Names stay, for another process to open; a second close is fine."""
        fds, self._fds = self._fds, []
        self.control_fd = -1
        for fd in fds:
            os.close(fd)
        _unfinished.discard(self)

    def _close_some(self, fds: Iterable[int]) -> None:
        for fd in list(fds):
            self._fds.remove(fd)
            os.close(fd)

    def _remove_parts(self, *parts: str) -> None:
        """Names of a block that is none any more, of this object's making or of a region that it opened."""
        files = {file_name(self.name, part) for part in parts}
        if self._opened:
            for folder in [bk.SHM_DIR, *bk.hugetlbfs_mounts()]:
                for file in files:
                    remove_file(folder, file)
        elif os.getpid() == self._pid:
            for folder, file, which in self._made:
                if file in files and is_still(folder, file, which):
                    remove_file(folder, file)
            self._made = [one for one in self._made if one[1] not in files]

    def unlink(self) -> None:
        """Remove the names that this object made; after `open`, the region's, unless somebody owns it (BusyError).

        In a child that was forked or got a manifest it does nothing: the names are the parent's.
        """
        if os.getpid() != self._pid:
            return
        if self._opened:
            self._unlink_opened()
            return
        # The control object goes last: as long as it is there, the images have a lock to ask. What Ctrl-C keeps from
        # being removed here is still noted, and goes when Python exits.
        for folder, file, which in reversed(self._made):
            if is_still(folder, file, which):
                remove_file(folder, file)
        self._made = []
        _unfinished.discard(self)

    def _unlink_opened(self) -> None:
        self.check_open()
        fcntl.flock(self.control_fd, fcntl.LOCK_UN)  # ours is not in the way of the removal
        try:
            remove_region(self.name)
        finally:
            with contextlib.suppress(ColocacheError):  # removed, or somebody else is removing it
                hold(self.control_fd, self.name)


_unfinished: set[RegionFiles] = set()


@atexit.register
def _remove_all() -> None:
    for memory in list(_unfinished):
        memory.unlink()
