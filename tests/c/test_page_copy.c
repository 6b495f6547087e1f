/* SPDX-License-Identifier: Apache-2.0 */
/* page_copy.c: every variant that runs here moves the same bytes and touches none outside of its run. */
#define _GNU_SOURCE
#include "page_copy.h"

#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define PAGES 12u
#define MANY 27u
#define PAGE 4096u

static uint8_t *src, *dst, *expected;

static void variants_copy_exactly_their_run(void)
{
    struct dice dice = {7};
    unsigned tried = 0;
    for (int variant = COLOCACHE_COPY_AUTO; variant <= COLOCACHE_COPY_NEON; variant++) {
        struct cc_copy copy;
        CHECK_EQ(cc_copy_supported(variant), colocache_copy_supported(variant) == 0);
        if (!cc_copy_pick(variant, &copy)) {
            CHECK_EQ(COLOCACHE_E_UNSUPPORTED, colocache_copy_supported(variant));
            continue;
        }
        CHECK(variant == COLOCACHE_COPY_AUTO ? copy.variant != COLOCACHE_COPY_AUTO : copy.variant == variant);
        tried++;
        for (uint64_t first = 0; first < PAGES; first++) {
            for (uint64_t n = 1; first + n <= PAGES; n++) {
                for (uint64_t i = 0; i < PAGES * PAGE; i += 8) {
                    uint64_t a = roll(&dice), b = roll(&dice);
                    memcpy(src + i, &a, 8);
                    memcpy(dst + i, &b, 8);
                }
                memcpy(expected, dst, PAGES * PAGE);
                memcpy(expected + first * PAGE, src + first * PAGE, n * PAGE);
                copy.run(dst + first * PAGE, src + first * PAGE, n * PAGE);
                copy.fence();
                if (memcmp(dst, expected, PAGES * PAGE) != 0)
                    CHECK_SAY("variant %d, pages %u+%u: wrong bytes", copy.variant, (unsigned)first, (unsigned)n);
            }
        }
    }
    CHECK(tried >= 2); /* auto and libc at least */
    CHECK(!cc_copy_supported(99) && !cc_copy_supported(-1));
    CHECK_EQ(COLOCACHE_E_UNSUPPORTED, colocache_copy_supported(99));
}

static void variants_copy_exactly_their_pages(void)
{
    struct dice dice = {8};
    for (int variant = COLOCACHE_COPY_AUTO; variant <= COLOCACHE_COPY_NEON; variant++) {
        struct cc_copy copy;
        if (!cc_copy_pick(variant, &copy))
            continue;
        for (uint32_t n = 0; n <= MANY; n++) { /* whole groups of lanes, and what is left over */
            for (uint32_t n_next = 0; n_next <= 9; n_next += 3) {
                uint64_t at[MANY + 9];
                for (uint32_t i = 0; i < MANY; i++)
                    at[i] = i * PAGE;
                for (uint32_t i = MANY - 1; i > 0; i--) { /* in no order */
                    uint64_t j = roll(&dice) % (i + 1), other = at[j];
                    at[j] = at[i];
                    at[i] = other;
                }
                for (uint32_t i = MANY; i < MANY + 9; i++)
                    at[i] = at[i - MANY];
                for (uint64_t i = 0; i < MANY * PAGE; i += 8) {
                    uint64_t a = roll(&dice), b = roll(&dice);
                    memcpy(src + i, &a, 8);
                    memcpy(dst + i, &b, 8);
                }
                memcpy(expected, dst, MANY * PAGE);
                for (uint32_t i = 0; i < n; i++)
                    memcpy(expected + at[i], src + at[i], PAGE);
                copy.pages(dst, src, at, n, n_next);
                copy.fence();
                if (memcmp(dst, expected, MANY * PAGE) != 0)
                    CHECK_SAY("variant %d, %u pages and %u more: wrong bytes", copy.variant, n, n_next);
            }
        }
    }
}

static void copies_end_at_the_last_mapped_byte(void)
{
    /* a hint past the end of the images, or a store there, would be a fault: the page after them is not mapped */
    uint8_t *edge = mmap(NULL, 5 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(edge != MAP_FAILED);
    REQUIRE(mprotect(edge + 4 * PAGE, PAGE, PROT_NONE) == 0);
    for (int variant = COLOCACHE_COPY_AUTO; variant <= COLOCACHE_COPY_NEON; variant++) {
        struct cc_copy copy;
        if (!cc_copy_pick(variant, &copy))
            continue;
        memset(edge, 0x5a, 2 * PAGE);
        memset(edge + 2 * PAGE, 0, 2 * PAGE);
        copy.run(edge + 2 * PAGE, edge, 2 * PAGE);
        copy.fence();
        CHECK(memcmp(edge, edge + 2 * PAGE, 2 * PAGE) == 0);
        memset(edge + 2 * PAGE, 0, 2 * PAGE);
        uint64_t at[] = {PAGE, 0};
        copy.pages(edge + 2 * PAGE, edge, at, 2, 0);
        copy.fence();
        CHECK(memcmp(edge, edge + 2 * PAGE, 2 * PAGE) == 0);
    }
    munmap(edge, 5 * PAGE);
}

static void one_bit_makes_a_page_not_zero(void)
{
    memset(src, 0, PAGE);
    CHECK(cc_is_zero(src, PAGE));
    for (uint64_t bit = 0; bit < PAGE * 8; bit++) {
        src[bit / 8] = (uint8_t)(1u << (bit % 8));
        if (cc_is_zero(src, PAGE))
            CHECK_SAY("bit %u is not seen", (unsigned)bit);
        src[bit / 8] = 0;
    }
    src[PAGE] = 1;
    CHECK(cc_is_zero(src, PAGE)); /* the byte after it is not its business */
}

int main(void)
{
    src = aligned_alloc(PAGE, MANY * PAGE);
    dst = aligned_alloc(PAGE, MANY * PAGE);
    expected = aligned_alloc(PAGE, MANY * PAGE);
    REQUIRE(src && dst && expected);
    RUN(variants_copy_exactly_their_run);
    RUN(variants_copy_exactly_their_pages);
    RUN(copies_end_at_the_last_mapped_byte);
    RUN(one_bit_makes_a_page_not_zero);
    free(src);
    free(dst);
    free(expected);
    return DONE();
}
