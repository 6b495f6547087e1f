/* SPDX-License-Identifier: Apache-2.0 */
/*
 * flush_set.c -- what must be copied at this epoch: PVM bits or SVM bits.  And the only place that clears a bit.
 *
 * A page only the PVM wrote must come over; a page only the SVM wrote must go back; so it is the union, and both bitmaps are needed.
 * Seal moves: the union is there and the commit word stored before a bit is cleared.  A death in between leaves extra bits, which
 * cost a few copies; a bit cleared too early would be a page that stays wrong.
 */
#include "internal.h"

#include "bitmap.h"
#include "checksum.h"
#include "error.h"
#include "fault.h"
#include "flush_set.h"
#include "sparse.h"

int cc_flush_set_unite(struct colocache *cc, struct colocache_seal_result *out, uint64_t *checksum_out)
{
    struct cc_union_counts counts = {0};
    uint64_t checksum = 0;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (cc->blocks[i].standing != CC_HERE)
            continue; /* the epoch is without it */
        struct cc_bitmap *pvm = &cc->blocks[i].bitmaps[COLOCACHE_BITMAP_PVM];
        struct cc_bitmap *svm = &cc->blocks[i].bitmaps[COLOCACHE_BITMAP_SVM];
        struct cc_bitmap *flush_set = &cc->blocks[i].bitmaps[COLOCACHE_BITMAP_FLUSH_SET];
        if (!cc_bitmap_tail_ok(pvm->words, pvm->n_bits) || !cc_bitmap_tail_ok(svm->words, svm->n_bits))
            return cc_fail(COLOCACHE_E_TAIL, "block %s has bits set past its last page %llu: something wrote into the control region",
                           cc->blocks[i].name, (unsigned long long)cc->blocks[i].n_pages - 1);
        int sources = CC_FLUSH_SOURCES();
        if (sources == CC_FLUSH_PVM_ONLY || sources == CC_FLUSH_NONE)
            cc_bitmap_clear_all(svm);
        if (sources == CC_FLUSH_SVM_ONLY || sources == CC_FLUSH_NONE)
            cc_bitmap_clear_all(pvm);
        counts.sum = 0;
        cc_bitmap_union_into(flush_set, pvm, svm, &counts);
        checksum += cc_checksum_term(cc_bitmap_checksum_of(flush_set, counts.sum), i);
        CC_CRASH_POINT("seal: a flush set is united");
    }
    out->flush_pages = counts.both_or_either;
    out->pvm_pages = counts.both_or_either - counts.svm;
    out->svm_pages = counts.both_or_either - counts.pvm;
    out->both_pages = counts.pvm + counts.svm - counts.both_or_either;
    *checksum_out = cc_checksum_finish(checksum);
    return 0;
}

uint64_t cc_flush_set_checksum(struct colocache *cc)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]))
            sum += cc_checksum_term(cc_bitmap_checksum(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_FLUSH_SET]), i);
    }
    return cc_checksum_finish(sum);
}

/* Most of it is known to be there; what is known lies as scattered as the pages, so it is fetched some runs ahead. */
int cc_flush_set_allocate(struct colocache *cc)
{
    struct cc_bit_run runs[CC_RUNS_MIN * 4];
    for (uint32_t b = 0; b < cc->n_blocks; b++) {
        struct cc_block *block = &cc->blocks[b];
        uint64_t from = 0;
        uint32_t n;
        if (!block->sparse || block->standing != CC_HERE)
            continue;
        while ((n = cc_bitmap_runs(&block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET], &from, block->n_pages, runs, CC_RUNS_MIN * 4)) != 0) {
            for (uint32_t i = 0; i < n; i++)
                __builtin_prefetch(&block->allocated[runs[i].first / 64]);
            for (uint32_t i = 0; i < n; i++) {
                int rc = block->staged ? cc_sparse_allocate(block, runs[i].first, runs[i].n)
                                       : cc_sparse_prepare(block, runs[i].first, runs[i].n);
                if (rc)
                    return rc;
            }
        }
    }
    return 0;
}

void cc_flush_set_drop(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc_observe32(&cc->n_blocks); i++) { /* an abort is any thread's */
        if (!cc_gone(&cc->blocks[i]))
            cc_bitmap_clear_all(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_PVM]);
    }
}

void cc_flush_set_moved(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (cc_gone(&cc->blocks[i]))
            continue;
        cc_bitmap_clear_all(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_PVM]);
        CC_CRASH_POINT("seal: between clearing PVM and SVM bits");
        cc_bitmap_clear_all(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_SVM]);
        CC_CRASH_POINT("seal: bits are cleared");
    }
}

void cc_flush_set_forget(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        for (uint32_t kind = 0; kind < CC_BITMAPS && !cc_gone(&cc->blocks[i]); kind++) {
            cc_bitmap_rebuild_summary(&cc->blocks[i].bitmaps[kind]);
            cc_bitmap_clear_all(&cc->blocks[i].bitmaps[kind]);
            CC_CRASH_POINT("attach: a bitmap is cleared");
        }
    }
}

/* A page that comes again after its bit was taken sets the bit again. */
bool cc_flush_set_take_arrived(struct cc_block *block, uint64_t *word, uint64_t *bits_out)
{
    struct cc_bitmap *pvm = &block->bitmaps[COLOCACHE_BITMAP_PVM];
    return cc_bitmap_take_next(pvm, word, pvm->n_words, bits_out);
}

void cc_flush_set_put_back(struct cc_block *block, uint64_t word, uint64_t bits)
{
    for (; bits; bits &= bits - 1)
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], word * 64 + (uint64_t)__builtin_ctzll(bits), 1);
}
