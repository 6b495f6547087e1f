/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flush_copy.c -- the copy strategy: runs of the flush set, cache to guest RAM.  The only writer of guest RAM.
 *
 * Work is shared out as stretches of the bitmap that the threads take from a common counter, in ascending order (measured
 * faster than any other on 4 KiB mappings).  A stretch is a whole number of 512-page groups, so that few threads ever share a 2 MiB page.
 * Copying a page twice is harmless: the cache does not change until the epoch is committed.
 */
#include "internal.h"

#include "fault.h"

#define GROUP_PAGES 512u          /* of 4 KiB: one 2 MiB page */
#define STRETCH_BYTES (1u << 20)  /* of dirty pages, about: what a thread takes at a time */
#define RUNS_AT_ONCE 256u
#define SMALL_BYTES (256u << 10)  /* below this, waking a thread takes longer than copying */

struct copy_job {
    struct colocache *cc;
    struct cc_block *block;
    uint64_t stretch_pages;
    uint64_t next_stretch; /* taken with cc_add */
    uint64_t n_pages, n_runs;
};

/* copy_stretch -- the runs of flush-set pages [from, end), each with a hint where the next one is */
static void copy_stretch(struct copy_job *job, uint64_t from, uint64_t end, uint64_t *n_pages, uint64_t *n_runs)
{
    struct cc_block *block = job->block;
    const struct cc_bitmap *flush_set = &block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET];
    struct cc_bit_run runs[RUNS_AT_ONCE];
    uint32_t n;
    while ((n = cc_bitmap_runs(flush_set, &from, end, runs, RUNS_AT_ONCE)) != 0) {
        for (uint32_t i = 0; i < n; i++) {
            uint64_t first = runs[i].first, hint = i + 1 < n ? runs[i + 1].first : first;
            CC_COPY_RUN(&job->cc->copy, cc_guest_page(block, first), cc_cache_page(block, first), runs[i].n << block->page_shift,
                        block->page_size, cc_cache_page(block, hint), cc_guest_page(block, hint), "flush: a page, half and whole");
            *n_pages += runs[i].n;
        }
        *n_runs += n;
    }
}

static void copy_worker(void *context)
{
    struct copy_job *job = context;
    uint64_t n_pages = 0, n_runs = 0;
    for (;;) {
        uint64_t from = cc_add(&job->next_stretch, 1) * job->stretch_pages;
        if (from >= job->block->n_pages)
            break;
        uint64_t end = job->block->n_pages - from < job->stretch_pages ? job->block->n_pages : from + job->stretch_pages;
        copy_stretch(job, from, end, &n_pages, &n_runs);
    }
    job->cc->copy.fence(); /* before anybody can believe this thread is done */
    cc_add(&job->n_pages, n_pages);
    cc_add(&job->n_runs, n_runs);
}

/* stretch_pages -- by how much is dirty, not by how much there is: a huge, almost clean guest is handed out in few pieces */
static uint64_t stretch_pages(const struct cc_block *block, uint64_t dirty, uint32_t n_threads)
{
    if (n_threads == 1)
        return block->n_pages;
    uint64_t groups = (block->n_pages + GROUP_PAGES - 1) / GROUP_PAGES;
    uint64_t pieces = (dirty << block->page_shift) / STRETCH_BYTES;
    if (pieces < 4ull * n_threads)
        pieces = 4ull * n_threads;
    return (groups + pieces - 1) / pieces * GROUP_PAGES;
}

/* cc_flush_copy -- copy the flush set of every block; all stores are visible when it returns */
void cc_flush_copy(struct colocache *cc, struct colocache_flush_result *out)
{
    out->n_threads = 1;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i];
        uint64_t dirty = cc_bitmap_count(&block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET]);
        if (dirty == 0)
            continue;
        struct copy_job job = {.cc = cc, .block = block};
        uint32_t n_threads = (dirty << block->page_shift) <= SMALL_BYTES ? 1 : cc_pool_size(cc->pool);
        job.stretch_pages = stretch_pages(block, dirty, n_threads);
        cc_pool_run(cc->pool, n_threads, copy_worker, &job);
        out->n_pages += job.n_pages;
        out->n_runs += job.n_runs;
        out->n_bytes += job.n_pages << block->page_shift;
        if (n_threads > out->n_threads)
            out->n_threads = n_threads;
    }
}

/* cc_flush_copy_word -- the pages of one bitmap word, before there is anything to lose (preflush) */
uint64_t cc_flush_copy_word(struct colocache *cc, struct cc_block *block, uint64_t word, uint64_t bits)
{
    uint64_t n_pages = (uint64_t)__builtin_popcountll(bits);
    for (; bits; bits &= bits - 1) {
        uint64_t pfn = word * 64 + (uint64_t)__builtin_ctzll(bits);
        uint8_t *to = cc_guest_page(block, pfn), *from = cc_cache_page(block, pfn);
        CC_COPY_RUN(&cc->copy, to, from, block->page_size, block->page_size, from, to, "preflush: a page, half and whole");
    }
    cc->copy.fence();
    return n_pages;
}

/* cc_flush_copy_all -- guest RAM := cache, every page that is there in either (a sparse image's holes stay holes) */
int cc_flush_copy_all(struct colocache *cc, uint64_t *n_pages_out)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i];
        uint64_t at = 0, first, n_bytes;
        while (cc_block_next_data(block, at, &first, &n_bytes)) {
            uint64_t pfn = first >> block->page_shift, n_pages = n_bytes >> block->page_shift;
            int rc = cc_block_allocate(block, pfn, n_pages);
            if (rc)
                return rc;
            CC_COPY_RUN(&cc->copy, cc_guest_page(block, pfn), cc_cache_page(block, pfn), n_bytes, block->page_size,
                        cc_cache_page(block, pfn), cc_guest_page(block, pfn), "restart: a page, half and whole");
            *n_pages_out += n_pages;
            at = first + n_bytes;
        }
    }
    cc->copy.fence();
    return 0;
}
