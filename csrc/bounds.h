/* SPDX-License-Identifier: Apache-2.0 */
/* bounds.h -- bounds that both halves of a pair check, each in one place.  The numbers are in colocache.h. */
#ifndef CC_BOUNDS_H
#define CC_BOUNDS_H

#include <stdint.h>

/* A block's name (1 to COLOCACHE_NAME_BYTES-1 bytes): 0 or E_BLOCK. */
int cc_bounds_name(const char *name);
/* A block's length and page size: 0 or E_LENGTH. */
int cc_bounds_block(const char *name, uint64_t len_bytes, uint32_t page_size);
/* 1 to COLOCACHE_EPOCH_MAX: 0 or E_EPOCH. */
int cc_bounds_epoch(uint64_t epoch);
/* Pages [first_pfn, +n_pages) of a block that has block_pages: 0 or E_RANGE. */
int cc_bounds_range(const char *name, uint64_t block_pages, uint64_t first_pfn, uint64_t n_pages);

#endif
