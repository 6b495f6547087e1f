/* SPDX-License-Identifier: Apache-2.0 */
/* private.h -- where a private mapping of a file holds copies of its own. */
#ifndef CC_PRIVATE_H
#define CC_PRIVATE_H

#include <stdint.h>

/* Addresses of a stretch of private pages; not 0 ends the walk. */
typedef int cc_private_run_fn(void *context, uint64_t start, uint64_t end);

/* Walks the private pages of [addr, addr + len_bytes) of process `pid`, 0 for this one.  0, what `run` said, E_ARGUMENT, -errno. */
int cc_private_runs(int pid, const void *addr, uint64_t len_bytes, cc_private_run_fn *run, void *context);

#endif
