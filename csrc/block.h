/* SPDX-License-Identifier: Apache-2.0 */
/* block.h -- RAM blocks of a handle: from an index to a block, from a page to its bytes, with bounds. */
#ifndef CC_BLOCK_H
#define CC_BLOCK_H

#include <stddef.h>

#include "internal.h"

#define COLOCACHE_IMAGES_LEAST offsetof(struct colocache_images, flags) /* what the first callers gave */

/* What images a caller gave, as an entry; the allocation units of their files. */
struct cc_block_plan {
    struct cc_block_entry entry;
    uint64_t guest_granule, cache_granule;
};

/* Are these images that a block can have?  The entry without its bitmaps. */
int cc_block_identify(const struct colocache_images *images, struct cc_block_plan *plan);
/* Everything of block `index` but its entry in the region; on error what was made is given back. */
int cc_block_build(struct colocache *cc, uint32_t index, const struct colocache_images *images, const struct cc_block_plan *plan);
bool cc_block_overlap(const struct cc_image_identity *a, uint64_t a_bytes, const struct cc_image_identity *b, uint64_t b_bytes);
uint64_t cc_block_bitmap_bytes(uint64_t n_pages); /* of the six parts together */
uint64_t cc_block_checksum(const struct cc_block_entry *entry);
/* Block `index` of an existing region, with the images it names and no others. */
int cc_block_reattach(struct colocache *cc, uint32_t index, const struct colocache_images *images);
void cc_block_release(struct cc_block *block);
/* Its memory and descriptors; who it was is known still, to threads that come late. */
void cc_block_let_go(struct cc_block *block);
/* Attach: an entry of the table that is no block any more. */
void cc_block_was_removed(struct cc_block *block, const struct cc_block_entry *entry);
/* Do the entries make sense, with their bitmaps one after the other from `offset` on in a file of file_bytes?  0 or E_CORRUPT. */
int cc_block_check_table(const struct cc_block_entry *table, uint64_t n_blocks, uint64_t offset, uint64_t file_bytes, uint64_t *end_out);
/* Where the words of one bitmap lie in a block's bitmaps of the region. */
uint64_t cc_block_words_offset(uint64_t n_pages, uint32_t kind);
void cc_block_bind_bitmaps(struct cc_bitmap bitmaps[CC_BITMAPS], void *map, uint64_t n_pages);
int cc_block_get(struct colocache *cc, uint32_t index, struct cc_block **out); /* E_BLOCK */
int cc_block_still_here(const struct cc_block *block);                         /* inside a gate it then stays.  E_BLOCK */
/* block_change.c, seal: the commit word is stored, both gates are closed; what the record leaves out is gone. */
void cc_blocks_sealed(struct colocache *cc);
/* After the flush and the load: what is gone is mapped no longer. */
void cc_blocks_let_go(struct colocache *cc);
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
