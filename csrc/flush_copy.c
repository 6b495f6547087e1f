/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flush_copy.c -- the copy strategy: runs of the flush set, cache to guest RAM.  The only writer of guest RAM.
 *
 * The threads take pieces of the flush set from one cursor that goes over all blocks in ascending order (measured faster than any
 * other on 4 KiB mappings).  A piece is a share of the dirty bytes that are left, however they lie: few pieces are needed and all
 * threads end at about the same time.  Finding a run takes about 3 ns, copying a page 300 and more, so the cursor's lock is free
 * nearly always.  While much is left, a thread takes its next piece before it copies the one it has, to know what to prefetch.
 * Copying a page twice is harmless: the cache does not change until the epoch is committed.
 */
#include "internal.h"

#include "fault.h"

#define SMALL_BYTES (256u << 10) /* up to this, waking a thread takes longer than copying */
#define PIECE_BYTES_MAX (1u << 20)
#define PIECE_BYTES_MIN (64u << 10) /* about 5 us of copying: how long the last thread may be waited for */
#define PIECES_PER_THREAD 4u        /* that what is left is cut into, until they are as small as that */
#define SHORT_RUN_BYTES (64u << 10) /* up to this, page_copy's lanes are faster than its runs */
#define PIECE_PAGES_MAX (PIECE_BYTES_MAX / CC_COPY_PAGE) /* a larger piece is one page, and that is a long run */
#define RUNS_AT_ONCE 256u
#define NO_RUN (~0ull)

struct copy_job {
    struct colocache *cc;
    uint32_t n_threads;
    pthread_mutex_t cursor;   /* over everything below */
    uint32_t block;           /* what lies before page `pfn` of this block is taken */
    uint64_t pfn;
    uint64_t run_end;         /* of the last run taken from this block; a run that begins here is its other part */
    uint64_t left_bytes;      /* not taken yet */
    uint64_t n_pages, n_runs, n_bytes; /* taken */
};

struct piece {
    struct cc_block *block;
    struct cc_bit_run runs[RUNS_AT_ONCE];
    uint32_t n_runs;
    uint64_t n_bytes;
};

static uint64_t piece_bytes(const struct copy_job *job)
{
    uint64_t share = job->left_bytes / ((uint64_t)PIECES_PER_THREAD * job->n_threads);
    return share < PIECE_BYTES_MIN ? PIECE_BYTES_MIN : share > PIECE_BYTES_MAX ? PIECE_BYTES_MAX : share;
}

/* cut_piece -- keep the runs up to `wanted` pages, at least one page; pages kept */
static uint64_t cut_piece(struct piece *piece, uint64_t wanted)
{
    uint64_t n_pages = 0;
    for (uint32_t i = 0; i < piece->n_runs; i++) {
        uint64_t room = wanted - n_pages;
        if (piece->runs[i].n >= room) {
            piece->runs[i].n = room;
            piece->n_runs = i + 1;
        }
        n_pages += piece->runs[i].n;
    }
    return n_pages;
}

/* take_from_block -- the next runs of the cursor's block; false if it has none left.  The cursor is locked. */
static bool take_from_block(struct copy_job *job, struct piece *piece)
{
    struct cc_block *block = piece->block = &job->cc->blocks[job->block];
    uint64_t next = job->pfn, wanted = piece_bytes(job) >> block->page_shift;
    if (wanted == 0)
        wanted = 1;
    uint32_t room = wanted < RUNS_AT_ONCE - CC_RUNS_MIN ? (uint32_t)wanted + CC_RUNS_MIN : RUNS_AT_ONCE;
    piece->n_runs = cc_bitmap_runs(&block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET], &next, block->n_pages, wanted, piece->runs, room);
    if (piece->n_runs == 0)
        return false;
    const struct cc_bit_run found = piece->runs[piece->n_runs - 1];
    const uint32_t n_found = piece->n_runs;
    uint64_t n_pages = cut_piece(piece, wanted), n_bytes = piece->n_bytes = n_pages << block->page_shift;
    const struct cc_bit_run last = piece->runs[piece->n_runs - 1];
    job->n_runs += piece->n_runs - (piece->runs[0].first == job->run_end); /* the other part of a run that was cut is no second run */
    job->n_pages += n_pages;
    job->n_bytes += n_bytes;
    job->left_bytes -= n_bytes < job->left_bytes ? n_bytes : job->left_bytes;
    job->run_end = last.first + last.n;
    job->pfn = piece->n_runs == n_found && last.n == found.n ? next : job->run_end; /* nothing was cut off, or something was */
    return true;
}

/* take_piece -- the next one; without runs if there is no more.  `ahead` of a piece that is to be copied first: only if there is enough
 * left for every thread, so that none ends up with two while another has none. */
static void take_piece(struct copy_job *job, struct piece *piece, const struct piece *ahead)
{
    piece->n_runs = 0;
    pthread_mutex_lock(&job->cursor);
    if (!ahead || job->left_bytes / 2 / job->n_threads >= ahead->n_bytes) {
        while (job->block < job->cc->n_blocks && !take_from_block(job, piece)) {
            job->block++;
            job->pfn = 0;
            job->run_end = NO_RUN;
        }
    }
    pthread_mutex_unlock(&job->cursor);
}

static bool is_long(const struct cc_block *block, struct cc_bit_run run)
{
    return run.n << block->page_shift > SHORT_RUN_BYTES;
}

/* list_pages -- the pages of a piece's short runs as page_copy wants them, `most` at most; how many */
static uint32_t list_pages(const struct piece *piece, uint64_t *at, uint32_t most)
{
    const struct cc_block *block = piece->block;
    uint32_t n = 0;
    for (uint32_t i = 0; i < piece->n_runs; i++) {
        if (is_long(block, piece->runs[i]))
            continue;
        uint64_t first = piece->runs[i].first << block->page_shift, end = first + (piece->runs[i].n << block->page_shift);
        for (; first < end && n < most; first += CC_COPY_PAGE)
            at[n++] = first;
    }
    return n;
}

/* next_long_run -- the first page of the piece's long run after run i; `none` if there is none */
static uint64_t next_long_run(const struct piece *piece, uint32_t i, uint64_t none)
{
    while (++i < piece->n_runs) {
        if (is_long(piece->block, piece->runs[i]))
            return piece->runs[i].first;
    }
    return none;
}

/* copy_piece -- long runs one after the other, then the pages of short ones side by side; of each what comes next is prefetched.
 * `next` is the piece that this thread copies after it, or one without runs. */
static void copy_piece(struct colocache *cc, const struct piece *piece, const struct piece *next)
{
    const struct cc_block *block = piece->block;
    const bool goes_on = next->n_runs && next->block == block;
    uint64_t at[PIECE_PAGES_MAX + CC_COPY_LANES];
    uint32_t n = list_pages(piece, at, PIECE_PAGES_MAX), n_next = goes_on ? list_pages(next, at + n, CC_COPY_LANES) : 0;
    for (uint32_t i = 0; i < piece->n_runs; i++) {
        const struct cc_bit_run run = piece->runs[i];
        if (!is_long(block, run))
            continue;
        uint64_t after = n ? at[0] >> block->page_shift : goes_on ? next->runs[0].first : run.first;
        uint64_t hint = next_long_run(piece, i, after);
        CC_COPY_RUN(&cc->copy, cc_guest_page(block, run.first), cc_cache_page(block, run.first), run.n << block->page_shift,
                    block->page_size, cc_cache_page(block, hint), cc_guest_page(block, hint), "flush: a page, half and whole");
    }
    CC_COPY_PAGES(&cc->copy, cc_guest_page(block, 0), cc_cache_page(block, 0), at, n, n_next, "flush: a page, half and whole");
}

static void copy_worker(void *context)
{
    struct copy_job *job = context;
    struct piece pieces[2];
    uint32_t now = 0;
    for (take_piece(job, &pieces[now], NULL); pieces[now].n_runs; now = !now) {
        take_piece(job, &pieces[!now], &pieces[now]);
        copy_piece(job->cc, &pieces[now], &pieces[!now]);
        if (!pieces[!now].n_runs)
            take_piece(job, &pieces[!now], NULL);
    }
    job->cc->copy.fence(); /* before anybody can believe this thread is done */
}

/* cc_flush_copy -- copy the flush set of every block; all stores are visible when it returns */
void cc_flush_copy(struct colocache *cc, struct colocache_flush_result *out)
{
    struct copy_job job = {.cc = cc, .n_threads = 1, .run_end = NO_RUN};
    for (uint32_t i = 0; i < cc->n_blocks; i++)
        job.left_bytes += cc_bitmap_count(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_FLUSH_SET]) << cc->blocks[i].page_shift;
    if (job.left_bytes > SMALL_BYTES)
        job.n_threads = cc_pool_size(cc->pool);
    pthread_mutex_init(&job.cursor, NULL);
    cc_pool_run(cc->pool, job.n_threads, copy_worker, &job);
    pthread_mutex_destroy(&job.cursor);
    out->n_threads = job.n_threads;
    out->n_pages = job.n_pages;
    out->n_runs = job.n_runs;
    out->n_bytes = job.n_bytes;
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
