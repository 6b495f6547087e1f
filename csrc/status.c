/* SPDX-License-Identifier: Apache-2.0 */
/* status.c -- looking at a handle of one's own: its state, its blocks, its bitmaps. */
#include "internal.h"

#include <string.h>

#include "bitmap.h"
#include "block.h"
#include "epoch.h"
#include "error.h"
#include "inspect.h"
#include "pool.h"
#include "staging.h"
#include "version.h"

/* phase_of -- a state, for callers */
static enum colocache_phase phase_of(enum cc_state state)
{
    static const uint8_t phases[CC_STATES] = {
        [CC_EMPTY] = COLOCACHE_PHASE_EMPTY,
        [CC_LIVE] = COLOCACHE_PHASE_LIVE,
        [CC_CLAIMED_FIRST] = COLOCACHE_PHASE_SEALING,
        [CC_CLAIMED] = COLOCACHE_PHASE_SEALING,
        [CC_CLAIMED_ASKED] = COLOCACHE_PHASE_SEALING,
        [CC_SEALED] = COLOCACHE_PHASE_SEALING,
        [CC_SEALED_ASKED] = COLOCACHE_PHASE_SEALING,
        [CC_RUNNING] = COLOCACHE_PHASE_LIVE,
        [CC_LOAD_FAILED] = COLOCACHE_PHASE_LOAD_FAILED,
        [CC_TAKING_OVER] = COLOCACHE_PHASE_LIVE, /* FAILED_OVER is said when it stands in shared memory */
        [CC_FAILED_OVER] = COLOCACHE_PHASE_FAILED_OVER,
    };
    return phases[state];
}

int colocache_get_status(struct colocache *cc, struct colocache_status *out)
{
    struct colocache_status status = {0};
    struct cc_record record;
    if (!cc || !out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or out is NULL");
    int rc = cc_inspect_head(cc->region.control, &status, &record);
    if (rc)
        return rc;
    status.control_bytes = cc_peek(&cc->region.end_bytes);
    enum cc_state state = cc_epoch_state(cc);
    status.phase = phase_of(state);
    status.failover_pending = cc_epoch_failover_asked(state);
    status.received_pages = cc_observe(&cc->epoch.received_pages);
    status.open_epoch = cc_observe(&cc->epoch.open);
    status.spilled_bytes = cc_observe(&cc->spill.n_bytes);
    status.n_threads = cc_pool_size(cc->pool);
    status.copy_variant = (uint32_t)cc->copy.variant;
    rc = cc_staging_bytes(cc, &status.staged_bytes);
    if (rc)
        return rc;
    return cc_give_struct(out, &status, sizeof status, "status");
}

int colocache_get_block(struct colocache *cc, uint32_t index, struct colocache_block_info *out)
{
    struct cc_block *block;
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    int rc = cc_block_get(cc, index, &block);
    if (rc)
        return rc;
    memset(out, 0, sizeof *out);
    memcpy(out->name, block->name, sizeof out->name);
    out->len_bytes = block->len_bytes;
    out->page_size = block->page_size;
    out->sparse = block->sparse;
    out->n_pages = block->n_pages;
    out->pvm_pages = cc_bitmap_count(&block->bitmaps[COLOCACHE_BITMAP_PVM]);
    out->svm_pages = cc_bitmap_count(&block->bitmaps[COLOCACHE_BITMAP_SVM]);
    out->flush_pages = cc_bitmap_count(&block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET]);
    out->guest_addr = block->guest.vm_addr;
    out->cache_addr = block->cache.addr;
    return 0;
}

int colocache_get_bitmap(struct colocache *cc, uint32_t index, int kind, uint64_t *words, uint64_t n_words)
{
    struct cc_block *block;
    int rc = cc_block_get(cc, index, &block);
    if (rc)
        return rc;
    if (kind < 0 || kind >= (int)CC_BITMAPS || !words)
        return cc_fail(COLOCACHE_E_ARGUMENT, "there is no bitmap %d, or words is NULL", kind);
    const struct cc_bitmap *bitmap = &block->bitmaps[kind];
    if (n_words != bitmap->n_words)
        return cc_fail(COLOCACHE_E_LENGTH, "a bitmap of block %s has %llu words, room for %llu was given", block->name,
                       (unsigned long long)bitmap->n_words, (unsigned long long)n_words);
    for (uint64_t w = 0; w < n_words; w++)
        words[w] = cc_observe(&bitmap->words[w]);
    return 0;
}
