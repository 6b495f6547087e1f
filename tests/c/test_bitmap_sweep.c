/* SPDX-License-Identifier: Apache-2.0 */
/* Passes over whole bitmaps: union, runs, checksum, against one byte per page. */
#include "bitmap_room.h"
#include "checksum.h"

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
            while (next_run(b, at, end, &first, &n)) {
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

static void every_variant_of_the_union_gives_the_same(void)
{
    enum { WORDS = 67 };
    struct dice dice = {21};
    uint64_t p[WORDS], s[WORDS], plain[WORDS], f[WORDS];
    for (unsigned round = 0; round < 300; round++) {
        for (unsigned i = 0; i < WORDS; i++) {
            p[i] = below(&dice, 3) ? below(&dice, ~0ull) : 0;
            s[i] = below(&dice, 3) ? below(&dice, ~0ull) << 7 : 0;
        }
        uint64_t from = below(&dice, WORDS), n = below(&dice, WORDS - from + 1), index = below(&dice, 1ull << 40);
        struct cc_union_counts want = {1, 2, 3, 4};
        cc_unite_plain(plain + from, p + from, s + from, n, index, &want);
        cc_unite_fn unite;
        for (unsigned v = 0; (unite = cc_unite_variant(v)) != NULL; v++) {
            struct cc_union_counts got = {1, 2, 3, 4};
            memset(f, 0xee, sizeof f);
            unite(f + from, p + from, s + from, n, index, &got);
            CHECK(memcmp(&got, &want, sizeof got) == 0);
            CHECK(memcmp(f + from, plain + from, n * 8) == 0);
            CHECK(from + n == WORDS || f[from + n] == 0xeeeeeeeeeeeeeeee);
        }
    }
}

static void runs_by_the_batch_are_the_same_runs(void)
{
    struct dice dice = {9};
    struct cc_bit_run runs[100];
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        for (uint64_t i = 0; i < 12; i++) {
            struct cc_bitmap *b = fresh(&rooms[0], lengths[l]);
            for (uint64_t k = 0; k < i % 3; k++)
                random_bits(&rooms[0], &dice);
            if (i == 11) { /* as many runs as there can be */
                for (uint64_t pfn = 1; pfn < b->n_bits; pfn += 2) {
                    cc_bitmap_set(b, pfn, 1);
                    rooms[0].oracle[pfn] = 1;
                }
            }
            uint64_t begin = below(&dice, b->n_bits), end = begin + below(&dice, b->n_bits - begin + 1), from = begin, at = begin;
            uint32_t room = CC_RUNS_MIN + (uint32_t)below(&dice, 60), n;
            while ((n = cc_bitmap_runs(b, &from, end, runs, room)) > 0) {
                CHECK(n <= room);
                for (uint32_t r = 0; r < n; r++) {
                    CHECK(runs[r].n > 0 && runs[r].first >= at && runs[r].first + runs[r].n <= end);
                    for (; at < runs[r].first; at++)
                        CHECK(!rooms[0].oracle[at]);
                    for (; at < runs[r].first + runs[r].n; at++)
                        CHECK(rooms[0].oracle[at]);
                    CHECK(at == end || !rooms[0].oracle[at]); /* not cut short */
                }
            }
            for (; at < end; at++)
                CHECK(!rooms[0].oracle[at]);
        }
    }
}

static void advance_passes_as_many_bits_as_it_says(void)
{
    struct dice dice = {31};
    for (unsigned l = 0; l < N_LENGTHS; l++) {
        for (uint64_t i = 0; i < 12; i++) {
            struct cc_bitmap *b = fresh(&rooms[0], lengths[l]);
            for (uint64_t k = 0; k < i % 4; k++)
                random_bits(&rooms[0], &dice);
            if (i == 11) {
                cc_bitmap_set_all(b);
                memset(rooms[0].oracle, 1, b->n_bits);
            }
            uint64_t at = 0, passed = 0, n;
            do {
                uint64_t before = at, most = 1 + below(&dice, 150), seen = 0;
                n = cc_bitmap_advance(b, &at, most);
                CHECK(at >= before && at <= b->n_bits && n <= most);
                for (uint64_t bit = before; bit < at; bit++) {
                    CHECK_EQ(rooms[0].oracle[bit], cc_bitmap_has(b, bit));
                    seen += rooms[0].oracle[bit];
                }
                CHECK_EQ(seen, n);
                CHECK(n < most ? at == b->n_bits : rooms[0].oracle[at - 1]); /* not one bit further than needed */
                passed += n;
            } while (n);
            CHECK_EQ(cc_bitmap_count(b), passed);
        }
    }
}

/* Large enough that one bit of `top` stands for several summary words: 65536 of them are 2^28 pages, 1 TiB of guest. */
static void a_huge_and_almost_clean_bitmap(void)
{
    const uint64_t n_bits = (1ull << 28) + (1ull << 27) + 77;
    uint64_t n_words = cc_words_for(n_bits), first = 0, n = 0;
    static struct cc_bitmap p, s, f;
    struct cc_bitmap *all[] = {&p, &s, &f};
    uint64_t *memory[3];
    for (int i = 0; i < 3; i++) {
        memory[i] = calloc(n_words + cc_words_for(n_words), 8); /* touched only where bits are */
        if (!memory[i])
            SKIP("no address space for three bitmaps of 1.5 TiB guests");
        cc_bitmap_init(all[i], memory[i], memory[i] + n_words, n_bits);
    }
    const uint64_t in_p[] = {0, 1ull << 18, (1ull << 28) + 5, n_bits - 1}, in_s[] = {1ull << 18, 1ull << 27, n_bits - 2};
    const uint64_t expected[][2] = {{0, 1}, {1ull << 18, 1}, {1ull << 27, 1}, {(1ull << 28) + 5, 1}, {n_bits - 2, 2}};
    struct cc_union_counts counts = {0};
    for (int i = 0; i < 4; i++)
        cc_bitmap_set(&p, in_p[i], 1);
    for (int i = 0; i < 3; i++)
        cc_bitmap_set(&s, in_s[i], 1);
    cc_bitmap_set(&f, 12345678, 3); /* left from an older flush set */
    cc_bitmap_union_into(&f, &p, &s, &counts);
    CHECK(counts.pvm == 4 && counts.svm == 3 && counts.both_or_either == 6);
    CHECK_EQ(6, cc_bitmap_count(&f));
    uint64_t at = 0;
    for (int i = 0; i < 5; i++) {
        CHECK(next_run(&f, at, n_bits, &first, &n));
        CHECK_EQ(expected[i][0], first);
        CHECK_EQ(expected[i][1], n);
        at = first + n;
    }
    CHECK(!next_run(&f, at, n_bits, &first, &n));
    uint64_t sum = cc_bitmap_checksum(&f);
    cc_bitmap_rebuild_summary(&f);
    CHECK_EQ(sum, cc_bitmap_checksum(&f));
    uint64_t bits, taken = 0;
    for (uint64_t w = 0; cc_bitmap_take_next(&p, &w, n_words, &bits); w++)
        taken += (uint64_t)__builtin_popcountll(bits);
    CHECK_EQ(4, taken);
    CHECK_EQ(0, cc_bitmap_count(&p));
    cc_bitmap_clear_all(&s);
    cc_bitmap_clear_all(&f);
    CHECK_EQ(0, cc_bitmap_count(&s) + cc_bitmap_count(&f));
    CHECK(nothing_hidden(&s) && s.words[in_s[1] / 64] == 0);
    for (int i = 0; i < 3; i++)
        free(memory[i]);
}

static void runs_at_edges(void)
{
    struct cc_bitmap *b = fresh(&rooms[0], 4097);
    uint64_t first = 0, n = 0;
    CHECK(!next_run(b, 0, 4097, &first, &n));
    cc_bitmap_set_all(b);
    CHECK(next_run(b, 0, 4097, &first, &n) && first == 0 && n == 4097);
    CHECK(next_run(b, 4096, 4097, &first, &n) && first == 4096 && n == 1);
    CHECK(next_run(b, 60, 4000, &first, &n) && first == 60 && n == 3940); /* cut at end */
    CHECK(!next_run(b, 4097, 4097, &first, &n));
    b = fresh(&rooms[0], 256);
    const uint64_t words[] = {0, 0b0110, 0, 0x8000000000000000ull};
    cc_bitmap_or_words(b, 0, 256, words);
    CHECK(next_run(b, 0, 256, &first, &n) && first == 65 && n == 2);
    CHECK(next_run(b, 67, 256, &first, &n) && first == 255 && n == 1);
    CHECK(!next_run(b, 67, 255, &first, &n));
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

int main(void)
{
    RUN(union_is_the_union_and_counts);
    RUN(runs_are_maximal_and_complete);
    RUN(every_variant_of_the_union_gives_the_same);
    RUN(runs_by_the_batch_are_the_same_runs);
    RUN(advance_passes_as_many_bits_as_it_says);
    RUN(runs_at_edges);
    RUN(a_huge_and_almost_clean_bitmap);
    RUN(checksum_of_a_bitmap_sees_every_bit);
    return DONE();
}
