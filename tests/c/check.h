/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.h -- all there is of a test framework.
 *
 *     static void some_promise(void) { CHECK(1 + 1 == 2); CHECK_RC(0, colocache_close(cc)); }
 *     int main(void) { RUN(some_promise); return DONE(); }
 *
 * A failing check prints where and what, marks the test as failed and goes on; REQUIRE leaves the program, for what the rest
 * of it can't do without.  SKIP gives the reason.  The last line of a program is read by run.sh.
 */
#ifndef CHECK_H
#define CHECK_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "colocache.h"

static unsigned check_passed, check_failed, check_skipped, check_broken;
static const char *check_skip_reason;

#define CHECK_SAY(...) \
    do { \
        __atomic_fetch_add(&check_broken, 1, __ATOMIC_RELAXED); \
        printf("    %s:%d: ", __FILE__, __LINE__); \
        printf(__VA_ARGS__); \
        printf("\n"); \
    } while (0)

#define CHECK(condition) \
    do { \
        if (!(condition)) \
            CHECK_SAY("not true: %s", #condition); \
    } while (0)

#define CHECK_EQ(expected, found) \
    do { \
        uint64_t check_e = (uint64_t)(expected), check_f = (uint64_t)(found); \
        if (check_e != check_f) \
            CHECK_SAY("%s is %" PRIu64 " (0x%" PRIx64 "), expected %" PRIu64 " (0x%" PRIx64 ")", #found, check_f, check_f, check_e, \
                      check_e); \
    } while (0)

/* A code; and with a failing one, a sentence must have been left. */
#define CHECK_RC(expected, call) \
    do { \
        int check_e = (expected), check_f = (call); \
        if (check_e != check_f) \
            CHECK_SAY("%s gave %d (%s), expected %d", #call, check_f, check_f < 0 ? colocache_last_error() : "", check_e); \
        else if (check_f < 0 && !*colocache_last_error()) \
            CHECK_SAY("%s failed without a sentence", #call); \
    } while (0)

#define REQUIRE(condition) \
    do { \
        if (!(condition)) { \
            printf("    %s:%d: can't go on without: %s (%s)\n", __FILE__, __LINE__, #condition, colocache_last_error()); \
            exit(1); \
        } \
    } while (0)

#define SKIP(reason) \
    do { \
        check_skip_reason = reason; \
        return; \
    } while (0)

#define RUN(test) check_run(#test, test)

static inline void check_run(const char *name, void (*test)(void))
{
    check_broken = 0;
    check_skip_reason = NULL;
    test();
    if (check_broken) {
        printf("  FAIL %s\n", name);
        check_failed++;
    } else if (check_skip_reason) {
        printf("  skip %s: %s\n", name, check_skip_reason);
        check_skipped++;
    } else {
        printf("  ok   %s\n", name);
        check_passed++;
    }
    fflush(stdout);
}

#define DONE() (printf("= %u passed, %u failed, %u skipped\n", check_passed, check_failed, check_skipped), check_failed != 0)

/* Numbers that are random and the same in each run (splitmix64). */
struct dice {
    uint64_t state;
};

static inline uint64_t roll(struct dice *dice)
{
    uint64_t z = (dice->state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static inline uint64_t below(struct dice *dice, uint64_t n)
{
    return roll(dice) % n;
}

#endif
