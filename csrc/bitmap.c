/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap.h"

#include <string.h>

#include "atomics.h"
#include "checksum.h"

#define SUMMARY_DENSE 16 /* of 64 words in use: from here a straight pass over all 64 is cheaper than picking */

/* cc_bitmap_init -- name the parts; the memory is the caller's and is not touched */
void cc_bitmap_init(struct cc_bitmap *bitmap, uint64_t *words, uint64_t *summary, uint64_t n_bits)
{
    bitmap->words = words;
    bitmap->summary = summary;
    bitmap->n_bits = n_bits;
    bitmap->n_words = cc_words_for(n_bits);
    bitmap->n_summary_words = cc_words_for(bitmap->n_words);
}

/* set_word -- OR bits into a word, then make its summary bit true (order: see atomics.h, set / take) */
static inline void set_word(struct cc_bitmap *bitmap, uint64_t w, uint64_t bits)
{
    cc_set_bits(&bitmap->words[w], bits);
    uint64_t bit = 1ull << (w % 64);
    if (!(cc_read_summary(&bitmap->summary[w / 64]) & bit))
        cc_set_bits(&bitmap->summary[w / 64], bit);
}

/* cc_bitmap_set -- set bits [first, first+n); the caller has checked the range */
void cc_bitmap_set(struct cc_bitmap *bitmap, uint64_t first, uint64_t n)
{
    while (n) {
        uint64_t in_word = 64 - first % 64;
        if (in_word > n)
            in_word = n;
        set_word(bitmap, first / 64, cc_word_mask(first % 64, in_word));
        first += in_word;
        n -= in_word;
    }
}

void cc_bitmap_set_all(struct cc_bitmap *bitmap)
{
    cc_bitmap_set(bitmap, 0, bitmap->n_bits);
}

/* cc_bitmap_or_words -- OR n bits whose bit 0 is page `first` of the bitmap, at any page offset */
void cc_bitmap_or_words(struct cc_bitmap *bitmap, uint64_t first, uint64_t n, const uint64_t *words)
{
    uint64_t shift = first % 64, w = first / 64;
    for (uint64_t i = 0; i < cc_words_for(n); i++) {
        uint64_t bits = words[i];
        if (!bits)
            continue;
        uint64_t low = bits << shift;
        uint64_t high = shift ? bits >> (64 - shift) : 0; /* a shift by 64 is undefined */
        if (low)
            set_word(bitmap, w + i, low);
        if (high)
            set_word(bitmap, w + i + 1, high);
    }
}

/* cc_bitmap_take_next -- find the next word with bits in [*word, end_word) and take them; setters may run.
 * A summary bit is cleared before its word is taken and only when the whole word is, so no bit is orphaned. */
bool cc_bitmap_take_next(struct cc_bitmap *bitmap, uint64_t *word, uint64_t end_word, uint64_t *bits_out)
{
    uint64_t w = *word;
    while (w < end_word) {
        uint64_t summary = cc_read_summary(&bitmap->summary[w / 64]) >> (w % 64);
        if (!summary) {
            w = (w / 64 + 1) * 64;
            continue;
        }
        w += (uint64_t)__builtin_ctzll(summary);
        if (w >= end_word)
            break;
        cc_drop_bits(&bitmap->summary[w / 64], 1ull << (w % 64));
        uint64_t bits = cc_take_word(&bitmap->words[w]);
        if (bits) {
            *bits_out = bits;
            *word = w;
            return true;
        }
        w++;
    }
    *word = end_word;
    return false;
}

/* ---- passes over whole bitmaps, writers kept out ------------------------------------------------------------ */

/* How a pass sees 64 words at a time: straight through when many are in use, else word by word. */
struct span {
    uint64_t first, n; /* words of this summary word */
};

static inline struct span span_of(const struct cc_bitmap *bitmap, uint64_t s)
{
    uint64_t first = s * 64;
    uint64_t n = bitmap->n_words - first < 64 ? bitmap->n_words - first : 64;
    return (struct span){first, n};
}

static inline __attribute__((always_inline)) void union_words(uint64_t *restrict f, const uint64_t *restrict p,
                                                              const uint64_t *restrict s, uint64_t n,
                                                              struct cc_union_counts *counts)
{
    uint64_t in_p = 0, in_s = 0, in_f = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t either = p[i] | s[i];
        f[i] = either;
        in_p += (uint64_t)__builtin_popcountll(p[i]);
        in_s += (uint64_t)__builtin_popcountll(s[i]);
        in_f += (uint64_t)__builtin_popcountll(either);
    }
    counts->pvm += in_p;
    counts->svm += in_s;
    counts->both_or_either += in_f;
}

typedef void (*union_words_fn)(uint64_t *restrict, const uint64_t *restrict, const uint64_t *restrict, uint64_t,
                               struct cc_union_counts *);

static void union_words_plain(uint64_t *restrict f, const uint64_t *restrict p, const uint64_t *restrict s, uint64_t n,
                              struct cc_union_counts *counts)
{
    union_words(f, p, s, n, counts);
}

#if defined(__x86_64__)
__attribute__((target("popcnt"))) static void union_words_popcnt(uint64_t *restrict f, const uint64_t *restrict p,
                                                                 const uint64_t *restrict s, uint64_t n,
                                                                 struct cc_union_counts *counts)
{
    union_words(f, p, s, n, counts);
}
#endif

static union_words_fn pick_union_words(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("popcnt"))
        return union_words_popcnt;
#endif
    return union_words_plain;
}

/* cc_bitmap_union_into -- flush_set := pvm | svm and the counts.  Words in use in any of the three are visited: a bit
 * of an older flush set must not stay. */
void cc_bitmap_union_into(struct cc_bitmap *flush_set, const struct cc_bitmap *pvm, const struct cc_bitmap *svm,
                          struct cc_union_counts *counts)
{
    union_words_fn unite = pick_union_words();
    for (uint64_t s = 0; s < flush_set->n_summary_words; s++) {
        uint64_t in_use = pvm->summary[s] | svm->summary[s];
        uint64_t visit = in_use | flush_set->summary[s];
        if (!visit)
            continue;
        struct span span = span_of(flush_set, s);
        if (__builtin_popcountll(visit) >= SUMMARY_DENSE) {
            unite(flush_set->words + span.first, pvm->words + span.first, svm->words + span.first, span.n, counts);
        } else {
            for (uint64_t left = visit; left; left &= left - 1) {
                uint64_t w = span.first + (uint64_t)__builtin_ctzll(left);
                unite(flush_set->words + w, pvm->words + w, svm->words + w, 1, counts);
            }
        }
        flush_set->summary[s] = in_use;
    }
}

/* cc_bitmap_clear_all -- writers kept out: whole words are zeroed without an atomic each */
void cc_bitmap_clear_all(struct cc_bitmap *bitmap)
{
    for (uint64_t s = 0; s < bitmap->n_summary_words; s++) {
        uint64_t in_use = bitmap->summary[s];
        if (!in_use)
            continue;
        struct span span = span_of(bitmap, s);
        if (__builtin_popcountll(in_use) >= SUMMARY_DENSE) {
            memset(bitmap->words + span.first, 0, span.n * 8);
        } else {
            for (uint64_t left = in_use; left; left &= left - 1)
                bitmap->words[span.first + (uint64_t)__builtin_ctzll(left)] = 0;
        }
        bitmap->summary[s] = 0;
    }
}

/* cc_bitmap_count -- set bits now; a snapshot if setters run */
uint64_t cc_bitmap_count(const struct cc_bitmap *bitmap)
{
    uint64_t count = 0;
    for (uint64_t s = 0; s < bitmap->n_summary_words; s++) {
        for (uint64_t left = cc_peek(&bitmap->summary[s]); left; left &= left - 1) {
            uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(left);
            count += (uint64_t)__builtin_popcountll(cc_peek(&bitmap->words[w]));
        }
    }
    return count;
}

/* next_word -- index of the first word >= w that has a bit, or n_words; through the summary */
static uint64_t next_word(const struct cc_bitmap *bitmap, uint64_t w)
{
    while (w < bitmap->n_words) {
        uint64_t summary = bitmap->summary[w / 64] >> (w % 64);
        if (!summary) {
            w = (w / 64 + 1) * 64;
            continue;
        }
        w += (uint64_t)__builtin_ctzll(summary);
        if (w < bitmap->n_words && bitmap->words[w])
            return w;
        w++;
    }
    return bitmap->n_words;
}

bool cc_bitmap_next_run(const struct cc_bitmap *bitmap, uint64_t from, uint64_t end, uint64_t *first, uint64_t *n)
{
    if (from >= end)
        return false;
    uint64_t w = from / 64;
    uint64_t bits = bitmap->words[w] & (~0ull << (from % 64));
    if (!bits) {
        w = next_word(bitmap, w + 1);
        if (w >= bitmap->n_words)
            return false;
        bits = bitmap->words[w];
    }
    uint64_t start = w * 64 + (uint64_t)__builtin_ctzll(bits);
    if (start >= end)
        return false;

    /* the end of the run: the first clear bit after start */
    uint64_t clear = ~bits & (~0ull << (start % 64));
    while (!clear && (w + 1) * 64 < end) {
        w++;
        clear = ~bitmap->words[w];
    }
    uint64_t stop = clear ? w * 64 + (uint64_t)__builtin_ctzll(clear) : (w + 1) * 64;
    if (stop > end)
        stop = end;
    *first = start;
    *n = stop - start;
    return true;
}

/* cc_bitmap_checksum -- sum over words that are not zero (checksum.h) */
uint64_t cc_bitmap_checksum(const struct cc_bitmap *bitmap)
{
    uint64_t sum = bitmap->n_bits;
    for (uint64_t w = next_word(bitmap, 0); w < bitmap->n_words; w = next_word(bitmap, w + 1))
        sum += cc_checksum_term(bitmap->words[w], w);
    return cc_checksum_finish(sum);
}

/* cc_bitmap_tail_ok -- are the bits past the last page zero? */
bool cc_bitmap_tail_ok(const uint64_t *words, uint64_t n_bits)
{
    uint64_t in_last = n_bits % 64;
    return !in_last || !(cc_peek(&words[n_bits / 64]) & ~cc_word_mask(0, in_last));
}

/* cc_bitmap_summary_ok -- no word with bits under a clear summary bit, no summary bit past the last word */
bool cc_bitmap_summary_ok(const struct cc_bitmap *bitmap)
{
    for (uint64_t w = 0; w < bitmap->n_words; w++) {
        if (bitmap->words[w] && !(bitmap->summary[w / 64] >> (w % 64) & 1))
            return false;
    }
    return cc_bitmap_tail_ok(bitmap->summary, bitmap->n_words);
}

/* cc_bitmap_rebuild_summary -- from the words; what an attach does, as it trusts no summary */
void cc_bitmap_rebuild_summary(struct cc_bitmap *bitmap)
{
    memset(bitmap->summary, 0, bitmap->n_summary_words * 8);
    for (uint64_t w = 0; w < bitmap->n_words; w++) {
        if (bitmap->words[w])
            bitmap->summary[w / 64] |= 1ull << (w % 64);
    }
}
