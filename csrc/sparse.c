/* SPDX-License-Identifier: Apache-2.0 */
#include "internal.h"
#include "sparse.h"

#include <errno.h>
#include <unistd.h>

#include "map.h"

int cc_sparse_allocate(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    if (!block->sparse)
        return 0;
    for (uint64_t pfn = first_pfn; pfn < first_pfn + n_pages; pfn++) {
        uint64_t bit = 1ull << (pfn % 64);
        if (cc_observe(&block->allocated[pfn / 64]) & bit)
            continue;
        for (int i = 0; i < (block->staged ? 1 : 2); i++) { /* a staged page gets its memory with its bytes */
            const struct cc_image *image = i ? &block->cache : &block->guest;
            uint64_t begin = (pfn << block->page_shift) / image->granule * image->granule;
            uint64_t bytes = block->page_size > image->granule ? block->page_size : image->granule;
            int rc = cc_map_reserve(image->fd, image->offset + begin, bytes, block->name);
            if (rc)
                return rc;
        }
        cc_set_bits(&block->allocated[pfn / 64], bit);
    }
    return 0;
}

static uint64_t next_data(const struct cc_image *image, uint64_t from, uint64_t len_bytes)
{
    off_t at = lseek(image->fd, (off_t)(image->offset + from), SEEK_DATA);
    if (at < 0)
        return errno == ENXIO ? len_bytes : from; /* ENXIO: only a hole is left; else the file system can't tell: all is data */
    uint64_t data = (uint64_t)at - image->offset;
    return data < len_bytes ? data : len_bytes;
}

static uint64_t next_hole(const struct cc_image *image, uint64_t from, uint64_t len_bytes)
{
    off_t at = lseek(image->fd, (off_t)(image->offset + from), SEEK_HOLE);
    uint64_t hole = at < 0 ? len_bytes : (uint64_t)at - image->offset;
    return hole < len_bytes ? hole : len_bytes;
}

bool cc_sparse_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    const uint64_t window = 2u << 20;
    if (from >= block->len_bytes)
        return false;
    uint64_t start = from, end = block->len_bytes;
    if (block->sparse) {
        uint64_t guest = next_data(&block->guest, from, block->len_bytes), cache = next_data(&block->cache, from, block->len_bytes);
        start = guest < cache ? guest : cache;
        if (start >= block->len_bytes)
            return false;
        uint64_t guest_end = guest == start ? next_hole(&block->guest, start, block->len_bytes) : 0;
        uint64_t cache_end = cache == start ? next_hole(&block->cache, start, block->len_bytes) : 0;
        end = guest_end > cache_end ? guest_end : cache_end;
        end = (end + block->page_size - 1) / block->page_size * block->page_size;
        start -= start % block->page_size;
    }
    *first = start;
    *n_bytes = end - start < window ? end - start : window;
    return true;
}

bool cc_sparse_next_staged(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    uint64_t start = from < block->len_bytes ? next_data(&block->cache, from, block->len_bytes) : block->len_bytes;
    if (start >= block->len_bytes)
        return false;
    uint64_t end = next_hole(&block->cache, start, block->len_bytes);
    *first = start - start % block->page_size;
    *n_bytes = (end + block->page_size - 1) / block->page_size * block->page_size - *first;
    return true;
}
