/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bitmap_sweep.c -- union and clear: passes over whole bitmaps while every writer is kept out, with plain loads and stores.
 *
 * Where most words are in use they are passed straight through.  Where few are, each is a cache miss far from the last: they are
 * collected some at a time, prefetched as they are found, and worked on when all of them are on their way.
 */
#include "bitmap.h"

#include <string.h>

#include "bitmap_pass.h"
#include "fault.h"

#define SUMMARY_DENSE 16 /* of 64 words in use: from here a straight pass over all 64 is cheaper than picking */
#define COLLECT 128u     /* picked words under way at a time */

static inline bool is_dense(uint64_t in_use)
{
    return in_use == ~0ull || (in_use && __builtin_popcountll(in_use) >= SUMMARY_DENSE); /* the usual cases without counting */
}

static inline uint64_t words_under(const struct cc_bitmap *bitmap, uint64_t s)
{
    return bitmap->n_words - s * 64 < 64 ? bitmap->n_words - s * 64 : 64;
}

/* ---- union ------------------------------------------------------------------------------------------------------------- */

struct union_sweep {
    struct cc_bitmap *flush_set;
    const struct cc_bitmap *pvm, *svm;
    struct cc_union_counts *counts;
    cc_unite_fn unite;
    uint32_t n_picked;
    uint64_t picked[COLLECT];
};

static void unite_picked(struct union_sweep *sweep)
{
    CC_CRASH_POINT("bitmap: a flush set's summary, before its words");
    for (uint32_t i = 0; i < sweep->n_picked; i++) {
        uint64_t w = sweep->picked[i];
        cc_unite_plain(sweep->flush_set->words + w, sweep->pvm->words + w, sweep->svm->words + w, 1, w, sweep->counts);
    }
    sweep->n_picked = 0;
}

static void pick(struct union_sweep *sweep, uint64_t s, uint64_t visit)
{
    for (; visit; visit &= visit - 1) {
        uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(visit);
        __builtin_prefetch(sweep->pvm->words + w, 0);
        __builtin_prefetch(sweep->svm->words + w, 0);
        __builtin_prefetch(sweep->flush_set->words + w, 1);
        sweep->picked[sweep->n_picked++] = w;
        if (sweep->n_picked == COLLECT)
            unite_picked(sweep);
    }
}

/* unite_span -- the 64 words under summary word s */
static void unite_span(struct union_sweep *sweep, uint64_t s)
{
    uint64_t in_use = sweep->pvm->summary[s] | sweep->svm->summary[s];
    uint64_t visit = in_use | sweep->flush_set->summary[s]; /* a bit of an older flush set must not stay */
    sweep->flush_set->summary[s] = in_use;
    if (is_dense(visit))
        sweep->unite(sweep->flush_set->words + s * 64, sweep->pvm->words + s * 64, sweep->svm->words + s * 64,
                     words_under(sweep->flush_set, s), s * 64, sweep->counts);
    else
        pick(sweep, s, visit);
}

/* prefetch_spans -- summary words of a top word, before any of them is looked at */
static void prefetch_spans(const struct union_sweep *sweep, uint64_t t, uint64_t bits)
{
    for (; bits; bits &= bits - 1) {
        uint64_t s = (t * 64 + (uint64_t)__builtin_ctzll(bits)) << sweep->flush_set->top_shift;
        __builtin_prefetch(sweep->pvm->summary + s, 0);
        __builtin_prefetch(sweep->svm->summary + s, 0);
        __builtin_prefetch(sweep->flush_set->summary + s, 1);
    }
}

/* unite_top_word -- the spans under word t of top */
static void unite_top_word(struct union_sweep *sweep, uint64_t t)
{
    struct cc_bitmap *flush_set = sweep->flush_set;
    uint64_t in_use = sweep->pvm->top[t] | sweep->svm->top[t];
    uint64_t visit = in_use | flush_set->top[t];
    flush_set->top[t] = in_use;
    prefetch_spans(sweep, t, visit);
    for (; visit; visit &= visit - 1) {
        uint64_t s = (t * 64 + (uint64_t)__builtin_ctzll(visit)) << flush_set->top_shift;
        for (uint64_t end = s + (1ull << flush_set->top_shift); s < end && s < flush_set->n_summary_words; s++)
            unite_span(sweep, s);
    }
}

/* cc_bitmap_union_into -- flush_set := pvm | svm, and the counts */
void cc_bitmap_union_into(struct cc_bitmap *flush_set, const struct cc_bitmap *pvm, const struct cc_bitmap *svm,
                          struct cc_union_counts *counts)
{
    struct union_sweep sweep = {.flush_set = flush_set, .pvm = pvm, .svm = svm, .counts = counts, .unite = cc_unite_variant(0)};
    for (uint32_t c = 0; c < CC_TOP_SUMMARY_WORDS; c++) {
        uint64_t in_use = pvm->top_summary[c] | svm->top_summary[c];
        for (uint64_t left = in_use | flush_set->top_summary[c]; left; left &= left - 1)
            unite_top_word(&sweep, c * 64 + (uint64_t)__builtin_ctzll(left));
        flush_set->top_summary[c] = in_use;
    }
    unite_picked(&sweep);
}

/* ---- clear -------------------------------------------------------------------------------------------------------------- */

struct clear_sweep {
    uint64_t *words;
    uint32_t n_picked;
    uint64_t picked[COLLECT];
};

static void clear_picked(struct clear_sweep *sweep)
{
    CC_CRASH_POINT("bitmap: a summary is cleared, its words not");
    for (uint32_t i = 0; i < sweep->n_picked; i++)
        sweep->words[sweep->picked[i]] = 0;
    sweep->n_picked = 0;
}

/* cc_bitmap_clear_all -- no atomic per word; neighbouring busy spans in one go */
void cc_bitmap_clear_all(struct cc_bitmap *bitmap)
{
    struct clear_sweep sweep = {.words = bitmap->words};
    for (uint64_t s = cc_bitmap_next_summary(bitmap, 0); s < bitmap->n_summary_words; s = cc_bitmap_next_summary(bitmap, s)) {
        uint64_t first = s;
        while (s < bitmap->n_summary_words && is_dense(bitmap->summary[s]))
            bitmap->summary[s++] = 0;
        if (s > first) {
            memset(bitmap->words + first * 64, 0, ((s - 1 - first) * 64 + words_under(bitmap, s - 1)) * 8);
            continue;
        }
        for (uint64_t left = bitmap->summary[s]; left; left &= left - 1) {
            uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(left);
            __builtin_prefetch(bitmap->words + w, 1);
            sweep.picked[sweep.n_picked++] = w;
            if (sweep.n_picked == COLLECT)
                clear_picked(&sweep);
        }
        bitmap->summary[s++] = 0;
    }
    clear_picked(&sweep);
    for (uint32_t c = 0; c < CC_TOP_SUMMARY_WORDS; c++) {
        for (uint64_t left = bitmap->top_summary[c]; left; left &= left - 1)
            bitmap->top[c * 64 + (uint64_t)__builtin_ctzll(left)] = 0;
        bitmap->top_summary[c] = 0;
    }
}

void cc_bitmap_keep(struct cc_bitmap *bitmap, const struct cc_bitmap *other)
{
    for (uint64_t s = cc_bitmap_next_summary(bitmap, 0); s < bitmap->n_summary_words; s = cc_bitmap_next_summary(bitmap, s + 1)) {
        for (uint64_t in_use = bitmap->summary[s]; in_use; in_use &= in_use - 1) {
            uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(in_use);
            bitmap->words[w] &= other->words[w];
        }
    }
}
