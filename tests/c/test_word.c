/* SPDX-License-Identifier: Apache-2.0 */
/* word.c: the value comes back, and up to three bits that were turned over are found. */
#include "word.h"

#include "check.h"

static const uint64_t values[] = {0, 1, 2, 3, 0xff, 1ull << 40, COLOCACHE_EPOCH_MAX - 1, COLOCACHE_EPOCH_MAX};
#define N_VALUES (sizeof values / sizeof *values)

static void a_value_comes_back(void)
{
    struct dice dice = {48};
    for (unsigned i = 0; i < 10000; i++) {
        uint64_t value = i < N_VALUES ? values[i] : roll(&dice) & COLOCACHE_EPOCH_MAX, word = 77, found = 77;
        cc_word_publish(&word, value);
        CHECK_EQ(cc_word_make(value), word);
        CHECK_RC(0, cc_word_read("word", &word, &found));
        CHECK_EQ(value, found);
    }
    CHECK_EQ(0, cc_word_make(0)); /* a fresh region needs no stores */
}

static void is_refused(uint64_t word)
{
    uint64_t found = 77;
    CHECK_RC(COLOCACHE_E_CORRUPT, cc_word_value("word", word, &found));
    CHECK_EQ(77, found);
}

static void up_to_three_bits_turned_over_are_found(void)
{
    for (unsigned i = 0; i < N_VALUES; i++) {
        const uint64_t word = cc_word_make(values[i]);
        for (unsigned a = 0; a < 64; a++) {
            is_refused(word ^ 1ull << a);
            for (unsigned b = 0; b < a; b++) {
                is_refused(word ^ 1ull << a ^ 1ull << b);
                for (unsigned c = 0; i < 2 && c < b; c++)
                    is_refused(word ^ 1ull << a ^ 1ull << b ^ 1ull << c);
            }
        }
    }
}

/* The polynomial by hand, one bit at a time. */
static void the_check_is_the_one_that_is_written_down(void)
{
    struct dice dice = {16};
    for (int i = 0; i < 1000; i++) {
        uint64_t value = roll(&dice) & COLOCACHE_EPOCH_MAX;
        uint32_t crc = 0;
        for (int bit = 47; bit >= 0; bit--) {
            uint32_t top = (crc >> 15 ^ (uint32_t)(value >> bit)) & 1;
            crc = (crc << 1 ^ (top ? 0x1021u : 0)) & 0xffff;
        }
        CHECK_EQ((uint64_t)crc << 48 | value, cc_word_make(value));
    }
}

int main(void)
{
    RUN(a_value_comes_back);
    RUN(up_to_three_bits_turned_over_are_found);
    RUN(the_check_is_the_one_that_is_written_down);
    return DONE();
}
