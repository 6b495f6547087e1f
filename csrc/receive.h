/* SPDX-License-Identifier: Apache-2.0 */
/* receive.h -- pages of an epoch into the cache, from wherever their bytes come. */
#ifndef CC_RECEIVE_H
#define CC_RECEIVE_H

#include <sys/uio.h>

#include "internal.h"
#include "message.h"

/* Brings the bytes of these ranges of the cache, all of them, and uses the iovecs up.  0, or an error: some may have been written. */
typedef int cc_bring_fn(void *context, struct iovec *iov, uint32_t n_iov);

/* Runs of one block, checked before: zero runs are filled, the others brought; then bits and counts.  `iov` has room for n_runs.
 * memory: the bytes lie there already (else NULL); where they are to be staged they are taken from there, and `bring` is not called.
 * If bringing fails the pages that may have been touched get their bits all the same, but don't count: the epoch can't be sealed any more
 * (its count is short), and a page whose bytes changed without a bit would be one that guest RAM and cache silently disagree on. */
int cc_receive_runs(struct colocache *cc, uint64_t epoch, struct cc_block *block, const struct cc_run *runs, uint32_t n_runs,
                    struct iovec *iov, cc_bring_fn *bring, void *context, const void *memory, uint64_t *n_pages);

#endif
