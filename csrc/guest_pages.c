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

/* write_word -- the same for a block that keeps its holes.  A receiver may bring a page of this word at this moment, so guest RAM is
 * written by a system call: where the page is gone on a full machine, that is an error and no SIGBUS.  Before the first seal no page that
 * is known to be there is taken from the cache. */
static int write_word(struct cc_block *block, uint64_t word, uint64_t bits)
{
    int rc = 0;
    for (; rc == 0 && bits; bits &= bits - 1) {
        const uint64_t pfn = word * 64 + (uint64_t)__builtin_ctzll(bits);
        if (cc_observe(&block->allocated[word]) >> (pfn % 64) & 1)
            rc = cc_sparse_write_guest(block, pfn);
        else
            rc = cc_sparse_punch_guest(block, pfn, 1);
    }
    return rc;
}

/* next_stretch -- to copy; what lies before it is a hole in the cache, and becomes one in guest RAM where the block keeps them */
static int next_stretch(struct cc_block *block, uint64_t at, uint64_t *first, uint64_t *n_bytes)
{
    if (!block->keeps_holes)
        return cc_sparse_next_data(block, at, first, n_bytes);
    const bool more = cc_sparse_next_staged(block, at, first, n_bytes);
    const uint64_t end = more ? *first : block->len_bytes;
    int rc = end > at ? cc_sparse_punch_guest(block, at >> block->page_shift, (end - at) >> block->page_shift) : 0;
    return rc ? rc : more;
}

int cc_guest_copy_all(struct colocache *cc, uint64_t *n_pages_out)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i];
        uint64_t at = cc_gone(block) ? block->len_bytes : 0, first, n_bytes;
        int rc;
        while ((rc = next_stretch(block, at, &first, &n_bytes)) > 0) {
            uint64_t pfn = first >> block->page_shift, n_pages = n_bytes >> block->page_shift;
            rc = cc_sparse_prepare(block, pfn, n_pages);
            if (rc)
                return rc;
            CC_COPY_RUN(&cc->copy, cc_guest_page(block, pfn), cc_cache_page(block, pfn), n_bytes, block->page_size,
                        "restart: a page, half and whole");
            *n_pages_out += n_pages;
            at = first + n_bytes;
        }
        if (rc < 0)
            return rc;
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
        for (uint64_t w = 0; cc_flush_set_take_arrived(block, &w, &bits); w++) {
            int rc = block->keeps_holes ? write_word(block, w, bits) : 0;
            if (rc) {
                cc_flush_set_put_back(block, w, bits);
                return rc;
            }
            n_pages += block->keeps_holes ? (uint64_t)__builtin_popcountll(bits) : copy_word(cc, block, w, bits);
        }
    }
    if (n_pages_out)
        *n_pages_out = n_pages;
    return 0;
}
