/* SPDX-License-Identifier: Apache-2.0 */
#include "internal.h"
#include "sparse.h"

#include <errno.h>
#include <unistd.h>

#include "map.h"
#include "page_copy.h"

#define WINDOW (2u << 20) /* of a stretch; a multiple of every page size */

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

/* has_bytes -- any that is not zero in [at, at + n_bytes)?  A hole reads as zeros and stays one. */
static bool has_bytes(const struct cc_image *image, uint64_t at, uint64_t n_bytes)
{
    uint8_t part[16384];
    for (uint64_t done = 0; done < n_bytes; done += sizeof part) {
        const uint64_t n = n_bytes - done < sizeof part ? n_bytes - done : sizeof part;
        if (pread(image->fd, part, n, (off_t)(image->offset + at + done)) != (ssize_t)n || !cc_is_zero(part, n))
            return true; /* what can't be read counts as data: it is looked at through the mapping, as everything else */
    }
    return false;
}

/* next_bytes -- hugetlbfs does not tell where its holes are, so the bytes themselves are looked at.  Pages that are zero in both images
 * are the same whether they are there or not. */
static bool next_bytes(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    for (uint64_t at = from, n; at < block->len_bytes; at += n) {
        n = WINDOW - at % WINDOW;
        n = block->len_bytes - at < n ? block->len_bytes - at : n;
        if (has_bytes(&block->guest, at, n) || has_bytes(&block->cache, at, n)) {
            *first = at;
            *n_bytes = n;
            return true;
        }
    }
    return false;
}

bool cc_sparse_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    if (from >= block->len_bytes)
        return false;
    if (block->sparse && (block->guest.granule != CC_PAGE || block->cache.granule != CC_PAGE))
        return next_bytes(block, from, first, n_bytes);
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
    *n_bytes = end - start < WINDOW ? end - start : WINDOW;
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
