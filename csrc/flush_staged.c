/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flush_staged.c -- the strategy of bounded memory: guest RAM's image holds the epoch before, the cache holds what came since.
 *
 * The flush set is what the PVM sent.  Pages whose bytes are in the cache are copied over the image, pages that are holes there become zeros,
 * and what is in the spill file comes last: of a page that is in both the cache's bytes are older, and stay where they are.
 * The VM stands: a page that it has not written shows the image's new bytes at once through its private mapping, and what it has
 * written is forgotten at the end.  After a death nothing private is left and all of it is done again: holes and bytes in the cache stay
 * as they are until `committed` is published.
 */
#include "internal.h"

#include "bitmap.h"
#include "block.h"
#include "clock.h"
#include "fault.h"
#include "flush_copy.h"
#include "flush_set.h"
#include "forget.h"
#include "spill.h"
#include "staging.h"
#include "strategy.h"

static const uint8_t zeros[CC_PAGE] __attribute__((aligned(64)));

/* zero_run -- pages of the flush set that are holes in the cache */
static void zero_run(struct colocache *cc, const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    uint8_t *to = cc_guest_page(block, first_pfn);
    for (uint64_t at = 0; at < n_pages << block->page_shift; at += CC_PAGE)
        CC_COPY_RUN(&cc->copy, to + at, zeros, CC_PAGE, CC_PAGE, "flush: a page of zeros, half and whole");
}

static void zero_holes(struct colocache *cc, const struct cc_block *block, struct colocache_flush_result *out)
{
    const struct cc_bitmap *flush_set = &block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET];
    for (uint64_t s = cc_bitmap_next_summary(flush_set, 0); s < flush_set->n_summary_words; s = cc_bitmap_next_summary(flush_set, s + 1)) {
        for (uint64_t in_use = flush_set->summary[s]; in_use; in_use &= in_use - 1) {
            uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(in_use), holes = flush_set->words[w] & ~block->staged->words[w];
            holes &= ~cc_spill_word(block, w);
            while (holes) {
                uint64_t first = (uint64_t)__builtin_ctzll(holes), rest = holes >> first;
                uint64_t n = ~rest ? (uint64_t)__builtin_ctzll(~rest) : 64;
                zero_run(cc, block, w * 64 + first, n);
                holes &= ~cc_word_mask(first, n);
                out->n_pages += n;
                out->n_bytes += n << block->page_shift;
                out->n_runs++;
            }
        }
    }
}

/* forget -- the VM's private pages, where it runs on a mapping of this process */
static int forget(struct colocache *cc, struct colocache_flush_result *out)
{
    uint64_t begin = cc_now_ns();
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i];
        if (!cc_gone(block))
            rc = cc_forget(&block->forget, block->guest.vm_addr, block->len_bytes);
    }
    out->forget_ns = cc_now_ns() - begin;
    return rc;
}

static const struct cc_bitmap *staged_of(const struct cc_block *block)
{
    return block->staged;
}

static int begin(struct colocache *cc, struct colocache_flush_result *out)
{
    struct colocache_flush_result zeroed = {0};
    CC_CRASH_POINT("flush: before the first page");
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        const struct cc_block *block = &cc->blocks[i];
        if (cc_gone(block))
            continue;
        cc_bitmap_keep(block->staged, &block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET]); /* a page that broke off is in no set */
        cc_spill_hide(block);
        zero_holes(cc, block, &zeroed);
    }
    cc->copy.fence();
    cc_copy_pages_of(cc, staged_of, out);
    out->n_pages += zeroed.n_pages;
    out->n_runs += zeroed.n_runs;
    out->n_bytes += zeroed.n_bytes;
    int rc = cc_spill_flush(cc, out);
    CC_CRASH_POINT("flush: after the last page");
    if (rc)
        return rc;
    return forget(cc, out); /* before `committed`: an error leaves a flush that can be repeated */
}

static int finish(struct colocache *cc, struct colocache_flush_result *out)
{
    (void)cc, (void)out;
    return 0; /* the VM stood until all was copied */
}

static int replay(struct colocache *cc, struct colocache_flush_result *out)
{
    int rc = cc_flush_set_allocate(cc); /* this process doesn't know yet which pages of a sparse block are there */
    for (uint32_t i = 0; rc == 0 && i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]))
            cc_staging_find(&cc->blocks[i]);
    }
    return rc ? rc : begin(cc, out);
}

const struct cc_strategy cc_flush_staged = {.number = 2, .bounded = true, .begin = begin, .finish = finish, .replay = replay};
