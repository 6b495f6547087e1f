/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flush_copy.c -- the copy strategy: runs of the flush set, cache to guest RAM, all of them while the VM stands.
 *
 * The threads take pieces of the flush set from one cursor that goes over all blocks in ascending order (measured faster than any
 * other on 4 KiB mappings).  A piece is a share of the dirty bytes that are left, however they lie: few pieces are needed and all
 * threads end at about the same time.  Under the cursor's lock its bits are only counted; each thread finds the runs of its piece itself,
 * a few at a time between the copies, so that the memory is never idle for long.
 * Copying a page twice is harmless: the cache does not change until the epoch is committed.
 */
#include "internal.h"

#include <string.h>

#include "bitmap.h"
#include "block.h"
#include "fault.h"
#include "flush_copy.h"
#include "flush_set.h"
#include "pool.h"
#include "sparse.h"
#include "strategy.h"

#define THREAD_BYTES (1u << 20) /* what a thread must find to copy: waking it takes as long as copying a quarter of that */
#define PIECE_BYTES_MAX (1u << 20)
#define PIECE_BYTES_MIN (64u << 10) /* about 5 us of copying: how long the last thread may be waited for */
#define PIECES_PER_THREAD 4u        /* that what is left is cut into, until they are as small as that */
#define RUNS_AT_ONCE (2 * CC_RUNS_MIN)
#define WAITING_MAX (5 * CC_COPY_LANES) /* whole groups of lanes, and one more that is prefetched meanwhile */

struct copy_job {
    struct colocache *cc;
    cc_copy_set_fn *set;
    uint32_t n_threads;
    pthread_mutex_t cursor; /* over everything below */
    uint32_t block;         /* what lies before page `pfn` of this block is taken */
    uint64_t pfn;
    uint64_t left_bytes;               /* not taken yet */
    uint64_t n_pages, n_runs, n_bytes; /* taken; n_runs of the threads that are done */
};

/* The pages to copy in [from, end). */
struct piece {
    const struct cc_block *block;
    uint64_t from, end;
};

/* One thread's: pages that it has found and not copied yet. */
struct waiting {
    const struct cc_block *block;
    uint32_t n;
    uint64_t at[WAITING_MAX]; /* byte offsets of CC_COPY_PAGE each */
};

static uint64_t piece_bytes(const struct copy_job *job)
{
    uint64_t share = job->left_bytes / ((uint64_t)PIECES_PER_THREAD * job->n_threads);
    return share < PIECE_BYTES_MIN ? PIECE_BYTES_MIN : share > PIECE_BYTES_MAX ? PIECE_BYTES_MAX : share;
}

/* take_piece -- the next one; false if there is no more */
static bool take_piece(struct copy_job *job, struct piece *piece)
{
    uint64_t n_pages = 0;
    pthread_mutex_lock(&job->cursor);
    for (; job->block < job->cc->n_blocks; job->block++, job->pfn = 0) {
        const struct cc_block *block = &job->cc->blocks[job->block];
        if (cc_gone(block))
            continue;
        uint64_t wanted = piece_bytes(job) >> block->page_shift;
        *piece = (struct piece){.block = block, .from = job->pfn};
        n_pages = cc_bitmap_advance(job->set(block), &job->pfn, wanted ? wanted : 1);
        if (n_pages) {
            uint64_t n_bytes = n_pages << block->page_shift;
            piece->end = job->pfn;
            job->n_pages += n_pages;
            job->n_bytes += n_bytes;
            job->left_bytes -= n_bytes < job->left_bytes ? n_bytes : job->left_bytes;
            break;
        }
    }
    pthread_mutex_unlock(&job->cursor);
    return n_pages != 0;
}

/* copy_waiting -- all but the last `keep` pages that wait, side by side; those come into the CPU's cache meanwhile */
static void copy_waiting(struct colocache *cc, struct waiting *waiting, uint32_t keep)
{
    const uint32_t n = waiting->n - keep;
    if (n)
        CC_COPY_PAGES(&cc->copy, cc_guest_page(waiting->block, 0), cc_cache_page(waiting->block, 0), waiting->at, n, keep,
                      "flush: a page, half and whole");
    memcpy(waiting->at, waiting->at + n, keep * sizeof waiting->at[0]); /* n >= keep: nothing overlaps */
    waiting->n = keep;
}

static void add_waiting(struct colocache *cc, struct waiting *waiting, const struct cc_block *block, struct cc_bit_run run)
{
    const uint64_t end = (run.first + run.n) << block->page_shift;
    for (uint64_t at = run.first << block->page_shift; at < end; at += CC_COPY_PAGE) {
        if (waiting->n == WAITING_MAX)
            copy_waiting(cc, waiting, CC_COPY_LANES);
        waiting->at[waiting->n++] = at;
    }
}

/* add_there -- the pages of a run that are no holes in the cache: reading one would fill it */
static void add_there(struct colocache *cc, struct waiting *waiting, const struct cc_block *block, struct cc_bit_run run)
{
    for (uint64_t pfn = run.first; pfn < run.first + run.n; pfn++) {
        if (cc_sparse_to_copy(block, pfn / 64) >> (pfn % 64) & 1)
            add_waiting(cc, waiting, block, (struct cc_bit_run){.first = pfn, .n = 1});
    }
}

/* copy_piece -- its pages, but for the last few, which wait for what comes next; how many runs begin in it */
static uint64_t copy_piece(const struct copy_job *job, const struct piece *piece, struct waiting *waiting)
{
    const struct cc_block *block = piece->block;
    const bool may_be_holes = block->keeps_holes && !block->staged;
    const struct cc_bitmap *set = job->set(block);
    struct colocache *cc = job->cc;
    struct cc_bit_run runs[RUNS_AT_ONCE];
    /* the other part of a run that was cut is counted where it begins */
    const bool goes_on = piece->from > 0 && cc_bitmap_has(set, piece->from - 1) && cc_bitmap_has(set, piece->from);
    uint64_t from = piece->from, n_runs = 0;
    uint32_t n;
    if (waiting->block != block) {
        if (waiting->n)
            copy_waiting(cc, waiting, 0);
        waiting->block = block;
    }
    while ((n = cc_bitmap_runs(set, &from, piece->end, runs, RUNS_AT_ONCE)) != 0) {
        n_runs += n;
        for (uint32_t i = 0; i < n; i++)
            (may_be_holes ? add_there : add_waiting)(cc, waiting, block, runs[i]);
    }
    return n_runs - goes_on;
}

static void copy_worker(void *context)
{
    struct copy_job *job = context;
    struct waiting waiting = {0};
    struct piece piece;
    uint64_t n_runs = 0;
    while (take_piece(job, &piece))
        n_runs += copy_piece(job, &piece, &waiting);
    if (waiting.n)
        copy_waiting(job->cc, &waiting, 0);
    job->cc->copy.fence(); /* before anybody can believe this thread is done */
    pthread_mutex_lock(&job->cursor);
    job->n_runs += n_runs;
    pthread_mutex_unlock(&job->cursor);
}

void cc_copy_pages_of(struct colocache *cc, cc_copy_set_fn *set, struct colocache_flush_result *out)
{
    struct copy_job job = {.cc = cc, .set = set, .n_threads = 1};
    for (uint32_t i = 0; i < cc->n_blocks; i++)
        job.left_bytes += cc_gone(&cc->blocks[i]) ? 0 : cc_bitmap_count(set(&cc->blocks[i])) << cc->blocks[i].page_shift;
    if (job.left_bytes >= 2 * THREAD_BYTES) {
        uint64_t wanted = job.left_bytes / THREAD_BYTES;
        job.n_threads = wanted < cc_pool_size(cc->pool) ? (uint32_t)wanted : cc_pool_size(cc->pool);
    }
    pthread_mutex_init(&job.cursor, NULL);
    cc_pool_run(cc->pool, job.n_threads, copy_worker, &job);
    pthread_mutex_destroy(&job.cursor);
    out->n_threads = job.n_threads;
    out->n_pages = job.n_pages;
    out->n_runs = job.n_runs;
    out->n_bytes = job.n_bytes;
}

static const struct cc_bitmap *flush_set_of(const struct cc_block *block)
{
    return &block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET];
}

/* punch_holes -- pages of the flush set that are holes in the cache become holes in guest RAM */
static int punch_holes(struct cc_block *block)
{
    const struct cc_bitmap *set = flush_set_of(block);
    struct cc_bit_run runs[RUNS_AT_ONCE];
    uint64_t from = 0, first = 0, n_holes = 0;
    uint32_t n;
    int rc = 0;
    while (rc == 0 && (n = cc_bitmap_runs(set, &from, block->n_pages, runs, RUNS_AT_ONCE)) != 0) {
        for (uint32_t i = 0; rc == 0 && i < n; i++) {
            for (uint64_t pfn = runs[i].first; rc == 0 && pfn < runs[i].first + runs[i].n; pfn++) {
                if (cc_sparse_to_copy(block, pfn / 64) >> (pfn % 64) & 1)
                    continue;
                if (n_holes && first + n_holes != pfn) {
                    rc = cc_sparse_punch_guest(block, first, n_holes);
                    n_holes = 0;
                }
                first = n_holes++ ? first : pfn;
            }
        }
    }
    return rc == 0 && n_holes ? cc_sparse_punch_guest(block, first, n_holes) : rc;
}

static int begin(struct colocache *cc, struct colocache_flush_result *out)
{
    int rc = 0;
    CC_CRASH_POINT("flush: before the first page");
    for (uint32_t i = 0; rc == 0 && i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]) && cc->blocks[i].keeps_holes)
            rc = punch_holes(&cc->blocks[i]);
    }
    if (rc)
        return rc; /* the epoch is sealed, and the flush can be repeated */
    cc_copy_pages_of(cc, flush_set_of, out);
    CC_CRASH_POINT("flush: after the last page");
    return 0;
}

static int finish(struct colocache *cc, struct colocache_flush_result *out)
{
    (void)cc, (void)out;
    return 0; /* the VM stood until all was copied */
}

static int replay(struct colocache *cc, struct colocache_flush_result *out)
{
    int rc = cc_flush_set_allocate(cc); /* this process doesn't know yet which pages of a sparse block are there */
    return rc ? rc : begin(cc, out);
}

const struct cc_strategy cc_flush_copy = {.number = 1, .begin = begin, .finish = finish, .replay = replay};
