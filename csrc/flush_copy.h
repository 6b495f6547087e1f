/* SPDX-License-Identifier: Apache-2.0 */
/* flush_copy.h -- many pages from the cache to guest RAM by the threads of the pool: what every strategy that copies is made of. */
#ifndef CC_FLUSH_COPY_H
#define CC_FLUSH_COPY_H

#include "internal.h"

/* Which pages of a block are copied. */
typedef const struct cc_bitmap *cc_copy_set_fn(const struct cc_block *block);

/* All stores are visible when it returns.  Fills n_threads, n_pages, n_runs and n_bytes. */
void cc_copy_pages_of(struct colocache *cc, cc_copy_set_fn *set, struct colocache_flush_result *out);

#endif
