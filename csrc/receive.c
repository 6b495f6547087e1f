/* SPDX-License-Identifier: Apache-2.0 */
/*
 * receive.c -- pages into the cache image, then their bits into the PVM bitmap.
 *
 * Order, for each page: `receiving` >= its epoch, then its bytes, then its bit.  The first makes an attach know that the
 * cache may no longer be the sealed epoch; the last makes a set bit mean a complete page.
 * It is the only writer of both, whoever brings the bytes (a caller, or a socket: stream.c).
 *
 * In bounded memory the bytes are staged (staging.h), and a page of zeros becomes a hole before its bit is set: else bytes that
 * were staged before would show under it.  Until the first seal they go straight to guest RAM, without a bit: there is nothing to protect
 * yet, a death begins the initial copy anew, and so the first epoch needs no second copy of all of memory.
 * Many threads receive at once; they meet only in the gate's counter and in bitmap words they share.
 */
#include "internal.h"

#include <errno.h>
#include <string.h>

#include "bitmap.h"
#include "block.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "map.h"
#include "receive.h"
#include "sparse.h"
#include "spill.h"
#include "staging.h"

/* Where the bytes of an arriving page go. */
enum place { TO_CACHE, TO_STAGING, TO_GUEST };

/* place_of -- inside the gate */
static enum place place_of(const struct colocache *cc)
{
    if (!cc->bounded)
        return TO_CACHE;
    return cc_observe(&cc->region.control->commit_word) ? TO_STAGING : TO_GUEST;
}

/* knock -- into the gate, with a block that stays until it is left: a seal that removes one waits for the last to leave */
static int knock(struct colocache *cc, const struct cc_block *block)
{
    cc_epoch_knock(cc);
    int rc = cc_block_still_here(block);
    if (rc)
        cc_epoch_leave(cc);
    return rc;
}

/* open_or_leave -- after a knock and what `rc` says of it: an epoch is opened only by what can be received */
static int open_or_leave(struct colocache *cc, uint64_t epoch, int rc)
{
    if (rc == 0)
        rc = cc_epoch_open(cc, epoch);
    if (rc)
        cc_epoch_leave(cc);
    return rc;
}

/* done -- the bytes of these pages are there */
static void done(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, enum place place)
{
    CC_CRASH_POINT("receive: bytes, before their bits");
    if (place != TO_GUEST)
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], first_pfn, n_pages);
    CC_CRASH_POINT("receive: after the bits");
    cc_epoch_received(cc, n_pages);
}

static uint8_t *address(const struct cc_block *block, uint64_t pfn, enum place place)
{
    return place == TO_GUEST ? cc_guest_page(block, pfn) : cc_cache_page(block, pfn);
}

/* zero_room -- what pages of zeros need before the epoch opens: nothing, where they stay holes */
static int zero_room(const struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    return block->keeps_holes && place_of(cc) != TO_STAGING ? 0 : cc_sparse_allocate(block, first_pfn, n_pages);
}

/* zero -- before anything is sealed a preflush may be reading what is there, so that is filled and not given back */
static int zero(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, enum place place)
{
    if (place == TO_STAGING)
        return cc_staging_zero(cc, block, first_pfn, n_pages);
    if (block->keeps_holes)
        return cc_sparse_zero(block, place == TO_GUEST ? &block->guest : &block->cache, first_pfn, n_pages,
                              cc_observe(&cc->region.control->commit_word) == 0);
    memset(address(block, first_pfn, place), 0, n_pages << block->page_shift);
    return 0;
}

static int bring_pages(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, const void *data,
                       enum place place)
{
    const uint64_t n_bytes = n_pages << block->page_shift;
    if (place == TO_STAGING)
        return cc_staging_write(cc, block, first_pfn, n_pages, data);
    CC_HALF(address(block, first_pfn, place), data, n_bytes, "receive: half a page");
    memcpy(address(block, first_pfn, place), data, n_bytes);
    return 0;
}

/* stage_runs -- from memory.  A store through the mapping would be a SIGBUS on a full file system. */
static int stage_runs(struct colocache *cc, struct cc_block *block, const struct cc_run *runs, uint32_t n_runs, const uint8_t *from)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < n_runs; i++) {
        if (runs[i].flags & CC_RUN_ZERO)
            continue;
        rc = cc_staging_write(cc, block, runs[i].first_pfn, runs[i].n_pages, from);
        from += (uint64_t)runs[i].n_pages << block->page_shift;
    }
    return rc;
}

/* bring_staged -- all of it to where it belongs at once */
static int bring_staged(struct colocache *cc, struct cc_block *block, const struct cc_run *runs, uint32_t n_runs, struct iovec *iov,
                        uint32_t n_iov, cc_bring_fn *bring, void *context, enum place place)
{
    int rc = bring(context, iov, n_iov);
    for (uint32_t i = 0; rc == 0 && place == TO_STAGING && i < n_runs; i++) {
        if (!(runs[i].flags & CC_RUN_ZERO))
            cc_spill_drop(cc, block, runs[i].first_pfn, runs[i].n_pages);
    }
    return rc;
}

/* spill_run -- by parts, from whoever brings them: what is on its way takes no more memory, however many threads receive */
static __attribute__((noinline)) int spill_run(struct colocache *cc, struct cc_block *block, const struct cc_run *run, cc_bring_fn *bring,
                                               void *context)
{
    uint8_t part[CC_SPILL_PART];
    const uint64_t n_bytes = (uint64_t)run->n_pages << block->page_shift;
    int rc = 0;
    for (uint64_t at = 0, n; rc == 0 && at < n_bytes; at += n) {
        n = n_bytes - at < sizeof part ? n_bytes - at : sizeof part;
        struct iovec iov = {.iov_base = part, .iov_len = n};
        rc = bring(context, &iov, 1);
        if (rc == 0)
            rc = cc_spill_write(cc, block, run->first_pfn, at, part, n);
    }
    if (rc == 0)
        cc_spill_done(cc, block, run->first_pfn, run->n_pages);
    return rc;
}

/* bring_and_spill -- a packet of which some runs go into the spill file; their iovecs lead nowhere */
static int bring_and_spill(struct colocache *cc, struct cc_block *block, const struct cc_run *runs, uint32_t n_runs, struct iovec *iov,
                           cc_bring_fn *bring, void *context)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < n_runs; i++) {
        if (runs[i].flags & CC_RUN_ZERO)
            continue;
        rc = iov->iov_base ? bring_staged(cc, block, &runs[i], 1, iov, 1, bring, context, TO_STAGING)
                           : spill_run(cc, block, &runs[i], bring, context);
        iov++;
    }
    return rc;
}

int cc_receive_runs(struct colocache *cc, uint64_t epoch, struct cc_block *block, const struct cc_run *runs, uint32_t n_runs,
                    struct iovec *iov, cc_bring_fn *bring, void *context, const void *memory, uint64_t *n_pages)
{
    int rc = knock(cc, block);
    if (rc)
        return rc;
    for (uint32_t i = 0; rc == 0 && i < n_runs; i++)
        rc = runs[i].flags & CC_RUN_ZERO ? zero_room(cc, block, runs[i].first_pfn, runs[i].n_pages)
                                         : cc_sparse_allocate(block, runs[i].first_pfn, runs[i].n_pages);
    rc = open_or_leave(cc, epoch, rc);
    if (rc)
        return rc;
    const enum place place = place_of(cc);
    uint32_t n_iov = 0, n_spilled = 0;
    for (uint32_t i = 0; rc == 0 && i < n_runs; i++) {
        const uint64_t first_pfn = runs[i].first_pfn, n = runs[i].n_pages;
        if (runs[i].flags & CC_RUN_ZERO) {
            rc = zero(cc, block, first_pfn, n, place);
        } else {
            const int told = place == TO_STAGING && !memory ? cc_staging_expect(cc, block, first_pfn, n) : 0;
            iov[n_iov++] =
                (struct iovec){.iov_base = told == CC_SPILLS ? NULL : address(block, first_pfn, place), .iov_len = n << block->page_shift};
            rc = told == CC_SPILLS ? 0 : told;
            n_spilled += told == CC_SPILLS;
        }
    }
    if (rc == 0)
        rc = memory && place == TO_STAGING ? stage_runs(cc, block, runs, n_runs, memory)
             : n_spilled                   ? bring_and_spill(cc, block, runs, n_runs, iov, bring, context)
                                           : bring_staged(cc, block, runs, n_runs, iov, n_iov, bring, context, place);
    if (rc == -EFAULT && place == TO_STAGING)
        rc = cc_staging_no_room(block);
    CC_CRASH_POINT("stream: a packet's bytes, whole or torn");
    for (uint32_t i = 0; i < n_runs; i++) {
        if (rc == 0) {
            done(cc, block, runs[i].first_pfn, runs[i].n_pages, place);
            *n_pages += runs[i].n_pages;
        } else if (place == TO_CACHE) { /* touched, perhaps torn: the bit, but not the count */
            cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], runs[i].first_pfn, runs[i].n_pages);
        }
    }
    cc_epoch_leave(cc);
    return rc;
}

int colocache_receive_pages(struct colocache *cc, uint64_t epoch, uint32_t block_index, const uint64_t *pfns, uint64_t n_pages,
                            const void *data, uint64_t len_bytes)
{
    struct cc_block *block;
    if (n_pages && (!pfns || !data))
        return cc_fail(COLOCACHE_E_ARGUMENT, "pfns or data is NULL");
    int rc = cc_block_get(cc, block_index, &block);
    for (uint64_t i = 0; rc == 0 && i < n_pages; i++)
        rc = cc_block_range(block, pfns[i], 1);
    if (rc)
        return rc;
    if (n_pages > block->n_pages * 64 || len_bytes != n_pages * block->page_size) /* the first keeps the product small */
        return cc_fail(COLOCACHE_E_LENGTH, "%llu bytes were given for %llu pages, block %s uses %u a page", (unsigned long long)len_bytes,
                       (unsigned long long)n_pages, block->name, block->page_size);
    rc = knock(cc, block);
    if (rc)
        return rc;
    for (uint64_t i = 0; rc == 0 && block->sparse && i < n_pages; i++)
        rc = cc_sparse_allocate(block, pfns[i], 1);
    rc = open_or_leave(cc, epoch, rc);
    if (rc)
        return rc;
    const uint8_t *from = data;
    const enum place place = place_of(cc);
    for (uint64_t i = 0, n; rc == 0 && i < n_pages; i += n) {
        for (n = 1; i + n < n_pages && pfns[i + n] == pfns[i] + n;)
            n++;
        rc = bring_pages(cc, block, pfns[i], n, from + i * block->page_size, place);
        if (rc == 0)
            done(cc, block, pfns[i], n, place);
    }
    cc_epoch_leave(cc);
    return rc;
}

int colocache_receive_page(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t pfn, const void *data, uint64_t len_bytes)
{
    return colocache_receive_pages(cc, epoch, block, &pfn, 1, data, len_bytes);
}

int colocache_receive_zero(struct colocache *cc, uint64_t epoch, uint32_t block_index, uint64_t first_pfn, uint64_t n_pages)
{
    struct cc_block *block;
    int rc = cc_block_get(cc, block_index, &block);
    if (rc == 0)
        rc = cc_block_range(block, first_pfn, n_pages);
    if (rc == 0)
        rc = knock(cc, block);
    if (rc)
        return rc;
    rc = open_or_leave(cc, epoch, zero_room(cc, block, first_pfn, n_pages));
    if (rc)
        return rc;
    const enum place place = place_of(cc);
    rc = zero(cc, block, first_pfn, n_pages, place);
    if (rc == 0)
        done(cc, block, first_pfn, n_pages, place);
    else if (place == TO_CACHE) /* some may be zeros now: the bit, but not the count */
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], first_pfn, n_pages);
    cc_epoch_leave(cc);
    return rc;
}

/* ---- in place: the caller writes the bytes itself ------------------------------------------------------------------------ */

/* room_for -- in the file, before anybody stores through the mapping: a hole on a full file system would be a SIGBUS */
static int room_for(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, enum place place)
{
    if (place != TO_STAGING)
        return 0;
    int rc = cc_staging_expect(cc, block, first_pfn, n_pages);
    if (rc == CC_SPILLS)
        return cc_fail(COLOCACHE_E_NO_MEMORY,
                       "%llu pages of block %s would pass the limit of staged pages, and what is received in place can't be spilled: take "
                       "them by colocache_receive_pages",
                       (unsigned long long)n_pages, block->name);
    if (rc)
        return rc;
    rc = cc_map_reserve(block->cache.fd, block->cache.offset + (first_pfn << block->page_shift), n_pages << block->page_shift, block->name);
    return rc == COLOCACHE_E_NO_MEMORY ? cc_staging_no_room(block) : rc;
}

int colocache_receive_begin(struct colocache *cc, uint64_t epoch, uint32_t block_index, uint64_t first_pfn, uint64_t n_pages,
                            void **addr_out)
{
    struct cc_block *block;
    if (!addr_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "addr_out is NULL");
    *addr_out = NULL;
    int rc = cc_block_get(cc, block_index, &block);
    if (rc == 0 && n_pages == 0)
        rc = cc_fail(COLOCACHE_E_ARGUMENT, "no pages are to be received in place: give at least 1");
    if (rc == 0)
        rc = cc_block_range(block, first_pfn, n_pages);
    if (rc == 0)
        rc = knock(cc, block);
    if (rc)
        return rc;
    rc = open_or_leave(cc, epoch, cc_sparse_allocate(block, first_pfn, n_pages));
    if (rc)
        return rc;
    rc = room_for(cc, block, first_pfn, n_pages, place_of(cc));
    if (rc)
        cc_epoch_leave(cc);
    else
        *addr_out = address(block, first_pfn, place_of(cc)); /* the place can't change while somebody is inside the gate */
    return rc;
}

int colocache_receive_done(struct colocache *cc, uint64_t epoch, uint32_t block_index, uint64_t first_pfn, uint64_t n_pages, int whole)
{
    struct cc_block *block;
    int rc = cc_block_get(cc, block_index, &block);
    if (rc == 0)
        rc = cc_block_range(block, first_pfn, n_pages);
    if (rc == 0)
        rc = cc_epoch_check_inside(cc, epoch);
    if (rc)
        return rc;
    const enum place place = place_of(cc);
    if (whole) {
        if (place == TO_STAGING)
            cc_spill_drop(cc, block, first_pfn, n_pages);
        done(cc, block, first_pfn, n_pages, place);
    } else if (place == TO_CACHE) { /* touched, perhaps torn: the bit, but not the count */
        CC_CRASH_POINT("receive: an abandoned range, before its bits");
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], first_pfn, n_pages);
    }
    cc_epoch_leave(cc);
    return 0;
}
