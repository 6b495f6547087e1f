/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bitmap.h -- bitmaps of pages, and nothing but bitmaps: words and a summary.
 *
 * words    little-endian u64, bit n of word w = page 64w+n, bits past the last page zero.
 * summary  bit n of summary word s = "word 64s+n may have a bit set".  Set after its word; a taker clears it before it
 *          takes the word.  So: summary bit clear and no setter at work => word is zero.  The other way round
 *          nothing is promised (a summary bit may be set over a zero word).
 * top      at most 65536 bits in this process's memory: bit t = "one of the summary words [t << top_shift, (t+1) << top_shift) may
 *          have a bit"; and over it `top_summary`, one bit per word of top.  Set after the summary, cleared only while setters are
 *          kept out.  They let a pass over an almost clean 1 TiB guest cost what is dirty: it has 64 Ki summary words.
 *
 *   set(first, n)        OR bits, any thread
 *   or_words(...)        OR words at any page offset, any thread
 *   take_next(w)         exchange with zero, any thread
 *   union_into(f, p, s)  f := p | s, with counts            } writers of p and s kept out by a gate
 *   clear_all(b)         b := 0                             }
 *   count, runs, advance, has, checksum, tail_ok, next_hidden, rebuild_summary
 */
#ifndef CC_BITMAP_H
#define CC_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

#include "bitmap_pass.h"

#define CC_TOP_WORDS 1024u
#define CC_TOP_SUMMARY_WORDS (CC_TOP_WORDS / 64)

struct cc_bitmap {
    uint64_t *words;
    uint64_t *summary;
    uint64_t n_bits;
    uint64_t n_words;         /* ceil(n_bits / 64) */
    uint64_t n_summary_words; /* ceil(n_words / 64) */
    uint32_t top_shift;
    uint64_t top_summary[CC_TOP_SUMMARY_WORDS];
    uint64_t top[CC_TOP_WORDS];
};

struct cc_bit_run {
    uint64_t first, n;
};

static inline uint64_t cc_words_for(uint64_t n_bits)
{
    return n_bits / 64 + (n_bits % 64 != 0);
}

/* Bits [first, first+n) of one word; n >= 1, first + n <= 64. */
static inline uint64_t cc_word_mask(uint64_t first, uint64_t n)
{
    return (~0ull >> (64 - n)) << first;
}

/* Names the parts; words and summary are the caller's and not touched.  If they are not all zero: rebuild_summary. */
void cc_bitmap_init(struct cc_bitmap *bitmap, uint64_t *words, uint64_t *summary, uint64_t n_bits);
void cc_bitmap_set(struct cc_bitmap *bitmap, uint64_t first, uint64_t n);
void cc_bitmap_set_all(struct cc_bitmap *bitmap);
void cc_bitmap_or_words(struct cc_bitmap *bitmap, uint64_t first, uint64_t n, const uint64_t *words);
/* The first summary word >= s that may have a bit, or n_summary_words. */
uint64_t cc_bitmap_next_summary(const struct cc_bitmap *bitmap, uint64_t s);
/* The words of [first word, +n_words) one after the other; false when there is none left from *word on. */
bool cc_bitmap_take_next(struct cc_bitmap *bitmap, uint64_t *word, uint64_t end_word, uint64_t *bits_out);

/* bitmap_sweep.c: passes over whole bitmaps while every writer is kept out */
void cc_bitmap_union_into(struct cc_bitmap *flush_set, const struct cc_bitmap *pvm, const struct cc_bitmap *svm,
                          struct cc_union_counts *counts);
void cc_bitmap_clear_all(struct cc_bitmap *bitmap);
/* bitmap &= other.  Summary bits stay, over words that may be zero now. */
void cc_bitmap_keep(struct cc_bitmap *bitmap, const struct cc_bitmap *other);

/* bitmap.c again: looking */
uint64_t cc_bitmap_count(const struct cc_bitmap *bitmap);
#define CC_RUNS_MIN 34u /* a word has at most 32 runs, one that came in and one that goes out */
/* The next runs in [*from, end), the last cut at end; how many, at most `room`, which is at least CC_RUNS_MIN.  0: there are no more. */
uint32_t cc_bitmap_runs(const struct cc_bitmap *bitmap, uint64_t *from, uint64_t end, struct cc_bit_run *runs, uint32_t room);
/* Move *at behind the next `most` set bits from there on; how many those were (fewer at the end). */
uint64_t cc_bitmap_advance(const struct cc_bitmap *bitmap, uint64_t *at, uint64_t most);
bool cc_bitmap_has(const struct cc_bitmap *bitmap, uint64_t at);
uint64_t cc_bitmap_checksum(const struct cc_bitmap *bitmap);
/* The same from a sum that a union has computed on its way (cc_union_counts.sum). */
uint64_t cc_bitmap_checksum_of(const struct cc_bitmap *bitmap, uint64_t sum);
bool cc_bitmap_tail_ok(const uint64_t *words, uint64_t n_bits);
uint64_t cc_bitmap_next_hidden(const struct cc_bitmap *bitmap, uint64_t w);
void cc_bitmap_rebuild_summary(struct cc_bitmap *bitmap);

#endif
