# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled module `colocache.measure._baseline`: what a flush is measured against (baseline.c).

The engine's copy variants, thread pool and bitmaps are compiled in from csrc/, so that both are measured with one code.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

BITMAPS = ("bitmap", "bitmap_pass", "bitmap_sweep")

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
"""

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "colocache.measure._baseline",
    '#define _GNU_SOURCE\n#include "baseline.c"\n#include "page_copy.c"\n#include "pool.c"\n',
    sources=[f"csrc/{name}.c" for name in BITMAPS],
    include_dirs=[str(HERE), str(CSRC), str(CSRC / "include")],
    depends=[str(HERE / "baseline.c"), str(CSRC / "page_copy.c"), str(CSRC / "pool.c"), str(CSRC / "bitmap.h")],
    extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", "-pthread"],
    py_limited_api=True,
)
