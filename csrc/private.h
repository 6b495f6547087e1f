/* SPDX-License-Identifier: Apache-2.0 */
/* private.h -- where a private mapping of a file holds copies of its own. */
#ifndef CC_PRIVATE_H
#define CC_PRIVATE_H

#include <stdbool.h>
#include <stdint.h>

#include "pagemap.h"

#define CC_PRIVATE_REGIONS 256 /* of one scan */

/* Addresses of a stretch of private pages; not 0 ends the walk. */
typedef int cc_private_run_fn(void *context, uint64_t start, uint64_t end);

/* Walks the private pages of [addr, addr + len_bytes) of process `pid`, 0 for this one.  0, what `run` said, E_ARGUMENT, -errno. */
int cc_private_runs(int pid, const void *addr, uint64_t len_bytes, cc_private_run_fn *run, void *context);

int cc_private_check_range(const void *addr, uint64_t len_bytes); /* whole pages?  0, E_ARGUMENT */
int cc_private_open(int pid);                                     /* its pagemap, 0 for this process'; or -errno */
/* The next stretches of present or swapped pages from *at on, with the categories that matter here; moves *at to where the scan ended.
 * How many; -ENOTTY: this kernel has no PAGEMAP_SCAN; -errno. */
int cc_private_scan(int pagemap, uint64_t *at, uint64_t end, struct cc_page_region regions[CC_PRIVATE_REGIONS]);

static inline bool cc_is_private(const struct cc_page_region *region)
{
    return !(region->categories & CC_PAGE_IS_FILE);
}

#endif
