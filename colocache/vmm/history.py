# SPDX-License-Identifier: Apache-2.0
"""The guest's history, and the oracle: what every page must hold, computed from the history alone.

Written from the rules in guest_program.h, in numpy, and shares no code with the program. At every start and resume the
VMM gives the program a fresh salt; the history is the list of (first step, salt). A page holds what the last step that
wrote it put there, so the oracle walks back from the newest step until it knows the last writer of each page of the
working set: about n*ln(n) steps for n pages, however long the guest has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from colocache.errors import ArgumentError
from colocache.vmm.workload import PAGE, SHARES, Workload

Words = npt.NDArray[np.uint64]

STEP = np.uint64(0x9E3779B97F4A7C15)
PAGE_FACTOR = np.uint64(0xD6E8FEB86659FD93)
WORD = np.uint64(0xA0761D6478BD642F)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
WORDS = PAGE // 8
ENTRIES_MAX = 1 << 20  # 16 MiB of device state
TIDY_ENTRIES = 1 << 12  # a longer history is searched for entries that no page shows now
STEPS_MAX = 1 << 62
CHUNK = 1 << 17  # steps looked at in one go: a few MiB of scratch
COMPARE = 128  # pages compared in one go: half a MiB of scratch stays in the CPU cache


def mix(x: Words) -> Words:
    """The 64-bit finaliser of guest_program.h, elementwise."""
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    mixed: Words = x ^ (x >> np.uint64(31))
    return mixed


def page_words(seeds: Words) -> Words:
    """Contents of pages by their first words: shape (len(seeds), 512)."""
    words: Words = seeds[:, None] + np.arange(WORDS, dtype=np.uint64) * WORD
    return words


class History:
    """(first step, salt) of each start and resume, oldest first; first steps never fall. The last entry is in force."""

    def __init__(self, entries: Words | None = None) -> None:
        self._n = 0 if entries is None else len(entries)
        self._entries = np.zeros((max(64, 2 * self._n), 2), dtype=np.uint64)
        if entries is not None:
            self._entries[: self._n] = entries

    def __len__(self) -> int:
        return self._n

    @property
    def array(self) -> Words:
        """Shape (entries, 2), a view: first step, salt."""
        return self._entries[: self._n]

    def append(self, first_step: int, salt: int) -> None:
        """The program goes on at first_step with this salt."""
        newest = int(self._entries[self._n - 1, 0]) if self._n else -1
        if first_step < newest:
            raise ArgumentError(f"step {first_step} is before step {newest}, where the newest salt began")
        if first_step == newest:
            self._n -= 1  # that salt never decided a step
        if self._n >= ENTRIES_MAX:
            raise ArgumentError(f"the guest was resumed {ENTRIES_MAX} times, more than its history holds: start anew")
        if self._n == len(self._entries):
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
        self._entries[self._n, 0] = first_step
        self._entries[self._n, 1] = salt
        self._n += 1

    def forget_before(self, step: int) -> None:
        """Drop the entries that decided only steps before `step`."""
        keep = max(0, int(np.searchsorted(self.array[:, 0], np.uint64(step), side="right")) - 1)
        self._entries[: self._n - keep] = self._entries[keep : self._n].copy()
        self._n -= keep


@dataclass(frozen=True)
class Stores:
    """Page stores of some steps in the order of time: `page` of pc.ram, `step`, and `seed`, the first word stored."""

    step: npt.NDArray[np.int64]
    page: npt.NDArray[np.int64]
    seed: Words


def stores(history: Words, work: Workload, first: int, end: int) -> Stores:
    """What the program stores in steps first to end-1; rewrites, which change nothing, left out.

    history: History.array, its oldest entry at or before `first`.
    """
    steps = np.arange(first, end, dtype=np.uint64)
    salts = history[np.searchsorted(history[:, 0], steps, side="right") - 1, 1]
    h = mix(salts + (steps + np.uint64(1)) * STEP)
    kind = h & np.uint64(0xFFFF)
    writes = kind >= work.rewrite_below
    h, kind, steps = h[writes], kind[writes], steps[writes]
    at = ((h >> np.uint64(32)) * np.uint64(work.n_pages)) >> np.uint64(32)
    longer = ((h >> np.uint64(16)) & np.uint64(0xFFFF)) * np.uint64(work.run_pages - 1) >> np.uint64(16)
    length = np.where(kind < work.run_below, np.uint64(2) + longer, np.uint64(1))
    length = np.minimum(length, np.uint64(work.n_pages) - at).astype(np.int64)
    which = np.repeat(np.arange(len(steps)), length)
    into = np.arange(len(which)) - np.repeat(np.cumsum(length) - length, length)
    page = at.astype(np.int64)[which] + into + work.first_page
    seed = mix(h[which] ^ ((page.astype(np.uint64) + np.uint64(1)) * PAGE_FACTOR))
    return Stores(steps.astype(np.int64)[which], page, seed)


class Oracle(NamedTuple):
    """What pc.ram must hold. seeds: the first word of each page; written: whether it was ever written (else zeros).

    needed: no page shows a step before this one.
    """

    seeds: Words
    written: npt.NDArray[np.bool_]
    needed: int


def consult(history: History, work: Workload, n_steps: int, ram_pages: int) -> Oracle:
    """The oracle's word on all pages of pc.ram after n_steps steps."""
    seeds = np.zeros(ram_pages, dtype=np.uint64)
    written = np.zeros(ram_pages, dtype=np.bool_)
    if not len(history) or work.rewrite_below >= SHARES:
        return Oracle(seeds, written, n_steps)
    array = history.array
    oldest = int(array[0, 0])
    end, left, needed = n_steps, work.n_pages, n_steps
    while end > oldest and left:
        first = max(oldest, end - CHUNK)
        found = stores(array, work, first, end)
        new = ~written[found.page]
        if new.any():
            needed = first
        pages, values = found.page[new], found.seed[new]
        seeds[pages] = values  # where a page comes several times the last one stays: numpy promises it
        written[pages] = True
        left = work.n_pages - int(np.count_nonzero(written))
        end = first
    return Oracle(seeds, written, needed)


def wrong_pages(memory: Words, seeds: Words, written: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indexes of the pages of `memory`, shape (n, 512), that don't hold what seeds and written say."""
    wrong = np.zeros(len(memory), dtype=np.bool_)
    offsets = np.arange(WORDS, dtype=np.uint64) * WORD
    want = np.empty((COMPARE, WORDS), dtype=np.uint64)
    differs = np.empty((COMPARE, WORDS), dtype=np.bool_)
    for first in range(0, len(memory), COMPARE):
        n = min(COMPARE, len(memory) - first)
        here = slice(first, first + n)
        if written[here].any():
            np.add(seeds[here, None], offsets, out=want[:n])
            want[:n][~written[here]] = 0
            np.not_equal(memory[here], want[:n], out=differs[:n])
        else:
            np.not_equal(memory[here], 0, out=differs[:n])
        if differs[:n].any():
            wrong[here] = differs[:n].any(axis=1)
    return np.flatnonzero(wrong)
