/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything at once: four receivers, a marker, and threads that ask for status, abort and failover, while the conductor seals and
 * flushes.  No page may be lost over all the epochs, and ThreadSanitizer must have nothing to say.
 *
 * Each receiver has pages of its own (pfn % 4 is its number) and remembers what it put there last; the marker has
 * its own words; so the oracle needs no locks of its own.
 */
#include "rig.h"

#include <pthread.h>

#define PAGES 1030u
#define RECEIVERS 4u
#define EPOCHS 30u
#define PAGES_PER_EPOCH 60u

static const uint64_t blocks[] = {PAGES, 131};
static struct rig rig;

static uint64_t go_epoch; /* receivers may work on this epoch; 0 = end */
static uint32_t receivers_done;
static uint32_t bystanders_stop;
static uint64_t refused_aborts, statuses, live_failovers;

/* rest -- a waiting thread leaves the cores to those that work: there may be fewer of them than threads */
static void rest(void)
{
    usleep(20);
}

static uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void *receiver(void *arg)
{
    uint64_t me = (uint64_t)(uintptr_t)arg, seen = 0;
    struct dice dice = {me + 100};
    uint8_t page[4096];
    for (;;) {
        uint64_t epoch;
        while ((epoch = load(&go_epoch)) == seen)
            rest();
        if (epoch == 0)
            return NULL;
        seen = epoch;
        for (unsigned i = 0; i < PAGES_PER_EPOCH; i++) {
            uint32_t b = (uint32_t)below(&dice, 2);
            uint64_t pfn = below(&dice, blocks[b] / RECEIVERS) * RECEIVERS + me;
            rig_fill(page, 4096, epoch * 1000 + i, b, pfn);
            int rc = i % 5 ? colocache_receive_page(rig.cc, epoch, b, pfn, page, 4096) : colocache_receive_zero(rig.cc, epoch, b, pfn, 1);
            CHECK_RC(0, rc);
            if (i % 5 == 0)
                memset(page, 0, sizeof page);
            memcpy(rig.blocks[b].cache_oracle + pfn * 4096, page, 4096);
            rig.blocks[b].pvm[pfn] = 1;
        }
        __atomic_add_fetch(&receivers_done, 1, __ATOMIC_RELEASE);
    }
}

/* The marker only marks: what it says is written is made true by the conductor's oracle, for which any extra bit is harmless. */
static void *marker(void *arg)
{
    struct dice dice = {200};
    (void)arg;
    while (!__atomic_load_n(&bystanders_stop, __ATOMIC_ACQUIRE)) {
        uint32_t b = (uint32_t)below(&dice, 2);
        CHECK_RC(0, colocache_mark_dirty(rig.cc, b, below(&dice, blocks[b]), 1));
        rest();
    }
    return NULL;
}

static void *asker(void *arg)
{
    uint64_t last_sealed = 0, last_committed = 0;
    (void)arg;
    while (!__atomic_load_n(&bystanders_stop, __ATOMIC_ACQUIRE)) {
        struct colocache_status status = {.struct_size = sizeof status};
        CHECK_RC(0, colocache_get_status(rig.cc, &status));
        CHECK(status.sealed_epoch >= last_sealed && status.committed_epoch >= last_committed); /* never backwards, never torn */
        CHECK(status.committed_epoch <= status.sealed_epoch && status.sealed_epoch - status.committed_epoch <= 2); /* one may be aborted */
        CHECK(status.receiving_epoch >= status.sealed_epoch);
        last_sealed = status.sealed_epoch;
        last_committed = status.committed_epoch;
        statuses++;
        int rc = colocache_abort(rig.cc, 1u << 30, "an epoch that never comes"); /* must disturb nobody */
        CHECK(rc == COLOCACHE_E_EPOCH || rc == COLOCACHE_E_SEALED);
        refused_aborts++;
        CHECK_RC(0, colocache_inspect(rig.control_fd, &status, NULL, NULL));
        rest();
    }
    return NULL;
}

static void no_page_is_lost_while_everybody_works(void)
{
    pthread_t receivers[RECEIVERS], bystanders[2];
    rig_open(&rig, 2, blocks, 4096, false);
    bystanders_stop = 0;
    for (uintptr_t i = 0; i < RECEIVERS; i++)
        REQUIRE(pthread_create(&receivers[i], NULL, receiver, (void *)i) == 0);
    REQUIRE(pthread_create(&bystanders[0], NULL, marker, NULL) == 0);
    REQUIRE(pthread_create(&bystanders[1], NULL, asker, NULL) == 0);
    uint64_t lost_to_flush = 0;
    for (uint64_t epoch = 1; epoch <= EPOCHS; epoch++) {
        rig_device_state(&rig, epoch, 16);
        __atomic_store_n(&receivers_done, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&go_epoch, epoch, __ATOMIC_RELEASE);
        while (__atomic_load_n(&receivers_done, __ATOMIC_ACQUIRE) < RECEIVERS)
            rest();
        if (epoch % 7 == 0) { /* an epoch that is given up: its pages belong to the next */
            CHECK_RC(0, colocache_abort(rig.cc, epoch, "test"));
            continue;
        }
        struct colocache_seal_args args = rig_seal_args(epoch);
        args.n_pages = RECEIVERS * PAGES_PER_EPOCH;
        CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
        CHECK_RC(0, colocache_flush(rig.cc, NULL));
        for (uint32_t b = 0; b < 2; b++) {
            lost_to_flush += memcmp(rig.blocks[b].cache, rig.blocks[b].cache_oracle, rig_len(&rig.blocks[b])) != 0;
            lost_to_flush += memcmp(rig.blocks[b].guest, rig.blocks[b].cache_oracle, rig_len(&rig.blocks[b])) != 0;
        }
        CHECK_EQ(0, lost_to_flush);
        CHECK_RC(0, colocache_loaded(rig.cc, 1));
    }
    __atomic_store_n(&go_epoch, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&bystanders_stop, 1, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < RECEIVERS; i++)
        pthread_join(receivers[i], NULL);
    for (int i = 0; i < 2; i++)
        pthread_join(bystanders[i], NULL);
    CHECK(statuses > 0 && refused_aborts > 0);
    CHECK_RC(0, colocache_validate(rig.cc, 0));
    rig_close(&rig);
}

/* ---- aborts and seals race for the epoch while pages of it still come ---------------------------------------------- */

static uint32_t streaming_stop;
static uint64_t taken_pages;

static void *eager_receiver(void *arg)
{
    uint64_t me = (uint64_t)(uintptr_t)arg;
    struct dice dice = {me + 300};
    uint8_t page[4096];
    while (!__atomic_load_n(&streaming_stop, __ATOMIC_ACQUIRE)) {
        uint64_t epoch = load(&go_epoch), pfn = below(&dice, PAGES / RECEIVERS) * RECEIVERS + me;
        rig_fill(page, 4096, roll(&dice), 0, pfn);
        int rc = colocache_receive_page(rig.cc, epoch, 0, pfn, page, 4096);
        if (rc == 0) { /* it was taken, so from the next seal on it is in guest RAM: nothing else is allowed */
            memcpy(rig.blocks[0].cache_oracle + pfn * 4096, page, 4096);
            __atomic_add_fetch(&taken_pages, 1, __ATOMIC_RELAXED);
        } else {
            CHECK(rc == COLOCACHE_E_EPOCH || rc == COLOCACHE_E_SEALED || rc == COLOCACHE_E_FAILED_OVER);
            rest();
        }
    }
    return NULL;
}

static void *eager_aborter(void *arg)
{
    struct dice dice = {400};
    (void)arg;
    while (!__atomic_load_n(&streaming_stop, __ATOMIC_ACQUIRE)) {
        int rc = colocache_abort(rig.cc, load(&go_epoch), "race");
        CHECK(rc == 0 || rc == COLOCACHE_E_EPOCH || rc == COLOCACHE_E_SEALED);
        for (uint64_t i = below(&dice, 20); i; i--)
            rest();
    }
    return NULL;
}

static void seals_and_aborts_race_and_one_of_them_has_the_epoch(void)
{
    pthread_t receivers[RECEIVERS], aborter;
    uint64_t sealed = 0, given_up = 0;
    rig_open(&rig, 2, blocks, 4096, false);
    streaming_stop = 0;
    __atomic_store_n(&go_epoch, 1, __ATOMIC_RELEASE);
    for (uintptr_t i = 0; i < RECEIVERS; i++)
        REQUIRE(pthread_create(&receivers[i], NULL, eager_receiver, (void *)i) == 0);
    REQUIRE(pthread_create(&aborter, NULL, eager_aborter, NULL) == 0);
    for (uint64_t epoch = 1; epoch <= 80; epoch++) {
        void *addr;
        struct colocache_seal_args args = rig_seal_args(epoch);
        __atomic_store_n(&go_epoch, epoch, __ATOMIC_RELEASE);
        for (int i = 0; i < 5; i++)
            rest();
        int rc = colocache_device_state_begin(rig.cc, epoch, 8, &addr);
        if (rc == 0)
            rc = colocache_seal(rig.cc, &args, NULL);
        if (rc == 0) {
            sealed++;
            CHECK_RC(0, colocache_flush(rig.cc, NULL));
            /* all receivers are kept out until loaded: cache and guest RAM stand still */
            CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache, rig_len(&rig.blocks[0])) == 0);
            CHECK_RC(0, colocache_validate(rig.cc, 1));
            CHECK_RC(0, colocache_loaded(rig.cc, 1));
        } else {
            given_up++;
            CHECK(rc == COLOCACHE_E_EPOCH || rc == COLOCACHE_E_SEALED || rc == COLOCACHE_E_INCOMPLETE);
        }
    }
    __atomic_store_n(&streaming_stop, 1, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < RECEIVERS; i++)
        pthread_join(receivers[i], NULL);
    pthread_join(aborter, NULL);
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(rig.cc, &status));
    uint64_t last = status.receiving_epoch + 1;
    rig_device_state(&rig, last, 0);
    CHECK_RC(0, rig_try_seal(&rig, last)); /* whatever was given up is in it */
    CHECK_RC(0, colocache_flush(rig.cc, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache_oracle, rig_len(&rig.blocks[0])) == 0);
    CHECK(taken_pages > 0 && sealed + given_up == 80);
    rig_close(&rig);
}

/* ---- failover in the middle of it all: one answer, and it is kept ------------------------------------------------------ */

static uint32_t asked;

static void *failing_over(void *arg)
{
    int *answer = arg;
    for (uint64_t i = 0; i < 10; i++)
        rest();
    *answer = colocache_failover(rig.cc, NULL);
    __atomic_store_n(&asked, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void failover_and_checkpoint_agree_on_who_was_first(void)
{
    for (unsigned round = 0; round < 25; round++) {
        pthread_t thread;
        int answer = 99;
        bool now = false;
        rig_open(&rig, 2, blocks, 4096, false);
        rig_receive(&rig, 1, 0, 0, 1);
        rig_checkpoint(&rig, 1, 0);
        asked = 0;
        REQUIRE(pthread_create(&thread, NULL, failing_over, &answer) == 0);
        uint64_t epoch = 2, sealed = 1;
        for (; !now; epoch++) {
            void *addr;
            uint8_t page[4096] = {1};
            struct colocache_seal_args args = rig_seal_args(epoch);
            int rc = colocache_receive_page(rig.cc, epoch, 0, epoch % PAGES, page, 4096);
            if (rc == 0)
                rc = colocache_device_state_begin(rig.cc, epoch, 0, &addr);
            if (rc == 0)
                rc = colocache_seal(rig.cc, &args, NULL);
            if (rc == 0) {
                sealed = epoch;
                CHECK_RC(0, colocache_flush(rig.cc, NULL));
                rc = colocache_loaded(rig.cc, 1);
                now = rc == 1;
                CHECK(rc == 0 || rc == 1);
            } else {
                CHECK_EQ(COLOCACHE_E_FAILED_OVER, rc); /* failover was first: the epoch can't be had any more */
                break;
            }
        }
        pthread_join(thread, NULL);
        CHECK(asked && answer == (now ? 1 : 0)); /* 1 exactly when loaded said so */
        live_failovers += !now;
        CHECK_EQ(COLOCACHE_PHASE_FAILED_OVER, rig_phase(&rig));
        CHECK_EQ(cc_word_make(1), rig.control->taken_over);
        struct colocache_status status = {.struct_size = sizeof status};
        CHECK_RC(0, colocache_get_status(rig.cc, &status));
        CHECK_EQ(sealed, status.sealed_epoch);
        CHECK_EQ(sealed, status.committed_epoch); /* a sealed epoch was finished first */
        rig_close(&rig);
    }
}

/* ---- the initial copy: pages come while preflush copies what has come ---------------------------------------------------- */

static uint64_t preflushes, last_salt[RECEIVERS];

static void *initial_receiver(void *arg)
{
    uint64_t me = (uint64_t)(uintptr_t)arg;
    uint8_t page[4096];
    for (uint64_t salt = 1; salt <= 3 || __atomic_load_n(&preflushes, __ATOMIC_RELAXED) < 20; salt++) {
        last_salt[me] = salt;
        for (uint64_t pfn = me; pfn < PAGES; pfn += RECEIVERS) {
            rig_fill(page, 4096, salt, 0, pfn);
            CHECK_RC(0, colocache_receive_page(rig.cc, 1, 0, pfn, page, 4096));
        }
    }
    __atomic_add_fetch(&receivers_done, 1, __ATOMIC_RELEASE);
    return NULL;
}

static void preflush_beside_receivers_loses_no_page(void)
{
    pthread_t receivers[RECEIVERS];
    uint64_t n = 0;
    uint8_t page[4096];
    rig_open(&rig, 1, blocks, 4096, false);
    __atomic_store_n(&receivers_done, 0, __ATOMIC_RELEASE);
    for (uintptr_t i = 0; i < RECEIVERS; i++)
        REQUIRE(pthread_create(&receivers[i], NULL, initial_receiver, (void *)i) == 0);
    while (__atomic_load_n(&receivers_done, __ATOMIC_ACQUIRE) < RECEIVERS) {
        CHECK_RC(0, colocache_preflush(rig.cc, &n));
        __atomic_add_fetch(&preflushes, 1, __ATOMIC_RELAXED);
    }
    for (unsigned i = 0; i < RECEIVERS; i++)
        pthread_join(receivers[i], NULL);
    rig_device_state(&rig, 1, 0);
    CHECK_RC(0, rig_try_seal(&rig, 1));
    CHECK_RC(0, colocache_flush(rig.cc, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    for (uint64_t pfn = 0; pfn < PAGES; pfn++) {
        rig_fill(page, 4096, last_salt[pfn % RECEIVERS], 0, pfn);
        CHECK(memcmp(rig.blocks[0].guest + pfn * 4096, page, 4096) == 0);
    }
    rig_close(&rig);
}

int main(void)
{
    RUN(no_page_is_lost_while_everybody_works);
    RUN(seals_and_aborts_race_and_one_of_them_has_the_epoch);
    RUN(failover_and_checkpoint_agree_on_who_was_first);
    RUN(preflush_beside_receivers_loses_no_page);
    printf("  (%" PRIu64 " statuses, %" PRIu64 " of 25 failovers from the live state)\n", statuses, live_failovers);
    return DONE();
}
