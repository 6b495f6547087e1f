/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.h -- worker threads that live with the handle and run one function together.
 *
 * cc_pool_run(pool, n, work, context) has `work` called in n threads at once (the caller is one of them) and returns
 * when all that began have returned.  Work itself shares out what there is to do.
 */
#ifndef CC_POOL_H
#define CC_POOL_H

#include <stdint.h>

struct cc_pool;

#define CC_THREADS_MAX 256u

/* n_threads, 1 to CC_THREADS_MAX, counts the caller.  start(context, i) is called in worker i (from 1) before its
 * first job, or is NULL; all of them have returned from it when create does.  0 or -errno. */
int cc_pool_create(uint32_t n_threads, void (*start)(void *context, uint32_t i), void *start_context, struct cc_pool **out);
void cc_pool_destroy(struct cc_pool *pool); /* NULL is fine */
uint32_t cc_pool_size(const struct cc_pool *pool);
void cc_pool_run(struct cc_pool *pool, uint32_t n_threads, void (*work)(void *context), void *context);

#endif
