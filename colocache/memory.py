# SPDX-License-Identifier: Apache-2.0
"""The memory of a secondary: making its files, finding them again, handing them to a child, and their end.

The C library gets descriptors. An image is a file with a name (see names.py), or a memfd without one, which goes with
the last process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from colocache import backing as bk
from colocache import spill as spilling
from colocache.choices import MEMORY_MODES
from colocache.descriptors import need_for_blocks
from colocache.errors import (
    ArgumentError,
    BlockError,
    ColocacheError,
    MemoryShortError,
    NotColocacheError,
    SystemCallError,
    UnsupportedError,
)
from colocache.inspection import inspect
from colocache.names import (
    check_name,
    file_name,
    hold,
    identity,
    open_file,
    open_shm,
)
from colocache.region_files import RegionFiles
from colocache.spec import BlockSpec, Images, check_blocks, facts_of, images_from


class Memory(RegionFiles):
    """All images and the control region of one secondary.

    Made by `create` (leaving a `with` closes it and removes its names), `open` (a region that outlived its process),
    `from_manifest` (in a child, from inherited descriptors) or `from_fds` (files of the caller's own); of the latter
    three, leaving a `with` only closes.
    What was created and neither closed nor unlinked is removed when the interpreter exits.
    """

    persistent: bool
    why: str
    images: tuple[Images, ...]
    memory_mode: str  # of the region that is, or will be, in it
    spill_fd: int  # of its spill file; -1: there is none, or it is gone
    spill_path: Path | None  # where that is; None: there is none, or the caller's descriptor

    def __init__(self, name: str, backing: str, *, persistent: bool, why: str, memory_mode: str = "mirror") -> None:
        """Not for users: see create, open and from_manifest."""
        super().__init__(name, backing)
        self.persistent, self.why = persistent, why
        self.memory_mode = memory_mode
        self.spill_fd, self.spill_path = -1, None
        self.images = ()
        self._parts: dict[str, int] = {}  # the numbers of files with names
        self._making: bk.Making | None = None  # how the images are made; None: they were made elsewhere

    # ---- making ----

    @classmethod
    def create(
        cls,
        name: str | None = None,
        blocks: Sequence[BlockSpec] = (),
        *,
        backing: str = "auto",
        reserve: bool = True,
        memory_mode: str = "mirror",
        spill: Path | str | None = None,
    ) -> Memory:
        """Make the images of `blocks` and an empty control region, all zero bytes.

        `name` None: a free one is chosen. `backing` auto takes the best that has room; `.why` says which and why.
        `reserve` False: pages are allocated as they come, for guests that use little of their memory;
        on hugetlb there must be room for all of it even so.
        `memory_mode` mirror: two whole images; bounded: one, and a cache that takes memory only for the open epoch.
        `spill`: a folder on a disk, for what Cache.limit_staged leaves no memory for; bounded only.
        MemoryShortError (how much is missing, and the command), UnsupportedError, ExistsError, BlockError.
        """
        specs = check_blocks(blocks)
        if memory_mode not in MEMORY_MODES:
            raise ArgumentError(f"memory mode is {memory_mode!r}, known are {', '.join(MEMORY_MODES)}")
        n_images = 1 if memory_mode == "bounded" else 2
        folder = None if spill is None else _spill_folder(spill, memory_mode)
        need_for_blocks(len(specs))
        name = f"{os.getpid()}-{secrets.token_hex(4)}" if name is None else check_name(name)
        refused: list[str] = []
        for kind in bk.kinds(backing):
            try:
                if memory_mode == "bounded":
                    bk.check_private(kind)
                bk.check_room(kind, n_images * sum(kind.size_of(spec.len_bytes) for spec in specs), reserve=reserve)
                return cls._make(name, specs, kind, refused, folder, reserve=reserve, memory_mode=memory_mode)
            except (MemoryShortError, UnsupportedError, SystemCallError) as error:
                refused.append(f"not {kind.backing}: {error}")
                last: ColocacheError = error
        raise last

    @classmethod
    def _make(
        cls,
        name: str,
        specs: Sequence[BlockSpec],
        kind: bk.Kind,
        refused: Sequence[str],
        folder: Path | None,
        *,
        reserve: bool,
        memory_mode: str,
    ) -> Memory:
        why = "; ".join([kind.why, *refused])
        memory = cls(name, kind.backing, persistent=kind.persistent, why=why, memory_mode=memory_mode)
        try:
            memory.control_fd = memory._new_file(bk.SHM_DIR, "control")
            hold(memory.control_fd, name)
            memory._making = bk.Making(kind, reserve=reserve)
            for spec in specs:
                memory._make_images(memory._making, spec)
            if folder is not None:
                memory.add_spill(folder)
        except BaseException:
            memory.unlink()
            memory.close()
            raise
        return memory

    def add_block(self, spec: BlockSpec) -> Images:
        """Make the images of one more block, all zero bytes, as those before it were made; Cache.add_block takes them.

        After `open` too; memory from elsewhere has no way to make more: add_images. MemoryShortError, BlockError.
        """
        self._check_new(spec)
        if self._making is None:
            raise UnsupportedError(f"the memory of region {self.name} was made elsewhere: make the images there")
        n_images = 1 if self.memory_mode == "bounded" else 2
        kind = self._making.kind
        bk.check_room(kind, n_images * kind.size_of(spec.len_bytes), reserve=self._making.reserve)
        with self._all_or_nothing():
            return self._make_images(self._making, spec)

    def add_spill(self, folder: Path | str) -> None:
        """A spill file in this folder, if the memory has none; before a cache is made on it, or attached to it."""
        self.check_open()
        if self.spill_fd < 0:
            path = _spill_folder(folder, self.memory_mode)
            with self._all_or_nothing():
                self.spill_fd = self._new_spill(path)
            self.spill_path = path / file_name(self.name, spilling.PART)

    def add_images(self, images: Images) -> Images:
        """Images of one more block that the caller made, as for from_fds; the descriptors are duplicated."""
        self._check_new(images.spec)
        pair: list[int] = []
        try:
            pair += [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (images.guest_fd, images.cache_fd)]
        except (OSError, OverflowError, TypeError) as error:
            raise ArgumentError(f"a descriptor of block {images.spec.name} is not open: {error}") from error
        self._fds += pair
        self.images = (*self.images, replace(images, guest_fd=pair[0], cache_fd=pair[1]))
        return self.images[-1]

    def remove_block(self, name: str) -> None:
        """Close the images of a block that is none of the region's any more, and remove their files if they have names.

        After the `loaded` of the first epoch without it, or if its add_block came to nothing. BlockError.
        """
        self.check_open()
        gone = next((one for one in self.images if one.spec.name == name), None)
        if gone is None:
            raise BlockError(f"the memory of region {self.name} has no block {name}")
        self.images = tuple(one for one in self.images if one is not gone)
        used = {self.control_fd, *(fd for one in self.images for fd in (one.guest_fd, one.cache_fd))}
        self._close_some({gone.guest_fd, gone.cache_fd} - used)
        index = self._parts.pop(name, None)
        if index is not None:
            self._remove_parts(f"guest.{index}", f"cache.{index}")

    def _check_new(self, spec: BlockSpec) -> None:
        self.check_open()
        need_for_blocks(len(check_blocks([*(one.spec for one in self.images), spec])))

    def _make_images(self, making: bk.Making, spec: BlockSpec) -> Images:
        kind, reserve, index = making.kind, making.reserve, making.n_blocks
        # What is staged comes and goes in pages of 4 KiB, whatever guest RAM is of.
        mirror = self.memory_mode == "mirror"
        cache_kind, cache_reserve = (kind, reserve) if mirror else (bk.small_pages(kind), False)
        guest = self._new_image(kind, f"guest.{index}", spec, reserve=reserve)
        cache = self._new_image(cache_kind, f"cache.{index}", spec, reserve=cache_reserve)
        self._parts[spec.name] = index
        making.n_blocks += 1
        self.images = (*self.images, Images(spec, guest, 0, cache, 0, not reserve))
        return self.images[-1]

    # ---- finding again ----

    @classmethod
    def open(cls, name: str) -> Memory:
        """The region that a process left: its images by name. NotColocacheError, NoStateError (images are gone)."""
        check_name(name)
        memory = cls(name, "shm", persistent=True, why="opened by name")
        memory._opened = True
        try:
            memory.control_fd = open_shm(file_name(name, "control"))
            memory._fds.append(memory.control_fd)
            hold(memory.control_fd, name)
            found_there = inspect(memory.control_fd)
            memory.memory_mode = found_there.status.memory_mode
            memory._find_spill()
            blocks = found_there.blocks
            need_for_blocks(len(blocks))
            found = []
            for block in blocks:
                pair = [memory._old_image(f"{side}.{block.index}", block.len_bytes) for side in ("guest", "cache")]
                memory._parts[block.name] = block.index
                spec = BlockSpec(block.name, block.len_bytes, block.page_size)
                found.append(Images(spec, pair[0], 0, pair[1], 0, block.sparse))
            memory.images = tuple(found)
            if blocks:
                reserve = not any(block.sparse for block in blocks)
                memory._making = bk.Making(
                    bk.kinds(memory.backing)[0], reserve=reserve, n_blocks=found_there.status.n_blocks
                )
        except BaseException:
            memory.close()
            raise
        return memory

    def _find_spill(self) -> None:
        """A file that is gone or can't be opened is missed by attach, if anything in it counts."""
        self.spill_path = spilling.target_of(bk.SHM_DIR / file_name(self.name, spilling.PART))
        if self.spill_path is not None:
            with contextlib.suppress(SystemCallError):
                self.spill_fd = open_file(self.spill_path.parent, self.spill_path.name)
                self._fds.append(self.spill_fd)

    # ---- handing over ----

    @property
    def fds(self) -> tuple[int, ...]:
        """Every descriptor, for subprocess's pass_fds."""
        self.check_open()
        return tuple(self._fds)

    def manifest(self) -> str:
        """JSON that from_manifest reads in a child which inherited `fds` under the same numbers."""
        self.check_open()
        facts = {
            "name": self.name,
            "backing": self.backing,
            "persistent": self.persistent,
            "why": self.why,
            "memory_mode": self.memory_mode,
            "control_fd": self.control_fd,
            "spill_fd": self.spill_fd,
            "spill_path": str(self.spill_path or ""),
            "images": [facts_of(one) for one in self.images],
        }
        return json.dumps(facts)

    @classmethod
    def from_fds(
        cls, control_fd: int, images: Sequence[Images], *, persistent: bool = False, spill_fd: int | None = None
    ) -> Memory:
        """Memory that the caller made: memfds, POSIX shared memory, hugetlbfs files, also several blocks in one file.

        `control_fd`: an empty regular or shared-memory file, or a region to attach to. Images as colocache.h asks:
        zero-filled, reserved (unless `sparse`), disjoint, their offsets multiples of the file's granularity.
        Descriptors are duplicated, the caller keeps its own; nothing is named or removed. `persistent`: somebody else
        holds the files too, or they have names, so that they outlive this process. `spill_fd`: an empty file on a disk,
        or at an attach the same again. ArgumentError, BlockError.
        """
        check_blocks([one.spec for one in images])
        memory = cls("from-descriptors", "own", persistent=persistent, why="the caller's descriptors")
        copies: dict[int, int] = {}
        try:
            spill = () if spill_fd is None else (spill_fd,)
            for fd in (control_fd, *spill, *(fd for one in images for fd in (one.guest_fd, one.cache_fd))):
                if fd not in copies:
                    copies[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
                    memory._fds.append(copies[fd])
        except (OSError, OverflowError, TypeError) as error:
            memory.close()
            raise ArgumentError(f"descriptor {fd!r} of the memory is not open: {error}") from error
        memory.control_fd = copies[control_fd]
        memory.spill_fd = -1 if spill_fd is None else copies[spill_fd]
        memory.images = tuple(
            replace(one, guest_fd=copies[one.guest_fd], cache_fd=copies[one.cache_fd]) for one in images
        )
        return memory

    @classmethod
    def from_manifest(cls, text: str) -> Memory:
        """The memory that a parent described; the descriptors in it now belong to this object. ArgumentError."""
        try:
            facts = json.loads(text)
            memory = cls(
                check_name(facts["name"]),
                str(facts["backing"]),
                persistent=bool(facts["persistent"]),
                why=str(facts["why"]),
                memory_mode=str(facts["memory_mode"]),
            )
            memory.control_fd = int(facts["control_fd"])
            memory.spill_fd = int(facts["spill_fd"])
            memory.spill_path = Path(facts["spill_path"]) if facts["spill_path"] else None
            memory.images = tuple(images_from(one) for one in facts["images"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"this is not a manifest of a region's memory: {error}") from error
        need_for_blocks(len(check_blocks([one.spec for one in memory.images])))
        fds = [memory.control_fd, *(fd for one in memory.images for fd in (one.guest_fd, one.cache_fd))]
        fds += [memory.spill_fd] if memory.spill_fd >= 0 else []
        for fd in fds:
            try:
                os.fstat(fd)
                os.set_inheritable(fd, False)
            except (OSError, OverflowError) as error:
                raise ArgumentError(f"descriptor {fd} of the manifest is not open here: pass it on") from error
        memory._fds = fds
        return memory

    def open_control_again(self) -> int:
        """A second descriptor of the control object, which is the caller's. NotColocacheError: it has no name now."""
        self.check_open()
        fd = open_shm(file_name(self.name, "control"))
        if identity(fd) != identity(self.control_fd):
            os.close(fd)
            raise NotColocacheError(f"region {self.name} is another one now, and without /proc ours can't be opened")
        return fd

    # ---- the end ----

    def __enter__(self) -> Memory:
        self.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._opened:
            self.unlink()
        self.close()

    def __repr__(self) -> str:
        state = f"{len(self.images)} blocks" if self._fds else "closed"
        return f"<Memory {self.name}: {self.backing}, {state}>"


def _spill_folder(folder: Path | str, memory_mode: str) -> Path:
    if memory_mode != "bounded":
        raise ArgumentError(f"a spill folder, {folder}: only bounded memory has a limit beyond which pages are spilled")
    return spilling.check_folder(folder)
