/* SPDX-License-Identifier: Apache-2.0 */
/* bitmap.c against one byte per page. */
#include "bitmap.h"
#include "checksum.h"

#include <pthread.h>

#include "check.h"

/* Lengths around the edges of a word (64), of a summary word (64 * 64), and odd ones between. */
static const uint64_t lengths[] = {1, 2, 63, 64, 65, 100, 127, 128, 129, 1000, 4095, 4096, 4097, 4160, 8191, 12345};
#define N_LENGTHS (sizeof lengths / sizeof *lengths)
#define BITS_MAX 12345u
#define WORDS_MAX (BITS_MAX / 64 + 2)

struct room { /* a bitmap with guard words around its parts, and its oracle */
    uint64_t memory[2 * WORDS_MAX + 16];
    struct cc_bitmap bitmap;
    uint8_t oracle[BITS_MAX + 64];
};

static struct room rooms[3];

static struct cc_bitmap *fresh(struct room *room, uint64_t n_bits)
{
    memset(room, 0, sizeof *room);
    uint64_t n_words = cc_words_for(n_bits);
    room->memory[0] = room->memory[n_words + 1] = room->memory[n_words + 2 + cc_words_for(n_words)] = 0xdeadbeefdeadbeefull;
    cc_bitmap_init(&room->bitmap, room->memory + 1, room->memory + n_words + 2, n_bits);
    return &room->bitmap;
}

static bool bit_of(const uint64_t *words, uint64_t n)
{
    return words[n / 64] >> (n % 64) & 1;
}

static void compare(const struct room *room)
{
    const struct cc_bitmap *b = &room->bitmap;
    uint64_t count = 0;
    for (uint64_t i = 0; i < b->n_words * 64; i++) {
        bool expected = i < b->n_bits && room->oracle[i];
        count += expected;
        if (bit_of(b->words, i) != expected) {
            CHECK_SAY("bit %llu of %llu is %d", (unsigned long long)i, (unsigned long long)b->n_bits, !expected);
            return;
        }
    }
    for (uint64_t w = 0; w < b->n_words; w++)
        CHECK(!b->words[w] || bit_of(b->summary, w));
    CHECK(cc_bitmap_summary_ok(b));
    CHECK(cc_bitmap_tail_ok(b->words, b->n_bits));
    CHECK_EQ(count, cc_bitmap_count(b));
    CHECK_EQ(0xdeadbeefdeadbeefull, room->memory[0]);
    CHECK_EQ(0xdeadbeefdeadbeefull, room->memory[b->n_words + 1]);
    CHECK_EQ(0xdeadbeefdeadbeefull, room->memory[b->n_words + 2 + b->n_summary_words]);
}

/* random_bits -- into bitmap and oracle: scattered, dense, or runs, so that the passes by summary and straight through both happen */
static void random_bits(struct room *room, struct dice *dice)
{
    uint64_t n = room->bitmap.n_bits;
    switch (below(dice, 4)) {
    case 0: /* a few */
        for (int i = 0; i < 5; i++) {
            uint64_t at = below(dice, n);
            cc_bitmap_set(&room->bitmap, at, 1);
            room->oracle[at] = 1;
        }
        break;
    case 1: /* half of them */
        for (uint64_t at = 0; at < n; at++) {
            if (roll(dice) & 1) {
                cc_bitmap_set(&room->bitmap, at, 1);
                room->oracle[at] = 1;
            }
        }
        break;
    case 2: /* runs */
        for (int i = 0; i < 3; i++) {
            uint64_t at = below(dice, n), len = 1 + below(dice, n - at);
            cc_bitmap_set(&room->bitmap, at, len);
            memset(room->oracle + at, 1, len);
        }
        break;
    default: /* first and last */
        cc_bitmap_set(&room->bitmap, 0, 1);
        cc_bitmap_set(&room->bitmap, n - 1, 1);
        room->oracle[0] = room->oracle[n - 1] = 1;
    }
}

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

static void union_is_the_union_and_counts(void)
{
    struct dice dice = {4};
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        struct cc_bitmap *f = fresh(&rooms[2], lengths[l]);
        for (int i = 0; i < 12; i++) {
            struct cc_bitmap *p = fresh(&rooms[0], lengths[l]), *s = fresh(&rooms[1], lengths[l]);
            if (i)
                random_bits(&rooms[0], &dice);
            if (i != 1)
                random_bits(&rooms[1], &dice);
            struct cc_union_counts counts = {0}, expected = {0};
            for (uint64_t at = 0; at < f->n_bits; at++) {
                rooms[2].oracle[at] = rooms[0].oracle[at] | rooms[1].oracle[at]; /* what an older flush set had is gone */
                expected.pvm += rooms[0].oracle[at];
                expected.svm += rooms[1].oracle[at];
                expected.both_or_either += rooms[2].oracle[at];
            }
            cc_bitmap_union_into(f, p, s, &counts);
            CHECK_EQ(expected.pvm, counts.pvm);
            CHECK_EQ(expected.svm, counts.svm);
            CHECK_EQ(expected.both_or_either, counts.both_or_either);
            for (int r = 0; r < 3; r++)
                compare(&rooms[r]);
        }
    }
}

static void runs_are_maximal_and_complete(void)
{
    struct dice dice = {5};
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        for (int i = 0; i < 8; i++) {
            struct cc_bitmap *b = fresh(&rooms[0], lengths[l]);
            if (i)
                random_bits(&rooms[0], &dice);
            uint64_t from = below(&dice, b->n_bits), end = from + below(&dice, b->n_bits - from + 1);
            uint64_t first = 0, n = 0, at = from;
            while (cc_bitmap_next_run(b, at, end, &first, &n)) {
                CHECK(n > 0 && first >= at && first + n <= end);
                for (; at < first; at++)
                    CHECK(!rooms[0].oracle[at]);
                for (; at < first + n; at++)
                    CHECK(rooms[0].oracle[at]);
                CHECK(at == end || !rooms[0].oracle[at]); /* not cut short */
            }
            for (; at < end; at++)
                CHECK(!rooms[0].oracle[at]);
        }
    }
}

static void runs_at_edges(void)
{
    struct cc_bitmap *b = fresh(&rooms[0], 4097);
    uint64_t first, n;
    CHECK(!cc_bitmap_next_run(b, 0, 4097, &first, &n));
    cc_bitmap_set_all(b);
    CHECK(cc_bitmap_next_run(b, 0, 4097, &first, &n) && first == 0 && n == 4097);
    CHECK(cc_bitmap_next_run(b, 4096, 4097, &first, &n) && first == 4096 && n == 1);
    CHECK(cc_bitmap_next_run(b, 60, 4000, &first, &n) && first == 60 && n == 3940); /* cut at end */
    CHECK(!cc_bitmap_next_run(b, 4097, 4097, &first, &n));
    b = fresh(&rooms[0], 256);
    b->words[1] = 0b0110;
    b->words[3] = 0x8000000000000000ull;
    b->summary[0] = 0b1010;
    CHECK(cc_bitmap_next_run(b, 0, 256, &first, &n) && first == 65 && n == 2);
    CHECK(cc_bitmap_next_run(b, 67, 256, &first, &n) && first == 255 && n == 1);
    CHECK(!cc_bitmap_next_run(b, 67, 255, &first, &n));
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
    CHECK(cc_bitmap_summary_ok(b));
    b->summary[1] = 0;
    CHECK(!cc_bitmap_summary_ok(b));
    cc_bitmap_rebuild_summary(b);
    CHECK(cc_bitmap_summary_ok(b));
    CHECK_EQ(0b1, b->summary[1]);
    b->summary[1] = 0b10; /* a summary bit for a word that isn't there */
    CHECK(!cc_bitmap_summary_ok(b));
    b->summary[1] = 0b01;
    b->summary[0] = 0b100; /* set over a zero word: allowed */
    CHECK(cc_bitmap_summary_ok(b));
}

static void checksum_of_a_bitmap_sees_every_bit(void)
{
    struct dice dice = {6};
    struct cc_bitmap *b = fresh(&rooms[0], 1000);
    random_bits(&rooms[0], &dice);
    cc_bitmap_set(b, 999, 1);
    uint64_t sum = b->n_bits;
    for (uint64_t w = 0; w < b->n_words; w++) {
        if (b->words[w])
            sum += cc_checksum_term(b->words[w], w);
    }
    uint64_t whole = cc_bitmap_checksum(b);
    CHECK_EQ(cc_checksum_finish(sum), whole);
    for (uint64_t at = 0; at < 1000; at++) {
        b->words[at / 64] ^= 1ull << (at % 64);
        cc_bitmap_rebuild_summary(b);
        CHECK(cc_bitmap_checksum(b) != whole);
        b->words[at / 64] ^= 1ull << (at % 64);
    }
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
    RUN(union_is_the_union_and_counts);
    RUN(runs_are_maximal_and_complete);
    RUN(runs_at_edges);
    RUN(tails_are_seen);
    RUN(hidden_words_are_seen_and_mended);
    RUN(checksum_of_a_bitmap_sees_every_bit);
    RUN(takers_lose_no_bit_while_setters_run);
    return DONE();
}
