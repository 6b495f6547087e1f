# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module `colocache.measure._baseline`: what is measured against (baseline.c, transfer.c).

The engine's copy variants, thread pool, bitmaps and look-out are compiled in from csrc/, so that both are measured with
one code; the checkpoints of transfer.c are libcolocache's own.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

OURS = ("bitmap", "bitmap_pass", "bitmap_sweep", "lookout")

DECLARATIONS = """
struct baseline_pool;
struct baseline_pool *baseline_pool_create(uint32_t n_threads);
uint32_t baseline_pool_size(const struct baseline_pool *pool);
void baseline_pool_destroy(struct baseline_pool *pool);
int baseline_sequential(struct baseline_pool *pool, void *to, const void *from, uint64_t n_bytes, int variant,
                        bool side_by_side);
void baseline_qemu_union(uint64_t *bitmap, const uint64_t *svm_log, uint64_t n_words);
uint64_t baseline_qemu_flush(uint64_t *bitmap, uint64_t n_pages, void *guest, const void *cache);
uint64_t baseline_qemu_clear(uint64_t *bitmap, uint64_t n_pages);
struct baseline_bitmap;
struct baseline_bitmap *baseline_bitmap_create(uint64_t *words, uint64_t *summary, uint64_t n_bits);
void baseline_bitmap_destroy(struct baseline_bitmap *bitmap);
uint64_t baseline_bitmap_runs(const struct baseline_bitmap *bitmap, uint64_t *n_pages_out);
void baseline_bitmap_rebuild(struct baseline_bitmap *bitmap);
uint64_t baseline_bitmap_move(struct baseline_bitmap *flush_set, struct baseline_bitmap *pvm,
                              struct baseline_bitmap *svm);
void baseline_touch(const void *memory, uint64_t n_bytes);
bool baseline_evict(const void *memory, uint64_t n_bytes);
bool baseline_copies(int variant);
struct transfer {
    int near, far, timeout_ms;
    void *cc, *sender;
    uint64_t epoch, n_pages, state_bytes;
    const uint64_t *words;
    uint64_t arrived_ns;
    uint64_t *received;
    const uint64_t *log;
    const char *primary;
    char *cache, *guest;
    ...;
};
int64_t transfer_ours(struct transfer *transfer);
int64_t transfer_hot(struct transfer *transfer, uint64_t n_bytes);
int64_t transfer_in_place(struct transfer *transfer);
"""

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "colocache.measure._baseline",
    '#define _GNU_SOURCE\n#include "baseline.c"\n#include "transfer.c"\n#include "page_copy.c"\n#include "pool.c"\n',
    sources=[f"csrc/{name}.c" for name in OURS],
    include_dirs=[str(HERE), str(CSRC), str(CSRC / "include")],
    libraries=[":libcolocache.so.0"],  # setup.py adds the directory of the one it has just linked
    runtime_library_dirs=["$ORIGIN/../lib"],
    depends=[
        *(str(HERE / name) for name in ("baseline.c", "transfer.c")),
        *(str(CSRC / name) for name in ("page_copy.c", "pool.c", "bitmap.h", "lookout.h", "include/colocache.h")),
    ],
    extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", "-pthread"],
    py_limited_api=True,
)
