/* SPDX-License-Identifier: Apache-2.0 */
/*
 * receive.c -- pages into the cache image, then their bits into the PVM bitmap.
 *
 * Order, for each page: `receiving` >= its epoch, then its bytes, then its bit.  The first makes an attach know that the
 * cache may no longer be the sealed epoch; the last makes a set bit mean a complete page.
 * It is the only writer of both, whoever brings the bytes (a caller, or a socket: stream.c).
 * Many threads receive at once; they meet only in the gate's counter and in bitmap words they share.
 */
#include "internal.h"

#include <string.h>

#include "bitmap.h"
#include "block.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "receive.h"
#include "sparse.h"

/* done -- the bytes of these pages are in the cache */
static void done(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    CC_CRASH_POINT("receive: bytes, before their bits");
    cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], first_pfn, n_pages);
    CC_CRASH_POINT("receive: after the bits");
    cc_epoch_received(cc, n_pages);
}

int cc_receive_runs(struct colocache *cc, uint64_t epoch, struct cc_block *block, const struct cc_run *runs, uint32_t n_runs,
                    struct iovec *iov, cc_bring_fn *bring, void *context, uint64_t *n_pages)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < n_runs; i++)
        rc = cc_sparse_allocate(block, runs[i].first_pfn, runs[i].n_pages);
    if (rc == 0)
        rc = cc_epoch_enter(cc, epoch);
    if (rc)
        return rc;
    uint32_t n_iov = 0;
    for (uint32_t i = 0; i < n_runs; i++) {
        uint8_t *to = cc_cache_page(block, runs[i].first_pfn);
        uint64_t n_bytes = (uint64_t)runs[i].n_pages << block->page_shift;
        if (runs[i].flags & CC_RUN_ZERO)
            memset(to, 0, n_bytes);
        else
            iov[n_iov++] = (struct iovec){.iov_base = to, .iov_len = n_bytes};
    }
    rc = bring(context, iov, n_iov);
    CC_CRASH_POINT("stream: a packet's bytes, whole or torn");
    for (uint32_t i = 0; i < n_runs; i++) {
        if (rc) { /* touched, perhaps torn: the bit, but not the count */
            cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], runs[i].first_pfn, runs[i].n_pages);
        } else {
            done(cc, block, runs[i].first_pfn, runs[i].n_pages);
            *n_pages += runs[i].n_pages;
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
    for (uint64_t i = 0; block->sparse && i < n_pages; i++) {
        rc = cc_sparse_allocate(block, pfns[i], 1);
        if (rc)
            return rc;
    }
    rc = cc_epoch_enter(cc, epoch);
    if (rc)
        return rc;
    const uint8_t *from = data;
    for (uint64_t i = 0; i < n_pages; i++) {
        CC_HALF(cc_cache_page(block, pfns[i]), from + i * block->page_size, block->page_size, "receive: half a page");
        memcpy(cc_cache_page(block, pfns[i]), from + i * block->page_size, block->page_size);
        done(cc, block, pfns[i], 1);
    }
    cc_epoch_leave(cc);
    return 0;
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
        rc = cc_sparse_allocate(block, first_pfn, n_pages);
    if (rc == 0)
        rc = cc_epoch_enter(cc, epoch);
    if (rc)
        return rc;
    memset(cc_cache_page(block, first_pfn), 0, n_pages << block->page_shift);
    done(cc, block, first_pfn, n_pages);
    cc_epoch_leave(cc);
    return 0;
}
