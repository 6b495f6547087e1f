/* SPDX-License-Identifier: Apache-2.0 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "atomics.h"
#include "clock.h"

#define FINISH_NS 100000u /* how long the caller looks out for the last worker before it sleeps */

struct cc_pool {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    void (*work)(void *context);
    void *context;
    uint32_t to_start; /* workers that may still pick up this job */
    uint32_t running;  /* workers that have not finished it; the caller watches it without the lock */
    bool stopping;
    void (*start)(void *context, uint32_t i); /* the host program's, in each worker before its first job; or NULL */
    void *start_context;
    uint32_t n_started; /* workers that have a number */
    uint32_t n_ready;   /* workers that were introduced */
    uint32_t n_workers; /* without the caller */
    pthread_t workers[];
};

/* watch_end -- until the workers are done; gives up after FINISH_NS.  A look without the lock is a hint only. */
static void watch_end(const struct cc_pool *pool)
{
    uint64_t begin = cc_now_ns();
    do {
        for (unsigned i = 0; i < 64; i++) {
            if (cc_observe32(&pool->running) == 0)
                return;
            cc_relax();
        }
    } while (cc_now_ns() - begin < FINISH_NS);
}

/* introduce -- a name by which top and gdb know the thread; the host program may give it another, and a CPU, and a priority */
static void introduce(const struct cc_pool *pool, uint32_t i)
{
    char name[16]; /* the kernel keeps 15 bytes */
    snprintf(name, sizeof name, "colocache/%u", i);
    pthread_setname_np(pthread_self(), name);
    if (pool->start)
        pool->start(pool->start_context, i);
}

static void *worker(void *arg)
{
    struct cc_pool *pool = arg;
    pthread_mutex_lock(&pool->lock);
    const uint32_t i = ++pool->n_started;
    pthread_mutex_unlock(&pool->lock);
    introduce(pool, i);
    pthread_mutex_lock(&pool->lock);
    pool->n_ready++;
    pthread_cond_signal(&pool->done);
    for (;;) {
        while (!pool->to_start && !pool->stopping)
            pthread_cond_wait(&pool->wake, &pool->lock);
        if (pool->stopping)
            break;
        pool->to_start--;
        pthread_mutex_unlock(&pool->lock);
        pool->work(pool->context);
        pthread_mutex_lock(&pool->lock);
        cc_publish32(&pool->running, pool->running - 1);
        if (pool->running == 0)
            pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

int cc_pool_create(uint32_t n_threads, void (*start)(void *context, uint32_t i), void *start_context, struct cc_pool **out)
{
    if (n_threads == 0 || n_threads > CC_THREADS_MAX)
        return -EINVAL;

    struct cc_pool *pool = calloc(1, sizeof *pool + (n_threads - 1) * sizeof pool->workers[0]);
    if (!pool)
        return -ENOMEM;
    pool->start = start;
    pool->start_context = start_context;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);

    /* The host program's signals are none of the workers' business: block them all while the threads are born. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = 0;
    while (pool->n_workers < n_threads - 1 && rc == 0) {
        rc = pthread_create(&pool->workers[pool->n_workers], NULL, worker, pool);
        if (rc == 0)
            pool->n_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    /* A thread makes system calls of its own while it is born: they are over when the caller may lock its process in (seccomp). */
    pthread_mutex_lock(&pool->lock);
    while (pool->n_ready < pool->n_workers)
        pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    if (rc) {
        cc_pool_destroy(pool);
        return -rc;
    }
    *out = pool;
    return 0;
}

void cc_pool_destroy(struct cc_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->n_workers; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

uint32_t cc_pool_size(const struct cc_pool *pool)
{
    return pool->n_workers + 1;
}

void cc_pool_run(struct cc_pool *pool, uint32_t n_threads, void (*work)(void *context), void *context)
{
    uint32_t helpers = n_threads > pool->n_workers + 1 ? pool->n_workers : n_threads - 1;
    if (helpers == 0) {
        work(context);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->work = work;
    pool->context = context;
    pool->to_start = helpers;
    cc_publish32(&pool->running, helpers);
    for (uint32_t i = 0; i < helpers; i++) /* no more than those: each waking costs the caller microseconds */
        pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    work(context);

    pthread_mutex_lock(&pool->lock);
    /* Workers that have not woken by now are not needed: all the work is taken.  Not waiting for them saves a scheduling delay. */
    cc_publish32(&pool->running, pool->running - pool->to_start);
    pool->to_start = 0;
    pthread_mutex_unlock(&pool->lock);
    watch_end(pool); /* they are at their last piece: less than a sleep and a waking take */
    pthread_mutex_lock(&pool->lock);
    while (pool->running)
        pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
