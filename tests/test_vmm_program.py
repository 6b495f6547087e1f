# SPDX-License-Identifier: Apache-2.0
"""The guest's program, called in this process, does what the oracle says; its bytes run anywhere; its hash is right."""

from __future__ import annotations

import mmap

import cffi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colocache.vmm._native import ffi, lib
from colocache.vmm.base import program_bytes
from colocache.vmm.history import History, consult, stores, wrong_pages
from colocache.vmm.mailbox import Mailbox
from colocache.vmm.workload import Workload

RAM_PAGES, SPLIT = 200, 101


class Bench:
    """A mailbox on two pieces of memory with a gap between, as a guest has them."""

    def __init__(self, work: Workload, *, log: bool = False) -> None:
        self.low = np.zeros((SPLIT, 512), dtype=np.uint64)
        self.high = np.zeros((RAM_PAGES - SPLIT, 512), dtype=np.uint64)
        self.log = np.zeros((RAM_PAGES + 63) // 64, dtype=np.uint64)
        self.work, self.history, self.mailbox = work, History(), Mailbox()
        self.mailbox.place(SPLIT, self.low.ctypes.data, self.high.ctypes.data)
        self.mailbox.set_work(work)
        self.mailbox.box.bitmap = self.log.ctypes.data if log else 0

    def go(self, salt: int, n_steps: int) -> None:
        box = self.mailbox.box
        self.history.append(box.step, salt)
        box.salt, box.limit = salt, box.step + n_steps
        lib.guest_program(box)

    @property
    def memory(self) -> np.ndarray:
        return np.concatenate([self.low, self.high])

    def wrong(self) -> list[int]:
        must = consult(self.history, self.work, self.mailbox.box.step, RAM_PAGES)
        return wrong_pages(self.memory, must.seeds, must.written).tolist()


WORKS = {
    "single pages": Workload(0, RAM_PAGES, 1, 0, 0),
    "runs": Workload(10, 180, 50, 0, 65536),
    "rewrites": Workload(5, 190, 7, 30000, 40000),
    "a small set across the split": Workload(SPLIT - 3, 6, 4, 10000, 40000),
    "one page": Workload(RAM_PAGES - 1, 1, 16, 100, 65536),
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_program_and_oracle_agree_after_every_resume(work: Workload) -> None:
    bench = Bench(work)
    for salt, n_steps in [(1, 0), (2, 1), (3, 300), (2**64 - 1, 5), (0, 1000)]:
        bench.go(salt, n_steps)
        assert bench.wrong() == []
    assert bench.mailbox.box.step == 1306


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 200)), max_size=5), st.sampled_from([*WORKS]))
def test_program_and_oracle_agree_for_any_salts(resumes: list[tuple[int, int]], which: str) -> None:
    bench = Bench(WORKS[which])
    for salt, n_steps in resumes:
        bench.go(salt, n_steps)
    assert bench.wrong() == []


def test_steps_one_by_one_make_the_same_memory_as_steps_in_one_go() -> None:
    one, many = Bench(WORKS["rewrites"]), Bench(WORKS["rewrites"])
    one.go(99, 400)
    for _ in range(400):
        many.go(99, 1)
    assert np.array_equal(one.memory, many.memory)


def test_a_stop_flag_that_is_set_lets_no_step_happen() -> None:
    bench = Bench(WORKS["runs"])
    bench.mailbox.box.stop = 1
    bench.go(1, 1000)
    assert bench.mailbox.box.step == 0
    assert not bench.memory.any()


@pytest.mark.parametrize("name", ["single pages", "runs", "rewrites"])
def test_the_programs_own_log_is_every_page_it_stored(name: str) -> None:
    work = WORKS[name]
    bench = Bench(work, log=True)
    bench.go(5, 60)
    bits = np.flatnonzero(np.unpackbits(bench.log.view(np.uint8), bitorder="little"))
    changed = set(stores(bench.history.array, work, 0, 60).page.tolist())
    assert changed <= set(bits.tolist())
    assert bool(work.rewrite_below) == (changed < set(bits.tolist()))  # rewrites are dirty too


def test_taking_a_log_clears_it_and_putting_back_loses_nothing() -> None:
    words = np.array([0, 1 << 63, 0b1011, 2**64 - 1], dtype=np.uint64)
    was, taken = words.copy(), np.empty_like(words)
    at = ffi.cast("uint64_t *", words.ctypes.data)
    assert lib.guest_take_words(at, ffi.cast("uint64_t *", taken.ctypes.data), 4) == 1 + 3 + 64
    assert not words.any()
    assert np.array_equal(taken, was)
    words[2] = 0b100000
    lib.guest_put_words(at, ffi.cast("uint64_t *", taken.ctypes.data), 4)
    assert words.tolist() == [0, 1 << 63, 0b101011, 2**64 - 1]


def test_the_programs_bytes_run_at_another_address() -> None:
    """As they must in a guest, where there is no library to call and no data but the mailbox and RAM."""
    text = program_bytes()
    try:
        code = mmap.mmap(-1, 8192, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except PermissionError:
        pytest.skip("this system maps no memory that is both writable and executable")
    code[: len(text)] = text
    start = int(ffi.cast("uintptr_t", ffi.from_buffer(code)))
    run = cffi.FFI().cast("void (*)(uintptr_t)", start)
    one, other = Bench(WORKS["rewrites"]), Bench(WORKS["rewrites"])
    one.go(3, 500)
    box = other.mailbox.box
    box.salt, box.limit = 3, 500
    run(other.mailbox.addr)
    assert box.step == 500
    assert np.array_equal(one.memory, other.memory)


# ---- the hash ---------------------------------------------------------------------------------------------------


def slow_mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def slow_hashes(pages: np.ndarray) -> np.ndarray:
    """The hash of each row of 512 words, in numpy."""
    lanes = np.tile(np.arange(1, 9, dtype=np.uint64), (len(pages), 1))
    for line in range(0, pages.shape[1], 8):
        lanes ^= pages[:, line : line + 8]
        lanes *= np.uint64(0x9E3779B97F4A7C15)
        lanes = (lanes ^ (lanes >> np.uint64(32))) * np.uint64(0xA0761D6478BD642F)
    value = np.full(len(pages), pages.shape[1] * 8, dtype=np.uint64)
    for lane in range(8):
        value = slow_mix(value ^ lanes[:, lane]) * np.uint64(0xD6E8FEB86659FD93)
    return value


def hashes(pages: np.ndarray) -> np.ndarray:
    out = np.empty(len(pages), dtype=np.uint64)
    lib.guest_hash_pages(
        ffi.cast("void *", pages.ctypes.data), len(pages), 4096, ffi.cast("uint64_t *", out.ctypes.data)
    )
    return out


def test_the_hash_is_the_one_that_numpy_computes() -> None:
    pages = np.random.default_rng(1).integers(0, 2**64, (77, 512), dtype=np.uint64)
    pages[3] = 0
    assert np.array_equal(hashes(pages), slow_hashes(pages))


def test_any_bit_and_any_two_bits_one_below_the_other_change_the_hash() -> None:
    rng = np.random.default_rng(2)
    page = rng.integers(0, 2**64, (1, 512), dtype=np.uint64)
    bit = np.arange(64, dtype=np.uint64)
    one = np.repeat(page, 64, axis=0)
    one[:, 200] ^= np.uint64(1) << bit
    two = np.repeat(one, 64, axis=0)
    two[:, 208] ^= np.uint64(1) << np.tile(bit, 64)  # the next word of the same lane
    lone = np.repeat(page, 64, axis=0)
    lone[:, 208] ^= np.uint64(1) << bit
    assert len(set(hashes(np.concatenate([page, one, two, lone])).tolist())) == 1 + 64 + 64 * 64 + 64


def test_the_same_words_in_another_order_have_another_hash() -> None:
    page = np.arange(512, dtype=np.uint64)
    swapped, moved = page.copy(), page.copy()
    swapped[[0, 8]] = page[[8, 0]]
    moved[[0, 1]] = page[[1, 0]]
    assert len(set(hashes(np.stack([page, swapped, moved])).tolist())) == 3


@pytest.mark.parametrize("n_words", [0, 1, 7, 8, 9, 511])
def test_bytes_of_any_number_of_words_are_hashed_to_the_last(n_words: int) -> None:
    words = np.random.default_rng(n_words).integers(1, 2**64, n_words + 1, dtype=np.uint64)
    at = ffi.cast("void *", words.ctypes.data)
    before = lib.guest_hash(at, n_words * 8)
    words[n_words] ^= np.uint64(1)
    assert lib.guest_hash(at, n_words * 8) == before
    if n_words:
        words[n_words - 1] ^= np.uint64(1)
        assert lib.guest_hash(at, n_words * 8) != before
