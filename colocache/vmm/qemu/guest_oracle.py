# SPDX-License-Identifier: Apache-2.0
"""What the memory of the small guest must hold, wherever it stands, computed from the salts that it keeps itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colocache.vmm.history import History, Words, consult, page_words, stores, wrong_pages
from colocache.vmm.qemu.guest_image import (
    CONSTANT_PAGES,
    CONTROL_PAGE,
    END_PAGE,
    LOAD,
    MAILBOX_ADDR,
    MAILBOX_PAGE,
    RING_ENTRIES,
    RING_PAGE,
    RING_PAGES,
    TOP_FREE,
    WORK_ADDR,
    GuestImage,
)
from colocache.vmm.workload import PAGE, Workload

N_SALTS = 10  # the word of struct guest_control
FIRST = LOAD // PAGE  # page of pc.ram where the guest begins
STEP_ADDR = MAILBOX_ADDR  # of the step, in pc.ram
STARTED_PAGE = FIRST + END_PAGE  # its first word: GUEST_STARTED


@dataclass(frozen=True)
class Findings:
    """Pages looked at, and those that don't hold what they must."""

    n_pages: int
    wrong: tuple[int, ...]
    step: int


def check(memory: Words, image: GuestImage) -> Findings:
    """Compare guest RAM, shape (pages of pc.ram, 512), standing, with what its own history says.

    What it was asked to do is read from its memory too: the machine whose state was loaded may have been asked for
    something else than this one. While a firmware still loads it, only the area where it will work can be told: zeros.
    """
    if not memory[STARTED_PAGE, 0]:
        area = range(WORK_ADDR // PAGE, len(memory) - TOP_FREE // PAGE)
        written = np.flatnonzero(memory[area.start : area.stop].any(axis=1)) + area.start
        return Findings(len(area), tuple(written.tolist()), 0)
    constant = image.pages
    wrong = {FIRST + page for page in CONSTANT_PAGES if (memory[FIRST + page] != constant[page]).any()}
    box = memory[FIRST + MAILBOX_PAGE].tolist()
    work = Workload(*box[4:9])
    step = step_of(memory)
    area = range(WORK_ADDR // PAGE, work.first_page + work.n_pages)
    n_pages = len(CONSTANT_PAGES) + RING_PAGES + len(area)
    history = _history(memory, step)
    if history is None or not work.fits(len(memory)) or work.first_page < area.start:
        return Findings(n_pages, tuple(sorted(wrong | {FIRST + MAILBOX_PAGE, FIRST + RING_PAGE})), step)
    must = consult(history, work, step, len(memory))
    seen = slice(area.start, area.stop)
    found = wrong_pages(memory[seen], must.seeds[seen], must.written[seen]) + area.start
    wrong |= set(found.tolist()) - set(_under_way(memory, history, work, step, must.seeds, must.written))
    return Findings(n_pages, tuple(sorted(wrong)), step)


def step_of(memory: Words) -> int:
    """The step that is under way or comes next."""
    return int(memory[FIRST + MAILBOX_PAGE, 0])


def _history(memory: Words, step: int) -> History | None:
    """The salts in the ring, oldest first; None if they are in no order."""
    n_salts = int(memory[FIRST + CONTROL_PAGE, N_SALTS])
    ring = memory[FIRST + RING_PAGE : FIRST + RING_PAGE + RING_PAGES].reshape(-1, 2)
    if n_salts <= RING_ENTRIES:
        entries = ring[:n_salts]
        # An entry that is being written: its salt is not in force yet.
    else:
        # The oldest entry may be half overwritten by the one that comes next.
        at = n_salts % RING_ENTRIES
        entries = np.concatenate([ring[at + 1 :], ring[:at]])
    firsts = entries[:, 0]
    if len(entries) and (int(firsts[-1]) > step or bool((firsts[1:] <= firsts[:-1]).any())):
        return None
    return History(entries)


def _under_way(
    memory: Words, history: History, work: Workload, step: int, seeds: Words, written: np.ndarray
) -> list[int]:
    """Pages of the step that is under way which are new up to one word and old after it, in the order of its stores."""
    if not len(history):
        return []
    now = stores(history.array, work, step, step + 1)
    done: list[int] = []
    for page, seed in zip(now.page.tolist(), now.seed, strict=True):
        new = page_words(np.array([seed], dtype=np.uint64))[0]
        old = page_words(seeds[page : page + 1])[0] if written[page] else np.zeros(PAGE // 8, dtype=np.uint64)
        fresh = memory[page] == new
        cut = PAGE // 8 if fresh.all() else int(np.argmin(fresh))
        if (memory[page, cut:] != old[cut:]).any():
            break
        done.append(page)
        if cut < PAGE // 8:
            break  # nothing after it has been touched
    return done
