/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap.h"

#include <string.h>

#include "atomics.h"
#include "checksum.h"
#include "fault.h"

void cc_bitmap_init(struct cc_bitmap *bitmap, uint64_t *words, uint64_t *summary, uint64_t n_bits)
{
    bitmap->words = words;
    bitmap->summary = summary;
    bitmap->n_bits = n_bits;
    bitmap->n_words = cc_words_for(n_bits);
    bitmap->n_summary_words = cc_words_for(bitmap->n_words);
    bitmap->top_shift = 0;
    while (bitmap->n_summary_words && (bitmap->n_summary_words - 1) >> bitmap->top_shift >= CC_TOP_WORDS * 64)
        bitmap->top_shift++;
    memset(bitmap->top_summary, 0, sizeof bitmap->top_summary);
    memset(bitmap->top, 0, sizeof bitmap->top);
}

/* set_word -- OR bits into a word, then make its summary bit true (order: see atomics.h, set / take) */
static inline void set_word(struct cc_bitmap *bitmap, uint64_t w, uint64_t bits)
{
    cc_set_bits(&bitmap->words[w], bits);
    CC_CRASH_POINT("bitmap: a word, before its summary");
    uint64_t bit = 1ull << (w % 64);
    if (!(cc_read_summary(&bitmap->summary[w / 64]) & bit))
        cc_set_bits(&bitmap->summary[w / 64], bit);
    uint64_t t = w / 64 >> bitmap->top_shift, top_bit = 1ull << (t % 64);
    if (!(cc_read_summary(&bitmap->top[t / 64]) & top_bit)) {
        cc_set_bits(&bitmap->top_summary[t / 4096], 1ull << (t / 64 % 64)); /* first: who sees the top bit set relies on it */
        cc_set_bits(&bitmap->top[t / 64], top_bit);
    }
}

/* next_top -- the first bit >= t of top that is set, or past its end */
static uint64_t next_top(const struct cc_bitmap *bitmap, uint64_t t)
{
    uint64_t w = t / 64;
    if (w >= CC_TOP_WORDS)
        return CC_TOP_WORDS * 64;
    uint64_t left = cc_peek(&bitmap->top[w]) >> (t % 64);
    if (left)
        return t + (uint64_t)__builtin_ctzll(left);
    for (w++; w < CC_TOP_WORDS;) {
        uint64_t words = cc_peek(&bitmap->top_summary[w / 64]) >> (w % 64);
        if (!words) {
            w = (w / 64 + 1) * 64;
            continue;
        }
        w += (uint64_t)__builtin_ctzll(words);
        uint64_t bits = cc_peek(&bitmap->top[w]);
        if (bits)
            return w * 64 + (uint64_t)__builtin_ctzll(bits);
        w++; /* its bit in top_summary was set before the bit itself can be seen */
    }
    return CC_TOP_WORDS * 64;
}

uint64_t cc_bitmap_next_summary(const struct cc_bitmap *bitmap, uint64_t s)
{
    while (s < bitmap->n_summary_words) {
        uint64_t t = s >> bitmap->top_shift, next = next_top(bitmap, t);
        if (next != t) {
            s = next << bitmap->top_shift;
            continue;
        }
        for (uint64_t end = (t + 1) << bitmap->top_shift; s < end && s < bitmap->n_summary_words; s++) {
            if (cc_peek(&bitmap->summary[s]))
                return s;
        }
    }
    return bitmap->n_summary_words;
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
        uint64_t bits = cc_peek(&words[i]); /* they may be another bitmap's that is set meanwhile (sender_resend) */
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
            w = cc_bitmap_next_summary(bitmap, w / 64 + 1) * 64;
            continue;
        }
        w += (uint64_t)__builtin_ctzll(summary);
        if (w >= end_word)
            break;
        cc_drop_bits(&bitmap->summary[w / 64], 1ull << (w % 64));
        CC_CRASH_POINT("bitmap: a summary bit is dropped, its word not taken");
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

/* cc_bitmap_count -- set bits now; a snapshot if setters run */
uint64_t cc_bitmap_count(const struct cc_bitmap *bitmap)
{
    uint64_t count = 0;
    for (uint64_t s = cc_bitmap_next_summary(bitmap, 0); s < bitmap->n_summary_words; s = cc_bitmap_next_summary(bitmap, s + 1)) {
        for (uint64_t left = cc_peek(&bitmap->summary[s]); left; left &= left - 1) {
            uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(left);
            count += (uint64_t)__builtin_popcountll(cc_peek(&bitmap->words[w]));
        }
    }
    return count;
}

/* next_word -- index of the first word >= w that has a bit, or n_words */
static uint64_t next_word(const struct cc_bitmap *bitmap, uint64_t w)
{
    while (w < bitmap->n_words) {
        uint64_t summary = bitmap->summary[w / 64] >> (w % 64);
        if (!summary) {
            w = cc_bitmap_next_summary(bitmap, w / 64 + 1) * 64;
            continue;
        }
        w += (uint64_t)__builtin_ctzll(summary);
        if (bitmap->words[w])
            return w;
        w++;
    }
    return bitmap->n_words;
}

/* cc_bitmap_runs -- the next runs in [*from, end), at most `room` (at least CC_RUNS_MIN); *from moves behind the last one.
 *
 * `edges` has a bit wherever a page differs from the page before it: run begins and run ends in turn, so that within a word
 * they are taken in pairs without a branch on what they are.  Words that are all clear between runs, or all set inside one,
 * have none. */
static inline __attribute__((always_inline)) uint32_t runs_of(const struct cc_bitmap *bitmap, uint64_t *from, uint64_t end,
                                                              struct cc_bit_run *runs, uint32_t room)
{
    if (*from >= end)
        return 0;
    const uint64_t end_word = cc_words_for(end), last_mask = end % 64 ? cc_word_mask(0, end % 64) : ~0ull;
    uint64_t w = *from / 64, mask = ~0ull << (*from % 64); /* of the first word, only pages from *from on */
    uint64_t start = 0, carry = 0;                         /* carry 1: the page before this word is in a run, which began at start */
    uint32_t n = 0;
    while (w < end_word) {
        uint64_t bits = bitmap->words[w] & mask;
        mask = ~0ull;
        if (w + 1 == end_word)
            bits &= last_mask;
        if (!bits && !carry) {
            w = next_word(bitmap, w + 1);
            continue;
        }
        const uint64_t base = w * 64;
        if (room - n < CC_RUNS_MIN) { /* a word may have 33 ends: go on here next time */
            *from = carry ? start : base;
            return n;
        }
        uint64_t edges = bits ^ (bits << 1 | carry);
        if (carry && edges) {
            runs[n++] = (struct cc_bit_run){start, base + (uint64_t)__builtin_ctzll(edges) - start};
            edges &= edges - 1;
            carry = 0;
        }
        for (uint64_t pair = (uint64_t)__builtin_popcountll(edges) / 2; pair; pair--) {
            uint64_t begin = (uint64_t)__builtin_ctzll(edges);
            edges &= edges - 1;
            runs[n++] = (struct cc_bit_run){base + begin, (uint64_t)__builtin_ctzll(edges) - begin};
            edges &= edges - 1;
        }
        if (edges) {
            start = base + (uint64_t)__builtin_ctzll(edges);
            carry = 1;
        }
        w++;
    }
    if (carry)
        runs[n++] = (struct cc_bit_run){start, end - start};
    *from = end;
    return n;
}

static inline __attribute__((always_inline)) uint64_t advance(const struct cc_bitmap *bitmap, uint64_t *at, uint64_t most)
{
    uint64_t w = *at / 64, mask = ~0ull << (*at % 64), n = 0;
    while (w < bitmap->n_words) {
        uint64_t bits = bitmap->words[w] & mask, here = (uint64_t)__builtin_popcountll(bits);
        mask = ~0ull;
        if (n + here >= most) {
            for (; n + 1 < most; n++)
                bits &= bits - 1;
            *at = w * 64 + (uint64_t)__builtin_ctzll(bits) + 1;
            return most;
        }
        n += here;
        w = here ? w + 1 : next_word(bitmap, w + 1);
    }
    *at = bitmap->n_bits;
    return n;
}

#if defined(__x86_64__)
__attribute__((target("popcnt,bmi"))) static uint32_t runs_bmi(const struct cc_bitmap *bitmap, uint64_t *from, uint64_t end,
                                                               struct cc_bit_run *runs, uint32_t room)
{
    return runs_of(bitmap, from, end, runs, room);
}

__attribute__((target("popcnt,bmi"))) static uint64_t advance_bmi(const struct cc_bitmap *bitmap, uint64_t *at, uint64_t most)
{
    return advance(bitmap, at, most);
}

static bool has_bmi(void)
{
    return __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi");
}
#endif

uint32_t cc_bitmap_runs(const struct cc_bitmap *bitmap, uint64_t *from, uint64_t end, struct cc_bit_run *runs, uint32_t room)
{
#if defined(__x86_64__)
    if (has_bmi())
        return runs_bmi(bitmap, from, end, runs, room);
#endif
    return runs_of(bitmap, from, end, runs, room);
}

uint64_t cc_bitmap_advance(const struct cc_bitmap *bitmap, uint64_t *at, uint64_t most)
{
#if defined(__x86_64__)
    if (has_bmi())
        return advance_bmi(bitmap, at, most);
#endif
    return advance(bitmap, at, most);
}

bool cc_bitmap_has(const struct cc_bitmap *bitmap, uint64_t at)
{
    return bitmap->words[at / 64] >> (at % 64) & 1;
}

/* cc_bitmap_checksum -- over the words that are not zero (checksum.h); of an attach, whose summary is not to be trusted yet */
uint64_t cc_bitmap_checksum(const struct cc_bitmap *bitmap)
{
    uint64_t sum = 0;
    for (uint64_t w = 0; w < bitmap->n_words; w++) {
        if (bitmap->words[w])
            sum += cc_checksum_term(bitmap->words[w], w);
    }
    return cc_bitmap_checksum_of(bitmap, sum);
}

uint64_t cc_bitmap_checksum_of(const struct cc_bitmap *bitmap, uint64_t sum)
{
    return cc_checksum_finish(sum + bitmap->n_bits);
}

/* cc_bitmap_tail_ok -- are the bits past the last page zero? */
bool cc_bitmap_tail_ok(const uint64_t *words, uint64_t n_bits)
{
    uint64_t in_last = n_bits % 64;
    return !in_last || !(cc_peek(&words[n_bits / 64]) & ~cc_word_mask(0, in_last));
}

/* cc_bitmap_next_hidden -- the first word >= w with bits that no pass would find, as its bit in summary, top or top_summary is clear; n_words
 * if there is none.  Setters may run: a word is stored before its bits above, so one that is only half set may be named. */
uint64_t cc_bitmap_next_hidden(const struct cc_bitmap *bitmap, uint64_t w)
{
    for (; w < bitmap->n_words; w++) {
        if (!cc_observe(&bitmap->words[w]))
            continue;
        uint64_t t = w / 64 >> bitmap->top_shift;
        if (!(cc_peek(&bitmap->summary[w / 64]) >> (w % 64) & 1) || !(cc_peek(&bitmap->top[t / 64]) >> (t % 64) & 1) ||
            !(cc_peek(&bitmap->top_summary[t / 4096]) >> (t / 64 % 64) & 1))
            break;
    }
    return w;
}

/* cc_bitmap_rebuild_summary -- and top, from the words; what an attach does, as it trusts no summary */
void cc_bitmap_rebuild_summary(struct cc_bitmap *bitmap)
{
    memset(bitmap->summary, 0, bitmap->n_summary_words * 8);
    CC_CRASH_POINT("bitmap: a summary is empty, to be rebuilt");
    memset(bitmap->top_summary, 0, sizeof bitmap->top_summary);
    memset(bitmap->top, 0, sizeof bitmap->top);
    for (uint64_t w = 0; w < bitmap->n_words; w++) {
        uint64_t s = w / 64, t = s >> bitmap->top_shift;
        if (!bitmap->words[w])
            continue;
        bitmap->summary[s] |= 1ull << (w % 64);
        bitmap->top[t / 64] |= 1ull << (t % 64);
        bitmap->top_summary[t / 4096] |= 1ull << (t / 64 % 64);
    }
}
