/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sparse.h -- the two images of a block that is not reserved: which of its pages are there.
 *
 * Reading a hole through a mapping allocates it, and on a full machine that is a SIGBUS.  So pages are allocated before
 * anything touches them through a mapping, and holes are found by asking the file.  For other blocks all is there and both cost nothing.
 */
#ifndef CC_SPARSE_H
#define CC_SPARSE_H

#include <stdbool.h>
#include <stdint.h>

struct cc_block;

/* Both images of these pages; known ones cost one bit test.  0, E_NO_MEMORY, -errno. */
int cc_sparse_allocate(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
/* The next stretch (at most 2 MiB, whole pages) from byte `from` on in which guest RAM or cache holds data; false if there is none.  What
 * is left out is zero in both. */
bool cc_sparse_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes);
/* The next stretch (whole pages) from byte `from` on in which the cache holds data; false if none. */
bool cc_sparse_next_staged(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes);

#endif
