/* SPDX-License-Identifier: Apache-2.0 */
/* bitmap.c against one byte per page: setting, taking, tails and summaries. */
#include "bitmap_room.h"

#include <pthread.h>

static void set_sets_exactly_its_range(void)
{
    struct dice dice = {1};
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        struct cc_bitmap *b = fresh(&rooms[0], lengths[l]);
        compare(&rooms[0]);
        for (int i = 0; i < 20; i++) {
            uint64_t first = below(&dice, b->n_bits), n = below(&dice, b->n_bits - first + 1);
            cc_bitmap_set(b, first, n);
            memset(rooms[0].oracle + first, 1, n);
            compare(&rooms[0]);
        }
        cc_bitmap_set_all(b);
        memset(rooms[0].oracle, 1, b->n_bits);
        compare(&rooms[0]);
        cc_bitmap_clear_all(b);
        memset(rooms[0].oracle, 0, b->n_bits);
        compare(&rooms[0]);
    }
}

static void set_at_word_edges(void)
{
    struct cc_bitmap *b = fresh(&rooms[0], 130);
    cc_bitmap_set(b, 63, 2);
    CHECK_EQ(0x8000000000000000ull, b->words[0]);
    CHECK_EQ(0b1, b->words[1]);
    CHECK_EQ(0b011, b->summary[0]);
    cc_bitmap_set(b, 128, 2);
    CHECK_EQ(0b11, b->words[2]);
    CHECK_EQ(0b111, b->summary[0]);
    b = fresh(&rooms[0], 130);
    cc_bitmap_set(b, 0, 130);
    CHECK_EQ(~0ull, b->words[0]);
    CHECK_EQ(~0ull, b->words[1]);
    CHECK_EQ(0b11, b->words[2]);
    CHECK_EQ(0b1110, cc_word_mask(1, 3));
    CHECK_EQ(~0ull, cc_word_mask(0, 64));
    CHECK_EQ(0x8000000000000000ull, cc_word_mask(63, 1));
}

static void or_words_lands_at_any_page_offset(void)
{
    struct dice dice = {2};
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        struct cc_bitmap *b = fresh(&rooms[0], lengths[l]);
        for (int i = 0; i < 60; i++) {
            uint64_t first = below(&dice, b->n_bits), n = 1 + below(&dice, b->n_bits - first);
            uint64_t words[WORDS_MAX] = {0};
            for (uint64_t bit = 0; bit < n; bit++) {
                if (below(&dice, 3) == 0) {
                    words[bit / 64] |= 1ull << (bit % 64);
                    rooms[0].oracle[first + bit] = 1;
                }
            }
            cc_bitmap_or_words(b, first, n, words);
        }
        compare(&rooms[0]);
    }
}

static void or_words_at_edges(void)
{
    const uint64_t one[] = {0x8000000000000001ull}, two[] = {~0ull, 0b101};
    struct cc_bitmap *b = fresh(&rooms[0], 200);
    cc_bitmap_or_words(b, 1, 64, one); /* pages 1 and 64 */
    CHECK_EQ(0b10, b->words[0]);
    CHECK_EQ(0b1, b->words[1]);
    CHECK_EQ(0, b->words[2]);
    b = fresh(&rooms[0], 200);
    cc_bitmap_or_words(b, 64, 67, two); /* a whole word: no shift */
    CHECK_EQ(0, b->words[0]);
    CHECK_EQ(~0ull, b->words[1]);
    CHECK_EQ(0b101, b->words[2]);
    CHECK_EQ(0b110, b->summary[0]);
    b = fresh(&rooms[0], 131);
    cc_bitmap_or_words(b, 63, 67, two); /* its last bit is page 129 */
    CHECK_EQ(0x8000000000000000ull, b->words[0]);
    CHECK_EQ(0xffffffffffffffffull, b->words[1]);
    CHECK_EQ(0b10, b->words[2]);
}

static void take_gives_each_bit_once(void)
{
    struct dice dice = {3};
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        for (int i = 0; i < 8; i++) {
            struct cc_bitmap *b = fresh(&rooms[0], lengths[l]);
            random_bits(&rooms[0], &dice);
            uint64_t begin = below(&dice, b->n_words), end = begin + below(&dice, b->n_words - begin + 1), bits;
            for (uint64_t w = begin; cc_bitmap_take_next(b, &w, end, &bits); w++) {
                CHECK(w >= begin && w < end && bits);
                for (unsigned n = 0; n < 64; n++) {
                    if (bits >> n & 1) {
                        CHECK(rooms[0].oracle[w * 64 + n] == 1);
                        rooms[0].oracle[w * 64 + n] = 0;
                    }
                }
            }
            for (uint64_t at = begin * 64; at < end * 64 && at < b->n_bits; at++)
                CHECK(rooms[0].oracle[at] == 0);
            compare(&rooms[0]);
        }
    }
}

static void tails_are_seen(void)
{
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        uint64_t n = lengths[l];
        struct cc_bitmap *b = fresh(&rooms[0], n);
        cc_bitmap_set_all(b);
        CHECK(cc_bitmap_tail_ok(b->words, n));
        for (uint64_t bit = n; bit % 64; bit++) {
            b->words[bit / 64] |= 1ull << (bit % 64);
            CHECK(!cc_bitmap_tail_ok(b->words, n));
            b->words[bit / 64] &= ~(1ull << (bit % 64));
        }
        CHECK(cc_bitmap_tail_ok(b->words, n));
    }
}

static void hidden_words_are_seen_and_mended(void)
{
    struct cc_bitmap *b = fresh(&rooms[0], 4160);
    cc_bitmap_set(b, 4159, 1);
    CHECK(nothing_hidden(b));
    b->summary[1] = 0;
    CHECK(!nothing_hidden(b));
    cc_bitmap_rebuild_summary(b);
    CHECK(nothing_hidden(b));
    CHECK_EQ(0b1, b->summary[1]);
    b->summary[1] = 0b10; /* a summary bit for a word that isn't there */
    CHECK(!nothing_hidden(b));
    b->summary[1] = 0b01;
    cc_bitmap_set(b, 128, 1);
    b->words[2] = 0; /* a summary bit set over a zero word: allowed */
    CHECK(nothing_hidden(b));
    CHECK_EQ(1, cc_bitmap_count(b));
}

/* ---- setters and takers at once: no bit is lost, none is invented ---------------------------------------------- */

#define SHARED_BITS 4500u
#define ROUNDS 300u

static struct cc_bitmap *shared;
static uint32_t set_times[SHARED_BITS], taken_times[SHARED_BITS];
static uint32_t setters_left;

static void *setter(void *arg)
{
    struct dice dice = {(uint64_t)(uintptr_t)arg};
    for (unsigned i = 0; i < ROUNDS * 20; i++) {
        uint64_t at = below(&dice, SHARED_BITS);
        __atomic_fetch_add(&set_times[at], 1, __ATOMIC_RELAXED);
        cc_bitmap_set(shared, at, 1);
    }
    __atomic_fetch_sub(&setters_left, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void take_all(void)
{
    uint64_t bits;
    for (uint64_t w = 0; cc_bitmap_take_next(shared, &w, shared->n_words, &bits); w++) {
        for (; bits; bits &= bits - 1)
            taken_times[w * 64 + (uint64_t)__builtin_ctzll(bits)]++;
    }
}

static void takers_lose_no_bit_while_setters_run(void)
{
    pthread_t threads[3];
    shared = fresh(&rooms[0], SHARED_BITS);
    setters_left = 3;
    for (uintptr_t i = 0; i < 3; i++)
        REQUIRE(pthread_create(&threads[i], NULL, setter, (void *)(i + 10)) == 0);
    while (__atomic_load_n(&setters_left, __ATOMIC_ACQUIRE))
        take_all();
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    take_all();
    for (unsigned at = 0; at < SHARED_BITS; at++)
        CHECK((taken_times[at] > 0) == (set_times[at] > 0) && taken_times[at] <= set_times[at]);
    CHECK_EQ(0, cc_bitmap_count(shared));
    compare(&rooms[0]);
}

int main(void)
{
    RUN(set_sets_exactly_its_range);
    RUN(set_at_word_edges);
    RUN(or_words_lands_at_any_page_offset);
    RUN(or_words_at_edges);
    RUN(take_gives_each_bit_once);
    RUN(tails_are_seen);
    RUN(hidden_words_are_seen_and_mended);
    RUN(takers_lose_no_bit_while_setters_run);
    return DONE();
}
