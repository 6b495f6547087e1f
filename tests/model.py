# SPDX-License-Identifier: Apache-2.0
"""What a secondary must do, so simple that it is obviously right: a page is a number, a bitmap a set, an image a list.

Each call answers like the engine's, or raises the same class of error, and then has changed nothing unless said. There
is no shared memory, no thread and no order of stores here: only what colocache.h promises.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

import colocache as c
from colocache import Phase

PAGE = 4096


def page_of(stamp: int) -> bytes:
    """The page that a number stands for: the number in each of its 64-bit words."""
    return stamp.to_bytes(8, "little") * (PAGE // 8)


def stamps_of(view: npt.NDArray[np.uint8]) -> list[int]:
    """The numbers of the pages of an image; -1 for a page that is no page_of anything."""
    words = view.view("<u8")
    whole = (words == words[:, :1]).all(axis=1)
    return [int(word) if fine else -1 for word, fine in zip(words[:, 0], whole, strict=True)]


def pages_of(words: npt.NDArray[np.uint64]) -> set[int]:
    """The pages whose bits are set."""
    return {int(n) for n in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))}


def words_of(pages: set[int], n_pages: int) -> npt.NDArray[np.uint64]:
    """Words in which these pages' bits are set."""
    words = np.zeros((n_pages + 63) // 64, np.uint64)
    for page in pages:
        words[page // 64] |= np.uint64(1 << page % 64)
    return words


@dataclass
class ModelBlock:
    n_pages: int
    guest: list[int] = field(default_factory=list)
    cache: list[int] = field(default_factory=list)
    pvm: set[int] = field(default_factory=set)
    svm: set[int] = field(default_factory=set)
    flush: set[int] = field(default_factory=set)
    private: dict[int, int] = field(default_factory=dict)  # bounded memory: what the VM wrote since the last flush

    def __post_init__(self) -> None:
        self.guest = [0] * self.n_pages
        self.cache = [0] * self.n_pages

    @property
    def seen_by_vm(self) -> list[int]:
        return [self.private.get(pfn, stamp) for pfn, stamp in enumerate(self.guest)]

    def drop_staged(self) -> None:
        """Bounded memory: nothing has come; a hole reads as zeros."""
        self.pvm = set()
        self.cache = [0] * self.n_pages


class Model:
    """A secondary as colocache.h describes it."""

    def __init__(self, n_pages: list[int], memory_mode: str = "mirror") -> None:
        self.bounded = memory_mode == "bounded"
        self.blocks = {index: ModelBlock(n) for index, n in enumerate(n_pages)}  # a dict, as indices outlive blocks
        self.n_indices = len(n_pages)  # of blocks that are or were
        self.leaving: set[int] = set()
        self.phase = Phase.EMPTY
        self.sealed = self.committed = self.receiving = 0
        self.open = 0  # the epoch that is arriving; 0 = none
        self.received = 0
        self.state: bytes | None = None  # of the newest sealed epoch
        self.staged: bytes | None = None  # of the open one
        self.pending = False  # failover was asked for between the start of a seal and loaded
        self.sealing_first = False
        self.taken_over = False

    # ---- blocks that come and go ----

    def add_block(self, n_pages: int) -> int:
        self._refuse_phases({Phase.SEALING: c.SealedError})
        index, self.n_indices = self.n_indices, self.n_indices + 1
        self.blocks[index] = ModelBlock(n_pages)
        if self.sealed and not self.bounded:
            self.blocks[index].svm = set(range(n_pages))
        return index

    def remove_block(self, index: int) -> None:
        if index not in self.blocks:
            raise c.BlockError("gone")
        self._refuse_phases({Phase.SEALING: c.SealedError})
        self.leaving.add(index)

    # ---- an epoch arrives ----

    def enter(self, epoch: int) -> None:
        """What anything that arrives for an epoch meets first."""
        self._refuse_phases({Phase.SEALING: c.SealedError})
        if self.open:
            if epoch != self.open:
                raise c.EpochError("another epoch is open")
            return
        if epoch <= self.receiving:
            raise c.EpochError("used")
        if self.bounded:
            for block in self.blocks.values():
                block.drop_staged()  # what a committed epoch left
        self.open = self.receiving = epoch
        self.received = 0

    def receive(self, epoch: int, block: int, pages: dict[int, int], count: int) -> None:
        self.enter(epoch)
        straight = self.bounded and self.sealed == 0  # to guest RAM, without bits: there is nothing to protect
        image = self.blocks[block].guest if straight else self.blocks[block].cache
        for pfn, stamp in pages.items():
            image[pfn] = stamp
        if not straight:
            self.blocks[block].pvm |= set(pages)
        self.received += count

    def stage(self, epoch: int, state: bytes) -> None:
        self.enter(epoch)
        self.staged = state

    def abort(self, epoch: int) -> None:
        self._refuse_phases({Phase.SEALING: c.SealedError})
        if epoch == 0 or epoch != self.open:
            raise c.EpochError("not the open one")
        self._give_up()

    def _give_up(self) -> None:
        """Bits and cache stay until an epoch with them is sealed; in bounded memory they go."""
        if self.bounded:
            for block in self.blocks.values():
                block.drop_staged()
        self._close_epoch()

    def _close_epoch(self) -> None:
        self.open = 0
        self.staged = None

    def free_staged(self) -> None:
        if self.bounded and not self.open and self.committed == self.sealed:
            for block in self.blocks.values():
                block.drop_staged()

    # ---- the SVM writes ----

    def guest_write(self, block: int, first: int, stamps: list[int]) -> None:
        if self.bounded:
            self.blocks[block].private.update(enumerate(stamps, first))
        else:
            self.blocks[block].guest[first : first + len(stamps)] = stamps

    def mark(self, block: int, pages: set[int]) -> None:
        if not self.bounded:
            self.blocks[block].svm |= pages

    def log_lost(self) -> None:
        for block in self.blocks.values() if not self.bounded else []:
            block.svm = set(range(block.n_pages))

    # ---- a checkpoint ----

    def seal(self, epoch: int, n_pages: int | None, *, veto: bool, failover: bool) -> tuple[int, int, int]:
        """Pages by PVM only, SVM only, both; `failover` is asked for while the VM looks at the device state."""
        self._refuse_phases({Phase.SEALING: c.SealedError})
        if epoch == 0 or epoch != self.open:
            raise c.EpochError("not the open one")
        if self.staged is None or n_pages not in (None, self.received):
            self._give_up()
            raise c.IncompleteError("device state or pages")
        granted = failover and self.phase == Phase.LIVE  # else there is nothing to take over from yet
        if veto:
            self._give_up()
            if granted:
                self._take_over()
            raise c.VetoError("refused")
        self.blocks = {index: block for index, block in self.blocks.items() if index not in self.leaving}
        self.leaving = set()
        pvm_only = svm_only = both = 0
        for block in self.blocks.values():
            block.flush = block.pvm | block.svm
            both += len(block.pvm & block.svm)
            pvm_only += len(block.pvm - block.svm)
            svm_only += len(block.svm - block.pvm)
            block.pvm, block.svm = set(), set()
        self.sealed, self.state, self.pending = epoch, self.staged, granted
        self._close_epoch()
        self.phase = Phase.SEALING
        return pvm_only, svm_only, both

    def flush(self) -> int:
        if self.phase != Phase.SEALING or self.committed == self.sealed:
            raise c.NotSealedError("nothing to flush")
        self._copy_flush_set()
        return sum(len(block.flush) for block in self.blocks.values())

    def _copy_flush_set(self) -> None:
        for block in self.blocks.values():
            for pfn in block.flush:
                block.guest[pfn] = block.cache[pfn]
            block.private = {}
        self.committed = self.sealed

    def loaded(self, ok: bool) -> bool:
        if self.phase != Phase.SEALING:
            raise c.NotSealedError("nothing is sealed")
        if self.committed != self.sealed:
            raise c.SealedError("not flushed")
        pending, self.pending = self.pending, False
        if not ok:
            self.phase = Phase.LOAD_FAILED
        elif pending:
            self._take_over()
        else:
            self.phase = Phase.LIVE
        return ok and pending

    def preflush(self) -> int:
        if self.phase != Phase.EMPTY or self.sealed:
            raise c.OrderError("only before the first seal")
        n = 0
        for block in self.blocks.values():
            for pfn in block.pvm:
                block.guest[pfn] = block.cache[pfn]
            n += len(block.pvm)
            block.pvm = set()
        return n

    # ---- the end, and after a death ----

    def failover(self) -> bool:
        """True: now."""
        if self.phase == Phase.EMPTY:
            raise c.NoStateError("nothing to take over from")
        if self.phase == Phase.LOAD_FAILED:
            raise c.LoadFailedError("did not load")
        if self.phase == Phase.SEALING:
            self.pending = True
            return False
        self._take_over()
        return True

    def _take_over(self) -> None:
        self.phase = Phase.FAILED_OVER
        self.taken_over = True

    def die(self) -> None:
        """The process is gone: what lived in it alone is lost."""
        self._close_epoch()
        self.leaving = set()
        for block in self.blocks.values():
            block.private = {}
        self.pending = False
        self.received = 0

    def attach(self) -> c.Action:
        if self.taken_over:
            raise c.FailedOverError("the world has moved on")
        if self.sealed == 0:
            for block in self.blocks.values():
                block.pvm, block.svm, block.flush = set(), set(), set()
            self.phase = Phase.EMPTY
            return c.Action.NOTHING
        if self.committed != self.sealed:
            self._copy_flush_set()
            self._recovered()
            return c.Action.REPLAYED
        if self.receiving == self.sealed or self.bounded:
            for block in self.blocks.values() if not self.bounded else []:
                block.guest = list(block.cache)
            self._recovered()
            return c.Action.RESTART
        self.log_lost()
        self.phase = Phase.EMPTY
        return c.Action.NO_RESTART

    def _recovered(self) -> None:
        self.phase = Phase.LIVE
        for block in self.blocks.values() if self.bounded else []:
            block.drop_staged()

    def _refuse_phases(self, more: dict[Phase, type[c.ColocacheError]]) -> None:
        refused: dict[Phase, type[c.ColocacheError]] = {
            Phase.LOAD_FAILED: c.LoadFailedError,
            Phase.FAILED_OVER: c.FailedOverError,
            **more,
        }
        refusal = refused.get(self.phase)
        if refusal is not None:
            raise refusal("not in this phase")
