/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest_pages.c -- guest RAM from the cache outside a flush: the whole image when a VM restarts from the cache, and single words of pages
 * while the initial copy arrives, before there is anything to lose.
 */
#include "internal.h"

#include "block.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "flush_set.h"
#include "guest_pages.h"
#include "sparse.h"

/* copy_word -- the pages of one bitmap word */
static uint64_t copy_word(struct colocache *cc, struct cc_block *block, uint64_t word, uint64_t bits)
{
    uint64_t n_pages = (uint64_t)__builtin_popcountll(bits);
    for (; bits; bits &= bits - 1) {
        uint64_t pfn = word * 64 + (uint64_t)__builtin_ctzll(bits);
        uint8_t *to = cc_guest_page(block, pfn), *from = cc_cache_page(block, pfn);
        CC_COPY_RUN(&cc->copy, to, from, block->page_size, block->page_size, "preflush: a page, half and whole");
    }
    cc->copy.fence();
    return n_pages;
}

int cc_guest_copy_all(struct colocache *cc, uint64_t *n_pages_out)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i];
        uint64_t at = cc_gone(block) ? block->len_bytes : 0, first, n_bytes;
        while (cc_sparse_next_data(block, at, &first, &n_bytes)) {
            uint64_t pfn = first >> block->page_shift, n_pages = n_bytes >> block->page_shift;
            int rc = cc_sparse_allocate(block, pfn, n_pages);
            if (rc)
                return rc;
            CC_COPY_RUN(&cc->copy, cc_guest_page(block, pfn), cc_cache_page(block, pfn), n_bytes, block->page_size,
                        "restart: a page, half and whole");
            *n_pages_out += n_pages;
            at = first + n_bytes;
        }
    }
    cc->copy.fence();
    return 0;
}

int colocache_preflush(struct colocache *cc, uint64_t *n_pages_out)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    if (cc_observe(&cc->region.control->commit_word) || cc_epoch_state(cc) != CC_EMPTY)
        return cc_fail(COLOCACHE_E_ORDER, "preflush is only for the initial copy, before anything is sealed");
    /* in bounded memory no bit is set: the pages are where they belong already */
    uint64_t n_pages = 0;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i]; /* nothing was sealed, so none is gone */
        uint64_t bits;
        for (uint64_t w = 0; cc_flush_set_take_arrived(block, &w, &bits); w++)
            n_pages += copy_word(cc, block, w, bits);
    }
    if (n_pages_out)
        *n_pages_out = n_pages;
    return 0;
}
