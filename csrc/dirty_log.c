/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_log.c -- words from any source into the SVM bitmap.
 *
 * vCPUs and device threads are stopped; get, OR, clear; all before anything writes guest RAM again.  A source gets
 * into memory of its own, hands over, then clears: a death in between loses the process, whose log then counts as all ones.
 */
#include "internal.h"

#include "bitmap.h"
#include "block.h"
#include "clock.h"
#include "error.h"
#include "fault.h"
#include "gate.h"
#include "source.h"
#include "sparse.h"
#include "stats.h"

/* mark -- OR into the SVM bitmap inside the mark gate, so that a seal's union and clear see all of it or nothing */
static int mark(struct colocache *cc, uint32_t index, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    struct cc_block *block;
    int rc = cc_block_get(cc, index, &block);
    if (rc == 0)
        rc = cc_block_range(block, first_pfn, n_pages);
    if (rc || n_pages == 0)
        return rc;
    if (words && !cc_bitmap_tail_ok(words, n_pages))
        return cc_fail(COLOCACHE_E_TAIL, "words for %llu pages of block %s have bits set past the last page", (unsigned long long)n_pages,
                       block->name);
    if (cc->bounded)
        return 0; /* what the VM writes is private to it and forgotten: nothing to restore */
    cc_gate_enter(&cc->mark_gate);
    CC_CRASH_POINT("sync: before the SVM bits");
    rc = cc_block_still_here(block); /* again: a seal may have closed the gate in between */
    if (rc == 0 && words)
        cc_bitmap_or_words(&block->bitmaps[COLOCACHE_BITMAP_SVM], first_pfn, n_pages, words);
    else if (rc == 0)
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_SVM], first_pfn, n_pages);
    CC_CRASH_POINT("sync: after the SVM bits");
    cc_gate_leave(&cc->mark_gate);
    return rc;
}

int colocache_mark_dirty(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages)
{
    return mark(cc, block, first_pfn, n_pages, NULL);
}

int colocache_sync_words(struct colocache *cc, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    if (!words && n_pages)
        return cc_fail(COLOCACHE_E_ARGUMENT, "words is NULL");
    return mark(cc, block, first_pfn, n_pages, words);
}

static int take_into_svm(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    struct cc_block *found;
    int rc = cc_block_get(context, block, &found);
    if (rc == 0)
        rc = cc_source_page_size(found->name, found->page_size);
    if (rc == 0)
        rc = mark(context, block, first_pfn, n_pages, words);
    CC_CRASH_POINT("sync: taken, before the log is cleared");
    return rc;
}

int colocache_sync_dirty_log(struct colocache *cc, struct colocache_source *source)
{
    if (!cc || !source)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or the source is NULL");
    uint64_t begin = cc_now_ns();
    int rc = cc_source_sync(source, take_into_svm, cc);
    cc_stats_synced(cc, begin);
    CC_CRASH_POINT("sync: the log is cleared");
    return rc;
}

int colocache_dirty_log_lost(struct colocache *cc)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        const struct cc_block *block = &cc->blocks[i];
        uint64_t at = cc_gone(block) ? block->len_bytes : 0, first, n_bytes;
        /* What is a hole in both images of a sparse block is zero in both: nobody wrote it, and it must not be allocated. */
        while (cc_sparse_next_data(block, at, &first, &n_bytes)) {
            int rc = mark(cc, i, first >> block->page_shift, n_bytes >> block->page_shift, NULL);
            if (rc)
                return rc;
            at = first + n_bytes;
        }
    }
    return 0;
}
