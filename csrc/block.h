/* SPDX-License-Identifier: Apache-2.0 */
/* block.h -- RAM blocks of a handle: from an index to a block, from a page to its bytes, with bounds. */
#ifndef CC_BLOCK_H
#define CC_BLOCK_H

#include <stddef.h>

#include "internal.h"

#define COLOCACHE_IMAGES_LEAST offsetof(struct colocache_images, flags) /* what the first callers gave */

/* A new block: its bitmaps at the end of the region, then its entry, then the count that publishes it. */
int cc_block_add(struct colocache *cc, const struct colocache_images *images);
/* Block `index` of an existing region, with the images it names and no others. */
int cc_block_reattach(struct colocache *cc, uint32_t index, const struct colocache_images *images);
void cc_block_release(struct cc_block *block);
/* Do the entries make sense, with their bitmaps one after the other from `offset` on in a file of file_bytes?  0 or E_CORRUPT. */
int cc_block_check_table(const struct cc_block_entry *table, uint64_t n_blocks, uint64_t offset, uint64_t file_bytes, uint64_t *end_out);
/* Where the words of one bitmap lie in a block's bitmaps of the region. */
uint64_t cc_block_words_offset(uint64_t n_pages, uint32_t kind);
void cc_block_bind_bitmaps(struct cc_bitmap bitmaps[CC_BITMAPS], void *map, uint64_t n_pages);
int cc_block_get(struct colocache *cc, uint32_t index, struct cc_block **out);          /* E_BLOCK */
int cc_block_range(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages); /* E_RANGE */

static inline uint8_t *cc_guest_page(const struct cc_block *block, uint64_t pfn)
{
    return block->guest.addr + (pfn << block->page_shift);
}

static inline uint8_t *cc_cache_page(const struct cc_block *block, uint64_t pfn)
{
    return block->cache.addr + (pfn << block->page_shift);
}

#endif
