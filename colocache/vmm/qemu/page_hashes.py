# SPDX-License-Identifier: Apache-2.0
"""A hash of each page of a QEMU's memory: what the two sides of a pair compare at a checkpoint."""

from __future__ import annotations

import time

import numpy as np

from colocache.vmm._native import ffi, lib
from colocache.vmm.history import Words
from colocache.vmm.machine import LoadReport, Ram
from colocache.vmm.workload import PAGE


def page_hashes(ram: Ram) -> Words:
    """Of the image as it is now, shape (n_pages,)."""
    hashes = np.empty(ram.n_pages, dtype=np.uint64)
    with ffi.from_buffer("uint64_t[]", hashes) as out:
        lib.guest_hash_pages(ffi.cast("void *", ram.addr), ram.n_pages, PAGE, out)
    return hashes


def buffer_hashes(data: bytes) -> Words:
    """Of these bytes, whole pages."""
    n_pages = len(data) // PAGE
    hashes = np.empty(n_pages, dtype=np.uint64)
    with ffi.from_buffer("uint64_t[]", hashes) as out:
        lib.guest_hash_pages(ffi.from_buffer(data), n_pages, PAGE, out)
    return hashes


def compare_pages(ram: Ram, hashes: Words | None) -> LoadReport:
    """The image against the primary's hashes, which begin with those of its pages; None: nothing is compared."""
    if hashes is None:
        return LoadReport(0, (), 0)
    begin = time.perf_counter_ns()
    wrong = np.flatnonzero(page_hashes(ram) != hashes[: ram.n_pages])
    return LoadReport(ram.n_pages, tuple((ram.name, int(page)) for page in wrong), time.perf_counter_ns() - begin)
