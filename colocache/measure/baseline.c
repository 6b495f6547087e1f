/* SPDX-License-Identifier: Apache-2.0 */
/*
 * baseline.c -- what the flush is measured against: the peak copy bandwidth, and QEMU's way.
 *
 * Peak is one sequential pass over two images with the engine's own copy variants and thread pool (the same sources, compiled
 * in), so that it is the most this memory gives to these threads.  QEMU's way is the algorithm of QEMU 10.2, in our own words: the SVM's log
 * is OR-ed into the one bitmap, then for each run every bit is cleared by itself, without atomics, and one memcpy follows; one thread.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "atomics.h"
#include "bitmap.h"
#include "page_copy.h"
#include "pool.h"

#define STRETCH_BYTES (2ull << 20)

struct baseline_pool {
    struct cc_pool *pool;
};

struct pass {
    struct cc_copy copy;
    bool side_by_side;
    char *to;
    const char *from;
    uint64_t n_bytes, next;
};

/* list_pages -- the offsets of the pages of [first, first + n_bytes) that are in the images; how many */
static uint32_t list_pages(const struct pass *pass, uint64_t *at, uint64_t first, uint64_t n_bytes)
{
    uint32_t n = 0;
    for (uint64_t page = first; page < pass->n_bytes && page - first < n_bytes; page += CC_COPY_PAGE)
        at[n++] = page;
    return n;
}

/* pass_worker -- a stretch is taken ahead, so that its first pages can come into the CPU's cache in time, as in the flush */
static void pass_worker(void *context)
{
    struct pass *pass = context;
    uint64_t pages[STRETCH_BYTES / CC_COPY_PAGE + CC_COPY_LANES], next;
    for (uint64_t at = cc_add(&pass->next, STRETCH_BYTES); at < pass->n_bytes; at = next) {
        next = cc_add(&pass->next, STRETCH_BYTES);
        if (pass->side_by_side) {
            uint32_t n = list_pages(pass, pages, at, STRETCH_BYTES);
            pass->copy.pages(pass->to, pass->from, pages, n, list_pages(pass, pages + n, next, CC_COPY_LANES * CC_COPY_PAGE));
        } else {
            pass->copy.run(pass->to + at, pass->from + at, pass->n_bytes - at < STRETCH_BYTES ? pass->n_bytes - at : STRETCH_BYTES);
        }
    }
    pass->copy.fence();
}

/* baseline_pool_create -- n_threads from 1; NULL without memory or threads */
struct baseline_pool *baseline_pool_create(uint32_t n_threads)
{
    struct baseline_pool *made = calloc(1, sizeof *made);
    if (made && cc_pool_create(n_threads, NULL, NULL, &made->pool) != 0) {
        free(made);
        return NULL;
    }
    return made;
}

uint32_t baseline_pool_size(const struct baseline_pool *pool)
{
    return cc_pool_size(pool->pool);
}

void baseline_pool_destroy(struct baseline_pool *pool)
{
    if (pool)
        cc_pool_destroy(pool->pool);
    free(pool);
}

/* baseline_sequential -- one pass of n_bytes (a multiple of 4096) with all threads of the pool, straight on or with pages side by side as
 * the flush copies them; -1 if the CPU lacks the variant */
int baseline_sequential(struct baseline_pool *pool, void *to, const void *from, uint64_t n_bytes, int variant, bool side_by_side)
{
    struct pass pass = {.side_by_side = side_by_side, .to = to, .from = from, .n_bytes = n_bytes};
    if (!cc_copy_pick(variant, &pass.copy))
        return -1;
    cc_pool_run(pool->pool, cc_pool_size(pool->pool), pass_worker, &pass);
    return 0;
}

static uint64_t find_bit(const uint64_t *bitmap, uint64_t n_bits, uint64_t from, uint64_t flip)
{
    while (from < n_bits) {
        uint64_t word = (bitmap[from / 64] ^ flip) >> (from % 64);
        if (word) {
            from += (uint64_t)__builtin_ctzll(word);
            return from < n_bits ? from : n_bits;
        }
        from = (from / 64 + 1) * 64;
    }
    return n_bits;
}

/* baseline_qemu_union -- the SVM's log into the one bitmap */
void baseline_qemu_union(uint64_t *bitmap, const uint64_t *svm_log, uint64_t n_words)
{
    for (uint64_t w = 0; w < n_words; w++)
        bitmap[w] |= svm_log[w];
}

/* clear_run -- bit by bit, a plain load and store each, as QEMU does it under its lock; how many were set */
static uint64_t clear_run(uint64_t *bitmap, uint64_t from, uint64_t end)
{
    uint64_t n_set = 0;
    for (uint64_t pfn = from; pfn < end; pfn++) {
        uint64_t bit = 1ull << (pfn % 64), word = bitmap[pfn / 64];
        bitmap[pfn / 64] = word & ~bit;
        n_set += (word & bit) != 0;
    }
    return n_set;
}

/* baseline_qemu_flush -- pages copied; the bitmap is empty afterwards */
uint64_t baseline_qemu_flush(uint64_t *bitmap, uint64_t n_pages, void *guest, const void *cache)
{
    uint64_t copied = 0, at = 0;
    while ((at = find_bit(bitmap, n_pages, at, 0)) < n_pages) {
        uint64_t end = find_bit(bitmap, n_pages, at, ~0ull);
        copied += clear_run(bitmap, at, end);
        memcpy((char *)guest + at * 4096, (const char *)cache + at * 4096, (end - at) * 4096);
        at = end;
    }
    return copied;
}

/* baseline_qemu_clear -- the same walk and bit-by-bit clear without the copies: what the union of a flush is compared with */
uint64_t baseline_qemu_clear(uint64_t *bitmap, uint64_t n_pages)
{
    uint64_t cleared = 0, at = 0;
    while ((at = find_bit(bitmap, n_pages, at, 0)) < n_pages) {
        uint64_t end = find_bit(bitmap, n_pages, at, ~0ull);
        cleared += clear_run(bitmap, at, end);
        at = end;
    }
    return cleared;
}

struct baseline_bitmap {
    struct cc_bitmap bitmap;
};

/* baseline_bitmap_create -- the engine's own bitmap over words and a summary (one bit per word) of the caller's; NULL without memory */
struct baseline_bitmap *baseline_bitmap_create(uint64_t *words, uint64_t *summary, uint64_t n_bits)
{
    struct baseline_bitmap *made = calloc(1, sizeof *made);
    if (made) {
        cc_bitmap_init(&made->bitmap, words, summary, n_bits);
        cc_bitmap_rebuild_summary(&made->bitmap);
    }
    return made;
}

void baseline_bitmap_destroy(struct baseline_bitmap *bitmap)
{
    free(bitmap);
}

/* baseline_bitmap_runs -- find every run, as the flush does; how many there are, and their pages in *n_pages_out */
uint64_t baseline_bitmap_runs(const struct baseline_bitmap *bitmap, uint64_t *n_pages_out)
{
    struct cc_bit_run runs[256];
    uint64_t at = 0, n_runs = 0, n_pages = 0;
    uint32_t n;
    while ((n = cc_bitmap_runs(&bitmap->bitmap, &at, bitmap->bitmap.n_bits, runs, 256)) != 0) {
        for (uint32_t i = 0; i < n; i++)
            n_pages += runs[i].n;
        n_runs += n;
    }
    *n_pages_out = n_pages;
    return n_runs;
}

/* baseline_bitmap_rebuild -- after the caller wrote the words */
void baseline_bitmap_rebuild(struct baseline_bitmap *bitmap)
{
    cc_bitmap_rebuild_summary(&bitmap->bitmap);
}

/* baseline_bitmap_move -- what a seal does to the bitmaps: flush set := pvm | svm with its counts, then both are cleared; pages of the union */
uint64_t baseline_bitmap_move(struct baseline_bitmap *flush_set, struct baseline_bitmap *pvm, struct baseline_bitmap *svm)
{
    struct cc_union_counts counts = {0};
    cc_bitmap_union_into(&flush_set->bitmap, &pvm->bitmap, &svm->bitmap, &counts);
    cc_bitmap_clear_all(&pvm->bitmap);
    cc_bitmap_clear_all(&svm->bitmap);
    return counts.both_or_either;
}

/* baseline_touch -- read one word per cache line: pushes everything else out of the CPU's caches.  It writes nothing: lines left
 * dirty here would be written to memory in the timed part, and count as a cost of whatever is timed. */
void baseline_touch(const void *memory, uint64_t n_bytes)
{
    const volatile uint64_t *words = memory;
    for (uint64_t i = 0; i < n_bytes / 8; i += 8)
        (void)words[i];
}

#if defined(__x86_64__)
static bool has_clflushopt(void)
{
    unsigned int a, b = 0, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_CLFLUSHOPT);
}

__attribute__((target("clflushopt"))) static void flush_lines(const char *memory, uint64_t n_bytes)
{
    for (uint64_t at = 0; at < n_bytes; at += 64)
        _mm_clflushopt((void *)(memory + at));
    _mm_mfence();
}
#endif

/* baseline_evict -- push exactly these bytes out of every cache of every core, written back where they must be, however large the
 * caches are; false where the CPU has no quick way (clflush alone takes 60 times as long) */
bool baseline_evict(const void *memory, uint64_t n_bytes)
{
#if defined(__x86_64__)
    if (has_clflushopt()) {
        flush_lines(memory, n_bytes);
        return true;
    }
#endif
    (void)memory;
    (void)n_bytes;
    return false;
}

/* baseline_copies -- can this CPU copy with that variant? */
bool baseline_copies(int variant)
{
    struct cc_copy copy;
    return cc_copy_pick(variant, &copy);
}
