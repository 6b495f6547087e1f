# SPDX-License-Identifier: Apache-2.0
"""Any sequence of calls, deaths included, against the oracle: images, bitmaps and every invariant after each step."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import colocache as c
from colocache import BlockSpec, Cache, Images, Memory, Phase
from colocache.errors import ColocacheError

from model import PAGE, Model, page_of, pages_of, stamps_of, words_of

N_PAGES = [67, 1, 130]  # no multiple of 64, a single page, three words
SPECS = tuple(BlockSpec(f"block {i}", n * PAGE) for i, n in enumerate(N_PAGES))

T = TypeVar("T")
numbers = itertools.count()
LATE_PAGES = [65, 3, 1]  # of blocks that come later
blocks = st.integers(0, 20)  # of those that there are: see Secondary.block
#  Which epoch a call names, relative to the right one: nearly always that one.
slips = st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 5])


spans = st.tuples(blocks, st.integers(0, 200), st.integers(1, 70))  # a block, a page, how many: see Secondary.span


class VetoedError(Exception):
    """What the VM's check raises."""


class Secondary(RuleBasedStateMachine):
    memory_mode = "mirror"

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(N_PAGES, self.memory_mode)
        self.stamps = itertools.count(1)
        name = f"t{os.getpid()}-m{next(numbers)}"
        self.memory = Memory.create(name, SPECS, backing="shm", memory_mode=self.memory_mode)
        # The image, and with memory mode mirror the vCPU's own mapping: writes are in no log until one is synced.
        self.maps: dict[int, mmap.mmap] = {}
        self.guest: dict[int, npt.NDArray[np.uint64]] = {}
        for index, image in enumerate(self.memory.images):
            self.map(index, image)
        self.cache: Cache | None = Cache.create(self.memory, threads=2, device_state_max=10_000)

    def map(self, index: int, image: Images) -> None:
        self.maps[index] = mmap.mmap(image.guest_fd, image.spec.len_bytes)
        self.guest[index] = np.frombuffer(self.maps[index], "<u8").reshape(-1, PAGE // 8)

    def teardown(self) -> None:
        if self.cache is not None:
            self.cache.close()
        self.guest.clear()
        for one in self.maps.values():
            one.close()
        self.memory.unlink()
        self.memory.close()

    # ---- asking both ----

    @property
    def engine(self) -> Cache:
        assert self.cache is not None
        return self.cache

    def both(self, oracle: Callable[[], T], engine: Callable[[], Any]) -> tuple[T, Any] | None:
        """The same call to both; None if both refused it in the same way."""
        try:
            expected = oracle()
        except ColocacheError as refusal:
            try:
                answer = engine()
            except ColocacheError as error:
                assert type(error) is type(refusal), (error, refusal)  # noqa: PT017 two errors are compared
                return None
            raise AssertionError(f"expected {type(refusal).__name__}, the engine answered {answer}") from None
        return expected, engine()

    def epoch(self, slip: int = 0) -> int:
        """The epoch that is open or would be opened next."""
        return max(0, (self.model.open or self.model.receiving + 1) + slip)

    def block(self, number: int) -> int:
        """One of the blocks that there are."""
        return list(self.model.blocks)[number % len(self.model.blocks)]

    def span(self, span: tuple[int, int, int]) -> tuple[int, int, int]:
        """A block, a first page in it, and how many pages from there."""
        block = self.block(span[0])
        n_pages = self.model.blocks[block].n_pages
        first = span[1] % n_pages
        return block, first, min(span[2], n_pages - first)

    # ---- blocks that come and go ----

    @precondition(lambda self: self.cache is not None and len(self.maps) < len(N_PAGES) + len(LATE_PAGES))
    @rule()
    def add_block(self) -> None:
        number = len(self.maps)
        spec = BlockSpec(f"block {number}", LATE_PAGES[number - len(N_PAGES)] * PAGE)
        there = [one for one in self.memory.images if one.spec == spec]  # of an add that was refused
        images = there[0] if there else self.memory.add_block(spec)
        answers = self.both(lambda: self.model.add_block(spec.n_pages), lambda: self.engine.add_block(images))
        if answers is not None:
            assert answers[0] == answers[1].index
            self.map(answers[0], images)

    @precondition(lambda self: self.cache is not None and len(self.model.blocks) - len(self.model.leaving) > 1)
    @rule(block=blocks)
    def remove_block(self, block: int) -> None:
        block = self.block(block)
        self.both(lambda: self.model.remove_block(block), lambda: self.engine.remove_block(block))

    @precondition(lambda self: self.cache is not None and self.model.phase == Phase.LIVE)
    @rule()
    def forget_images(self) -> None:
        """Of blocks that are gone: an attach needs them no more, and need not be told."""
        for index in set(self.maps) - set(self.model.blocks):
            for one in self.memory.images:
                if one.spec.name == f"block {index}":
                    self.memory.remove_block(one.spec.name)

    # ---- an epoch arrives ----

    @precondition(lambda self: self.cache is not None)
    @rule(span=spans, slip=slips)
    def receive(self, span: tuple[int, int, int], slip: int) -> None:
        block, pfn, _ = self.span(span)
        stamp, epoch = next(self.stamps), self.epoch(slip)
        self.both(
            lambda: self.model.receive(epoch, block, {pfn: stamp}, 1),
            lambda: self.engine.receive(epoch, block, pfn, page_of(stamp)),
        )

    @precondition(lambda self: self.cache is not None)
    @rule(span=spans, slip=slips)
    def receive_zero(self, span: tuple[int, int, int], slip: int) -> None:
        block, first, n = self.span(span)
        epoch = self.epoch(slip)
        self.both(
            lambda: self.model.receive(epoch, block, dict.fromkeys(range(first, first + n), 0), n),
            lambda: self.engine.receive_zero(epoch, block, first, n),
        )

    @precondition(lambda self: self.cache is not None)
    @rule(block=blocks, data=st.data(), slip=slips)
    def receive_pages(self, block: int, data: st.DataObject, slip: int) -> None:
        block = self.block(block)
        pfns = data.draw(st.lists(st.integers(0, self.model.blocks[block].n_pages - 1), max_size=8))
        stamps, epoch = [next(self.stamps) for _ in pfns], self.epoch(slip)
        self.both(
            lambda: self.model.receive(epoch, block, dict(zip(pfns, stamps, strict=True)), len(pfns)),
            lambda: self.engine.receive_pages(epoch, block, np.array(pfns, np.uint64), b"".join(map(page_of, stamps))),
        )

    @precondition(lambda self: self.cache is not None)
    @rule(length=st.sampled_from([0, 1, 4095, 4096, 10_000]), fill=st.integers(0, 255), slip=slips)
    def device_state(self, length: int, fill: int, slip: int) -> None:
        state, epoch = bytes([fill]) * length, self.epoch(slip)
        answers = self.both(
            lambda: self.model.stage(epoch, state), lambda: self.engine.device_state_buffer(epoch, length)
        )
        if answers is not None:
            answers[1][:] = state

    @precondition(lambda self: self.cache is not None)
    @rule(slip=slips)
    def abort(self, slip: int) -> None:
        epoch = self.epoch(slip)
        self.both(lambda: self.model.abort(epoch), lambda: self.engine.abort(epoch, "test"))

    @precondition(lambda self: self.cache is not None)
    @rule()
    def free_staged(self) -> None:
        self.model.free_staged()
        self.engine.free_staged()

    @precondition(lambda self: self.cache is not None)
    @rule()
    def preflush(self) -> None:
        answers = self.both(self.model.preflush, self.engine.preflush)
        assert answers is None or answers[0] == answers[1]

    # ---- the SVM writes ----

    @precondition(lambda self: self.cache is not None)
    @rule(span=spans, how=st.sampled_from(["mark_dirty", "words", "view"]))
    def guest_write(self, span: tuple[int, int, int], how: str) -> None:
        """As user space, as a vCPU whose log is then synced from an odd page on, or through a writable view."""
        block, first, n = self.span(span)
        stamps = [next(self.stamps) for _ in range(n)]
        column = np.array(stamps, np.uint64)[:, None]
        if block in self.model.leaving and (how == "view" or self.model.bounded):
            return  # there are no more views of it
        if how == "view" or self.model.bounded:  # a vCPU over bounded memory runs on the same private mapping
            with self.engine.blocks[block].writable(first, n) as pages:
                pages.view("<u8")[:] = column
                del pages
        else:
            self.guest[block][first : first + n] = column
            if how == "words":
                self.engine.sync_words(block, words_of(set(range(n)), n), first, n)
            else:
                self.engine.mark_dirty(block, first, n)
        self.model.guest_write(block, first, stamps)
        self.model.mark(block, set(range(first, first + n)))

    @precondition(lambda self: self.cache is not None)
    @rule(block=blocks, data=st.data())
    def sync_words(self, block: int, data: st.DataObject) -> None:
        """Any bits: extra ones are always safe."""
        block = self.block(block)
        n_pages = self.model.blocks[block].n_pages
        pages = data.draw(st.sets(st.integers(0, n_pages - 1), max_size=20))
        self.engine.sync_words(block, words_of(pages, n_pages))
        self.model.mark(block, pages)

    @precondition(lambda self: self.cache is not None)
    @rule()
    def dirty_log_lost(self) -> None:
        self.engine.dirty_log_lost()
        self.model.log_lost()

    # ---- a checkpoint ----

    @precondition(lambda self: self.cache is not None)
    @rule(
        slip=slips,
        miscount=st.sampled_from([None, 0, 0, 0, 1, -1]),
        veto=st.sampled_from([False, False, False, True]),
        failover=st.sampled_from([False, False, False, False, True]),
    )
    def seal(self, slip: int, miscount: int | None, veto: bool, failover: bool) -> None:
        epoch, asked = self.epoch(slip), []
        n_pages = None if miscount is None else max(0, self.model.received + miscount)
        staged = self.model.staged

        def look(state: memoryview) -> None:
            asked.append(bytes(state))
            if failover:
                with contextlib.suppress(c.NoStateError):
                    assert not self.engine.failover().now
            if veto:
                raise VetoedError

        try:
            answers = self.both(
                lambda: self.model.seal(epoch, n_pages, veto=veto, failover=failover),
                lambda: self.engine.seal(epoch, n_pages=n_pages, check=look),
            )
        finally:
            assert asked in ([], [staged])  # once at most, with the state that is to be sealed
        if answers is not None:
            result = answers[1]
            assert answers[0] == (result.pvm_pages, result.svm_pages, result.both_pages)
            assert result.flush_pages == sum(answers[0])
            assert asked == [staged]

    @precondition(lambda self: self.cache is not None)
    @rule()
    def flush(self) -> None:
        answers = self.both(self.model.flush, self.engine.flush)
        assert answers is None or answers[0] == answers[1].n_pages

    @precondition(lambda self: self.cache is not None)
    @rule(ok=st.sampled_from([True, True, True, False]))
    def loaded(self, ok: bool) -> None:
        answers = self.both(lambda: self.model.loaded(ok), lambda: self.engine.loaded(ok))
        assert answers is None or answers[0] == answers[1]

    @precondition(lambda self: self.cache is not None and self.model.phase in (Phase.EMPTY, Phase.LIVE))
    @rule(state=st.binary(max_size=100), finish=st.integers(0, 3))
    def checkpoint(self, state: bytes, finish: int) -> None:
        """The calls in their order, so that a run gets far; or only some of them."""
        epoch = self.epoch()
        self.model.stage(epoch, state)
        self.engine.device_state_buffer(epoch, len(state))[:] = state
        self.seal(0, 0, False, False)
        if finish > 0:
            self.flush()
        if finish > 1:
            self.loaded(True)

    # ---- the end, and after a death ----

    @precondition(lambda self: self.cache is not None)
    @rule(really=st.integers(0, 4))
    def failover(self, really: int) -> None:
        if really and self.model.phase == Phase.LIVE:  # most runs should go on as a secondary
            return
        answers = self.both(self.model.failover, self.engine.failover)
        if answers is not None:
            assert answers[0] == answers[1].now
            assert answers[1].epoch == self.model.sealed

    @precondition(lambda self: self.cache is not None)
    @rule(unlogged=spans)
    def die_and_attach(self, unlogged: tuple[int, int, int]) -> None:
        """The handle goes, and with it what the VM wrote without anybody knowing; the next process attaches."""
        block, first, n = self.span(unlogged)
        self.engine.close()
        self.cache = None
        lives = 0 < self.model.sealed == self.model.committed and self.model.phase != Phase.SEALING
        if lives and not self.model.bounded:  # else it was private and is gone
            stamps = [next(self.stamps) for _ in range(n)]
            self.guest[block][first : first + n] = np.array(stamps, np.uint64)[:, None]
            self.model.guest_write(block, first, stamps)
        self.model.die()
        answers = self.both(self.model.attach, lambda: Cache.attach(self.memory, threads=1))
        if answers is not None:
            self.cache = answers[1]
            recovery = self.engine.recovery
            assert recovery is not None
            assert recovery.action == answers[0]
            restartable = answers[0] in (c.Action.REPLAYED, c.Action.RESTART)
            assert recovery.epoch == (self.model.sealed if restartable else 0)
            assert recovery.receiving_epoch == self.model.receiving
            if answers[0] == c.Action.NOTHING:  # the initial copy starts again: every page comes
                epoch = self.epoch()
                for block, one in self.model.blocks.items():
                    self.model.receive(epoch, block, dict.fromkeys(range(one.n_pages), 0), one.n_pages)
                    self.engine.receive_zero(epoch, block, 0, one.n_pages)

    @precondition(lambda self: self.cache is None)
    @rule()
    def attach_again(self) -> None:
        """Who took over is never attached to again, and is left as it is."""
        assert self.both(self.model.attach, lambda: Cache.attach(self.memory)) is None

    # ---- after each step ----

    @invariant()
    def images_are_the_oracles(self) -> None:
        images = {image.spec.name: image for image in self.memory.images}
        for index, block in self.model.blocks.items():
            image = images[f"block {index}"]
            assert stamps_of(self.guest[index]) == block.guest
            # Not through a mapping: reading a hole there would fill it.
            cached = np.frombuffer(os.pread(image.cache_fd, image.spec.len_bytes, 0), "<u8")
            if not self.model.bounded or self.cache is not None:  # else a dead one's may hold anything
                assert stamps_of(cached.reshape(-1, PAGE // 8)) == block.cache
            if self.model.bounded and self.cache is not None:
                n_staged = sum(stamp != 0 for stamp in block.cache)
                assert os.fstat(image.cache_fd).st_blocks * 512 == n_staged * PAGE

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def the_vm_sees_its_own(self) -> None:
        for (index, block), engine in zip(self.model.blocks.items(), self.engine.blocks.values(), strict=True):
            assert engine.index == index
            if index in self.model.leaving:
                continue
            view = engine.guest
            assert stamps_of(view) == block.seen_by_vm
            del view

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def every_invariant_holds(self) -> None:
        self.engine.validate(compare_pages=True)

    @precondition(lambda self: self.cache is not None)
    @invariant()
    def bitmaps_and_status_are_the_oracles(self) -> None:
        for block, engine in zip(self.model.blocks.values(), self.engine.blocks.values(), strict=True):
            assert pages_of(engine.pvm_bitmap) == block.pvm
            assert pages_of(engine.svm_bitmap) == block.svm
            if self.model.phase == Phase.SEALING and self.model.committed != self.model.sealed:
                assert pages_of(engine.flush_set) == block.flush
        status = self.engine.status()
        assert status.phase == self.model.phase
        assert status.sealed_epoch == self.model.sealed
        assert status.committed_epoch == self.model.committed
        assert status.receiving_epoch == self.model.receiving
        assert status.failover_pending == self.model.pending
        if self.model.open:
            assert status.received_pages == self.model.received
        if self.model.state is None:
            assert status.device_state_bytes == 0
        else:
            assert self.engine.device_state() == self.model.state
        assert c.inspect(self.memory).status.sealed_epoch == self.model.sealed


class BoundedSecondary(Secondary):
    memory_mode = "bounded"


Secondary.TestCase.settings = BoundedSecondary.TestCase.settings = settings(
    max_examples=int(os.environ.get("COLOCACHE_TEST_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSecondary = Secondary.TestCase
TestBoundedSecondary = BoundedSecondary.TestCase
