/* SPDX-License-Identifier: Apache-2.0 */
#include "bounds.h"

#include <string.h>

#include "colocache.h"
#include "error.h"

int cc_bounds_name(const char *name)
{
    if (!name || !*name || strnlen(name, COLOCACHE_NAME_BYTES) == COLOCACHE_NAME_BYTES)
        return cc_fail(COLOCACHE_E_BLOCK, "a block's name must have 1 to %d bytes", COLOCACHE_NAME_BYTES - 1);
    return 0;
}

int cc_bounds_block(const char *name, uint64_t len_bytes, uint32_t page_size)
{
    if (page_size < COLOCACHE_PAGE_SIZE_MIN || page_size > COLOCACHE_PAGE_SIZE_MAX || (page_size & (page_size - 1)))
        return cc_fail(COLOCACHE_E_LENGTH, "block %s has page size %u: it must be a power of two from %u to %u", name, page_size,
                       COLOCACHE_PAGE_SIZE_MIN, COLOCACHE_PAGE_SIZE_MAX);
    if (len_bytes == 0 || len_bytes % page_size || len_bytes > COLOCACHE_BLOCK_BYTES_MAX)
        return cc_fail(COLOCACHE_E_LENGTH, "block %s is %llu bytes: it must be a positive multiple of its page size %u, at most %llu", name,
                       (unsigned long long)len_bytes, page_size, (unsigned long long)COLOCACHE_BLOCK_BYTES_MAX);
    return 0;
}

int cc_bounds_epoch(uint64_t epoch)
{
    if (epoch == 0 || epoch > COLOCACHE_EPOCH_MAX)
        return cc_fail(COLOCACHE_E_EPOCH, "there is no epoch %llu: they go from 1 to %llu", (unsigned long long)epoch,
                       (unsigned long long)COLOCACHE_EPOCH_MAX);
    return 0;
}

int cc_bounds_range(const char *name, uint64_t block_pages, uint64_t first_pfn, uint64_t n_pages)
{
    if (first_pfn >= block_pages || n_pages > block_pages - first_pfn) /* no sum that could overflow */
        return cc_fail(COLOCACHE_E_RANGE, "pages %llu+%llu lie past the end of block %s, which has %llu", (unsigned long long)first_pfn,
                       (unsigned long long)n_pages, name, (unsigned long long)block_pages);
    return 0;
}
