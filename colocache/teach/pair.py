# SPDX-License-Identifier: Apache-2.0
"""A primary and a secondary with a socket between them, in step or on the way there; and a look at all of it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from colocache import BlockSpec, Cache, Memory, Recovery
from colocache.teach import tags
from colocache.teach.guest import BLOCK
from colocache.teach.outside import OutsideSecondary
from colocache.teach.primary import CHUNK_PAGES, Primary
from colocache.teach.secondary import Secondary, map_image
from colocache.teach.shape import Shape
from colocache.teach.victim import Victim

NO_BITS = {"pvm": "", "svm": "", "flush": ""}


class Pair:
    """Both machines of a chapter. Verbs that take an epoch do to both sides what the conversation does.

    `epochs` is the truth to compare with: PVM memory as it stood when the PVM paused for each checkpoint.
    `killable`: the secondary runs in a child process; `bounded`: its memory is; `outside`: its guest runs in processes
    of its own, as a QEMU does.
    """

    def __init__(
        self, shape: Shape, stack: contextlib.ExitStack, *, killable: bool, bounded: bool, outside: bool
    ) -> None:
        self.shape, self.bounded, self._outside = shape, bounded or outside, outside
        self.epochs: dict[int, tuple[str, ...]] = {}
        self.origin = "." * shape.n_pages  # of the newest flush set: P, S or B per page
        self._stack = stack
        self.pvm = stack.enter_context(Primary(shape.n_pages))
        self.memory = stack.enter_context(
            Memory.create(
                None,
                [BlockSpec(BLOCK, shape.n_pages * tags.PAGE_BYTES)],
                backing="shm",
                memory_mode="bounded" if self.bounded else "mirror",
            )
        )
        self.sockets = socket.socketpair()
        for end in self.sockets:
            stack.enter_context(end)
        images = self.memory.images[0]
        guest_map, self.guest = map_image(images.guest_fd, images.guest_offset, shape.n_pages)
        cache_map, self.cache = map_image(images.cache_fd, images.cache_offset, shape.n_pages)
        stack.callback(self._unmap, guest_map, cache_map)
        self.svm: Secondary | None = None
        self.victim: Victim | None = None
        if killable:
            self.victim = stack.enter_context(Victim(self.memory, self.sockets[1].fileno(), outside=outside))
        else:
            self.svm = self._make_svm(stack.enter_context(Cache.create(self.memory, threads=1, device_state_max=4096)))
        self.svm_alive = True
        self.svm_list: str | None = None  # a secondary that is wrong on purpose keeps its own list

    def _unmap(self, *mappings: Any) -> None:
        del self.guest, self.cache
        for mapping in mappings:
            with contextlib.suppress(BufferError):
                mapping.close()

    def _make_svm(self, cache: Cache) -> Secondary:
        kind = OutsideSecondary if self._outside else Secondary
        return self._stack.enter_context(kind(self.memory, cache, self.sockets[1].fileno()))

    # ---- the secondary, wherever it runs ----

    def on_svm(self, name: str, *args: Any) -> Any:
        """Call the secondary: its method `name`, in this process or in the child."""
        if self.victim is not None:
            return self.victim.call(name, *args)
        return getattr(self.svm, name)(*args)

    def attach(self) -> Recovery:
        """The child is dead: its successor, in this process, takes over the control region."""
        assert self.victim is not None  # noqa: S101 only chapters with a victim attach
        self.victim.close()
        self.victim = None
        cache = self._stack.enter_context(Cache.attach(self.memory, threads=1))
        self.svm = self._make_svm(cache)
        self.svm_alive = True
        assert cache.recovery is not None  # noqa: S101 attach always reports
        return cache.recovery

    def reconnect(self) -> None:
        """The link was cut: what was in it is lost. The ends stay, since a child could not be given new ones."""
        for end in self.sockets:
            with contextlib.suppress(BlockingIOError):
                while end.recv(1 << 20, socket.MSG_DONTWAIT):
                    pass

    # ---- what the two guests do ----

    def pvm_writes(self, pfns: list[int]) -> None:
        self.pvm.write(pfns)

    def svm_writes(self, pfns: list[int]) -> None:
        self.on_svm("write", pfns, self.status()["committed"] + 1)

    # ---- the conversation ----

    def pvm_pauses(self, epoch: int) -> None:
        """What stands in PVM memory now is epoch `epoch`; what it writes later belongs to the next."""
        self.epochs[epoch] = tags.read(self.pvm.ram.view)
        self.pvm.pause(epoch)

    def deliver(self, epoch: int, n_pages: int | None = None) -> int:
        """Send pending pages, at most n_pages, and take them in. How many."""
        done = 0
        while n_pages is None or done < n_pages:
            most = CHUNK_PAGES if n_pages is None else min(CHUNK_PAGES, n_pages - done)
            sent = self.pvm.send(self.sockets[0], epoch, most)
            self.on_svm("receive", epoch)
            done += sent
            if not sent:
                break
        return done

    def past_engine(self, image: tags.Pages, pfns: list[int], epoch: int) -> None:
        """Wrong on purpose: these pages (the first that are pending) are sent, and written into `image` by somebody
        who is not the engine."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            left = len(pfns)
            while left:
                left -= self.pvm.send(ours, epoch, min(CHUNK_PAGES, left))
                with contextlib.suppress(BlockingIOError):
                    while theirs.recv(1 << 20):
                        pass
        for pfn in pfns:
            image[pfn] = self.pvm.ram.view[pfn]

    def seal(self, epoch: int) -> dict[str, int]:
        bits = self.svm_bits()
        letters = {"00": ".", "10": "P", "01": "S", "11": "B"}
        self.origin = "".join(letters[p + s] for p, s in zip(bits["pvm"], bits["svm"], strict=True))
        counts: dict[str, int] = self.on_svm("seal", epoch)
        return counts

    def received(self) -> None:
        """The PVM hears RECEIVED."""
        self.pvm.received()

    def checkpoint(self, epoch: int) -> None:
        """A whole checkpoint, as it goes when nothing goes wrong."""
        self.pvm_pauses(epoch)
        self.deliver(epoch)
        self.on_svm("sync")
        self.on_svm("device_state", epoch)
        self.seal(epoch)
        self.received()
        self.on_svm("flush")
        self.on_svm("loaded")

    # ---- looking ----

    def images(self) -> dict[str, tuple[str, ...]]:
        """What stands in PVM memory, in the cache, and in what the SVM sees; and, with bounded memory, in guest RAM.

        A private mapping dies with its process: then the SVM's memory is what a next process would see, guest RAM.
        """
        n_bytes = self.shape.n_pages * tags.PAGE_BYTES
        found = {"pvm": tags.read(self.pvm.ram.view) if self.pvm.alive else (tags.NEVER,) * self.shape.n_pages}
        if not self.bounded:
            return {**found, "cache": tags.read(self.cache), "svm": tags.read(self.guest)}
        images = self.memory.images[0]
        # Not through a mapping: looking at a hole of the cache would fill it.
        cached = np.frombuffer(os.pread(images.cache_fd, n_bytes, images.cache_offset), np.uint8)
        found["cache"], found["ram"] = tags.read(cached.reshape(-1, tags.PAGE_BYTES)), tags.read(self.guest)
        found["svm"] = tuple(self.on_svm("memory")) if self.svm_alive else found["ram"]
        return found

    def svm_bits(self) -> dict[str, str]:
        side = self.victim or self.svm
        return dict(NO_BITS) if side is None else side.bits()

    def status(self) -> dict[str, Any]:
        side = self.victim or self.svm
        return {} if side is None else side.status()


@contextmanager
def new_pair(shape: Shape, *, killable: bool = False, bounded: bool = False, outside: bool = False) -> Iterator[Pair]:
    """A pair of which nothing has been sent yet; see Pair."""
    with contextlib.ExitStack() as stack:
        yield Pair(shape, stack, killable=killable, bounded=bounded, outside=outside)


@contextmanager
def pair_in_step(
    shape: Shape, *, killable: bool = False, bounded: bool = False, outside: bool = False
) -> Iterator[Pair]:
    """A pair whose epoch 1 is committed: equal images, empty bitmaps."""
    with new_pair(shape, killable=killable, bounded=bounded, outside=outside) as pair:
        pair.pvm_writes(shape.all)
        pair.checkpoint(1)
        yield pair
