/* SPDX-License-Identifier: Apache-2.0 */
/* gate.c and pool.c: who is inside, who waits, and who does the work. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pthread_getname_np */
#endif
#include "gate.h"
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#include "check.h"

#define ENTRANTS 4u
#define CLOSINGS 300u

static struct cc_gate gate;
static uint64_t inside, plain_sum, entries; /* plain_sum has no atomics: the closer alone writes it, those inside read it */
static uint32_t stop, wrong;

static void *entrant(void *arg)
{
    (void)arg;
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        cc_gate_enter(&gate);
        __atomic_add_fetch(&inside, 1, __ATOMIC_RELAXED);
        if (plain_sum & 1) /* the closer makes it odd only while it is alone */
            __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        __atomic_sub_fetch(&inside, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&entries, 1, __ATOMIC_RELAXED);
        cc_gate_leave(&gate);
    }
    return NULL;
}

static void closer_is_alone_and_nobody_is_left_waiting(void)
{
    pthread_t threads[ENTRANTS];
    for (unsigned i = 0; i < ENTRANTS; i++)
        REQUIRE(pthread_create(&threads[i], NULL, entrant, NULL) == 0);
    for (unsigned i = 0; i < CLOSINGS || __atomic_load_n(&entries, __ATOMIC_RELAXED) < 1000; i++) {
        cc_gate_close(&gate);
        plain_sum++;
        for (unsigned k = 0; k < 100; k++)
            CHECK_EQ(0, __atomic_load_n(&inside, __ATOMIC_RELAXED));
        plain_sum++;
        cc_gate_open(&gate);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    for (unsigned i = 0; i < ENTRANTS; i++)
        pthread_join(threads[i], NULL); /* a lost wake-up would hang here */
    CHECK_EQ(0, wrong);
    CHECK(entries >= 1000);
    CHECK_EQ(0, gate.word);
}

static uint32_t waiter_is_in;

static void *waiter(void *arg)
{
    (void)arg;
    cc_gate_enter(&gate);
    __atomic_store_n(&waiter_is_in, 1, __ATOMIC_RELEASE);
    cc_gate_leave(&gate);
    return NULL;
}

static void closed_gate_lets_nobody_in(void)
{
    pthread_t thread;
    cc_gate_close(&gate);
    REQUIRE(pthread_create(&thread, NULL, waiter, NULL) == 0);
    for (int i = 0; i < 2000; i++) {
        sched_yield();
        CHECK_EQ(0, __atomic_load_n(&waiter_is_in, __ATOMIC_ACQUIRE));
    }
    cc_gate_open(&gate);
    pthread_join(thread, NULL);
    CHECK_EQ(1, waiter_is_in);
}

/* ---- pool -------------------------------------------------------------------------------------------------------- */

struct job {
    uint64_t next, n, calls;
    uint8_t *done;
};

static void work(void *context)
{
    struct job *job = context;
    __atomic_add_fetch(&job->calls, 1, __ATOMIC_RELAXED);
    for (;;) {
        uint64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (i >= job->n)
            return;
        job->done[i]++;
    }
}

static void all_the_work_is_done_once_before_run_returns(void)
{
    static uint8_t done[5000];
    for (uint32_t size = 1; size <= 8; size++) {
        struct cc_pool *pool = NULL;
        REQUIRE(cc_pool_create(size, NULL, NULL, &pool) == 0);
        CHECK_EQ(size, cc_pool_size(pool));
        for (uint32_t n_threads = 1; n_threads <= 10; n_threads++) {
            memset(done, 0, sizeof done);
            struct job job = {.n = sizeof done, .done = done};
            cc_pool_run(pool, n_threads, work, &job);
            uint32_t most = n_threads < size ? n_threads : size;
            CHECK(job.calls >= 1 && job.calls <= most);
            for (unsigned i = 0; i < sizeof done; i++)
                CHECK(done[i] == 1);
        }
        cc_pool_destroy(pool);
    }
    cc_pool_destroy(NULL);
}

struct meeting {
    uint32_t expected, arrived;
};

static void meet(void *context) /* returns when everybody has come, or after 20 s */
{
    struct meeting *meeting = context;
    const time_t begin = time(NULL);
    __atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(&meeting->arrived, __ATOMIC_ACQUIRE) < meeting->expected && time(NULL) < begin + 20)
        sched_yield();
}

static void as_many_threads_come_as_were_asked_for(void)
{
    struct cc_pool *pool = NULL;
    REQUIRE(cc_pool_create(5, NULL, NULL, &pool) == 0);
    for (uint32_t n_threads = 1; n_threads <= 5; n_threads++) {
        for (int round = 0; round < 20; round++) { /* the workers asleep, or not yet asleep again */
            struct meeting meeting = {.expected = n_threads};
            cc_pool_run(pool, n_threads, meet, &meeting);
            CHECK_EQ(n_threads, meeting.arrived);
        }
    }
    cc_pool_destroy(pool);
}

static uint32_t names_right, started;

static void started_with(void *context, uint32_t i)
{
    char name[16] = "", expected[16];
    snprintf(expected, sizeof expected, "colocache/%u", i);
    pthread_getname_np(pthread_self(), name, sizeof name);
    __atomic_add_fetch(&names_right, strcmp(name, expected) == 0 && context == &names_right, __ATOMIC_RELAXED);
    pthread_setname_np(pthread_self(), "mine");
    __atomic_or_fetch(&started, 1u << i, __ATOMIC_RELEASE);
}

static void each_worker_is_named_and_introduced_before_it_works(void)
{
    struct cc_pool *pool = NULL;
    started = names_right = 0;
    REQUIRE(cc_pool_create(5, started_with, &names_right, &pool) == 0);
    struct meeting meeting = {.expected = 5};
    cc_pool_run(pool, 5, meet, &meeting);
    CHECK_EQ(5, meeting.arrived);
    CHECK_EQ(0x1e, __atomic_load_n(&started, __ATOMIC_ACQUIRE)); /* 1 to 4, and not the caller */
    CHECK_EQ(4, names_right);
    cc_pool_destroy(pool);
}

static void introduced_late(void *context, uint32_t i)
{
    (void)i;
    usleep(20000);
    __atomic_add_fetch((unsigned *)context, 1, __ATOMIC_RELEASE);
}

/* Who locks its process in after create must find no thread that is still being born: that makes system calls. */
static void a_pool_that_is_made_has_introduced_all_its_workers(void)
{
    struct cc_pool *pool = NULL;
    unsigned introduced = 0;
    REQUIRE(cc_pool_create(5, introduced_late, &introduced, &pool) == 0);
    CHECK_EQ(4, __atomic_load_n(&introduced, __ATOMIC_ACQUIRE));
    cc_pool_destroy(pool);
}

static void pool_is_bounded(void)
{
    struct cc_pool *pool = NULL;
    CHECK_EQ(-EINVAL, cc_pool_create(0, NULL, NULL, &pool));
    CHECK_EQ(-EINVAL, cc_pool_create(CC_THREADS_MAX + 1, NULL, NULL, &pool));
    REQUIRE(cc_pool_create(CC_THREADS_MAX, NULL, NULL, &pool) == 0);
    CHECK_EQ(CC_THREADS_MAX, cc_pool_size(pool));
    cc_pool_destroy(pool);
}

int main(void)
{
    RUN(closer_is_alone_and_nobody_is_left_waiting);
    RUN(closed_gate_lets_nobody_in);
    RUN(all_the_work_is_done_once_before_run_returns);
    RUN(as_many_threads_come_as_were_asked_for);
    RUN(each_worker_is_named_and_introduced_before_it_works);
    RUN(a_pool_that_is_made_has_introduced_all_its_workers);
    RUN(pool_is_bounded);
    return DONE();
}
