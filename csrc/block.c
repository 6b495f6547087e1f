/* SPDX-License-Identifier: Apache-2.0 */
/*
 * block.c -- a RAM block: what may be one, its entry and its bitmaps in the control region, its two images (image.c); bounds of pages.
 */
#include "internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap.h"
#include "block.h"
#include "bounds.h"
#include "checksum.h"
#include "error.h"
#include "forget.h"
#include "image.h"
#include "map.h"
#include "sparse.h"
#include "spill.h"
#include "staging.h"

int cc_block_get(struct colocache *cc, uint32_t index, struct cc_block **out)
{
    const uint32_t n_blocks = cc ? cc_observe32(&cc->n_blocks) : 0; /* any thread: one may be added just now */
    if (index >= n_blocks)
        return cc_fail(COLOCACHE_E_BLOCK, "there is no block %u, there are %u", index, n_blocks);
    *out = &cc->blocks[index];
    return cc_block_still_here(*out);
}

int cc_block_still_here(const struct cc_block *block)
{
    return cc_gone(block) ? cc_fail(COLOCACHE_E_BLOCK, "block %s was removed, and an epoch without it is sealed", block->name) : 0;
}

int cc_block_range(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    return cc_bounds_range(block->name, block->n_pages, first_pfn, n_pages);
}

/* ---- checking what the caller gives ----------------------------------------------------------------------------- */

/* check_bounded -- what bounded memory needs: a file that a VM can map privately, in pages that are cheap to copy */
static int check_bounded(const struct colocache_images *images, const struct cc_block_plan *plan)
{
    const char *name = images->name;
    const struct cc_block_entry *entry = &plan->entry;
    const uint64_t granule = plan->guest_granule > plan->cache_granule ? plan->guest_granule : plan->cache_granule;
    if (images->guest_fd < 0)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "block %s is given by address: bounded memory needs descriptors of both images", name);
    if (images->flags & COLOCACHE_IMAGES_SHARED_ELSEWHERE)
        return cc_fail(COLOCACHE_E_UNSUPPORTED,
                       "block %s is mapped by another process or device: with bounded memory that would write the epoch "
                       "itself, use memory mode mirror",
                       name);
    if (granule != CC_PAGE)
        return cc_fail(COLOCACHE_E_UNSUPPORTED,
                       "block %s is on hugetlb: a private copy of a page would take %llu bytes, use 4 KiB or transparent "
                       "huge pages for bounded memory",
                       name, (unsigned long long)granule);
    if (entry->guest.device == entry->cache.device && entry->guest.inode == entry->cache.inode)
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: with bounded memory the cache needs a file of its own", name);
    return 0;
}

static int check_images(const struct colocache_images *images)
{
    int rc = cc_bounds_name(images->name);
    if (rc == 0)
        rc = cc_bounds_block(images->name, images->len_bytes, images->page_size);
    if (rc)
        return rc;
    bool by_address = images->guest_fd < 0 && images->cache_fd < 0;
    if (!by_address && (images->guest_fd < 0 || images->cache_fd < 0))
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: give both images by descriptor or both by address", images->name);
    if (by_address && (!images->guest_addr || !images->cache_addr || images->sparse))
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s by address needs guest_addr and cache_addr and can't be sparse", images->name);
    if (!by_address && images->cache_addr)
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: cache_addr is only for blocks by address alone, which have both descriptors -1",
                       images->name);
    if ((uintptr_t)images->guest_addr % CC_PAGE || (uintptr_t)images->cache_addr % CC_PAGE)
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: addresses must be multiples of %u", images->name, CC_PAGE);
    return 0;
}

/* ---- bitmaps of a block in the control region ------------------------------------------------------------------------ */

uint64_t cc_block_bitmap_bytes(uint64_t n_pages)
{
    uint64_t n_words = cc_words_for(n_pages);
    return CC_BITMAPS * (cc_round_to_page(n_words * 8) + cc_round_to_page(cc_words_for(n_words) * 8));
}

uint64_t cc_block_words_offset(uint64_t n_pages, uint32_t kind)
{
    return kind * cc_round_to_page(cc_words_for(n_pages) * 8);
}

void cc_block_bind_bitmaps(struct cc_bitmap bitmaps[CC_BITMAPS], void *map, uint64_t n_pages)
{
    uint64_t summary_bytes = cc_round_to_page(cc_words_for(cc_words_for(n_pages)) * 8);
    uint8_t *words = map, *summaries = words + cc_block_words_offset(n_pages, CC_BITMAPS);
    for (uint32_t kind = 0; kind < CC_BITMAPS; kind++)
        cc_bitmap_init(&bitmaps[kind], (uint64_t *)(void *)(words + cc_block_words_offset(n_pages, kind)),
                       (uint64_t *)(void *)(summaries + kind * summary_bytes), n_pages);
}

uint64_t cc_block_checksum(const struct cc_block_entry *entry)
{
    return cc_checksum(entry, offsetof(struct cc_block_entry, checksum));
}

/* check_entry -- does it make sense by itself, and do its bitmaps lie at `offset`, where those before it end? */
static int check_entry(const struct cc_block_entry *entry, uint64_t offset, uint64_t file_bytes)
{
    if (strnlen(entry->name, COLOCACHE_NAME_BYTES) == COLOCACHE_NAME_BYTES || !entry->name[0])
        return cc_fail(COLOCACHE_E_CORRUPT, "a block in the control region has no proper name");
    if (entry->checksum != cc_block_checksum(entry))
        return cc_fail(COLOCACHE_E_CORRUPT, "block %s: its entry in the control region does not fit its checksum", entry->name);
    if (cc_bounds_block(entry->name, entry->len_bytes, entry->page_size))
        return COLOCACHE_E_CORRUPT; /* the sentence has been left */
    uint64_t expected = cc_block_bitmap_bytes(entry->len_bytes / entry->page_size);
    bool fits =
        entry->bitmap_offset == offset && entry->bitmap_bytes == expected && offset <= file_bytes && expected <= file_bytes - offset;
    uint64_t reserved = entry->sparse > 1;
    for (size_t i = 0; i < sizeof entry->reserved / sizeof *entry->reserved; i++)
        reserved |= entry->reserved[i];
    if (!fits || reserved)
        return cc_fail(COLOCACHE_E_CORRUPT, "block %s: its entry in the control region does not fit the region", entry->name);
    return 0;
}

int cc_block_check_table(const struct cc_block_entry *table, uint64_t n_blocks, uint64_t offset, uint64_t file_bytes, uint64_t *end_out)
{
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < n_blocks; i++) {
        rc = check_entry(&table[i], offset, file_bytes);
        offset += table[i].bitmap_bytes;
    }
    *end_out = offset;
    return rc;
}

/* ---- from an entry and the caller's images to a block ------------------------------------------------------------------ */

/* check_mappings -- of the caller: the VM's writes must reach the file, and nothing that the library touches may be missing */
static int check_mappings(const struct colocache_images *images, bool bounded)
{
    char what[COLOCACHE_NAME_BYTES + 32];
    int rc = 0;
    if (images->guest_addr) {
        snprintf(what, sizeof what, "block %s: guest_addr", images->name);
        rc = cc_map_check(what, images->guest_addr, images->len_bytes, images->guest_fd, images->guest_offset, !bounded);
    }
    if (rc == 0 && images->cache_addr) {
        snprintf(what, sizeof what, "block %s: cache_addr", images->name);
        rc = cc_map_check(what, images->cache_addr, images->len_bytes, images->cache_fd, images->cache_offset, true);
    }
    return rc;
}

/* reserve -- whatever is not sparse is there from now on, in the cache of bounded memory nothing */
static int reserve(const struct colocache *cc, const struct colocache_images *images, const struct cc_block_plan *plan)
{
    if (plan->entry.sparse)
        return 0;
    int rc = cc_image_reserve(images->guest_fd, images->guest_offset, images->len_bytes, plan->guest_granule, images->name);
    if (rc == 0 && !cc->bounded)
        rc = cc_image_reserve(images->cache_fd, images->cache_offset, images->len_bytes, plan->cache_granule, images->name);
    return rc;
}

int cc_block_build(struct colocache *cc, uint32_t index, const struct colocache_images *images, const struct cc_block_plan *plan)
{
    struct cc_block *block = &cc->blocks[index];
    const struct cc_block_entry *entry = &plan->entry;
    memset(block, 0, sizeof *block);
    block->guest.fd = block->cache.fd = -1;
    memcpy(block->name, entry->name, sizeof block->name);
    block->len_bytes = entry->len_bytes;
    block->page_size = entry->page_size;
    block->page_shift = (uint32_t)__builtin_ctz(entry->page_size);
    block->n_pages = entry->len_bytes / entry->page_size;
    block->sparse = entry->sparse;

    int rc = cc->bounded ? check_bounded(images, plan) : 0;
    if (rc == 0)
        rc = reserve(cc, images, plan);
    if (rc == 0)
        rc = check_mappings(images, cc->bounded);
    if (rc)
        return rc;
    rc = cc_image_open(&block->guest, images->guest_fd, images->guest_offset, block->len_bytes, plan->guest_granule, images->guest_addr,
                       cc->bounded);
    if (rc == 0)
        rc = cc_image_open(&block->cache, images->cache_fd, images->cache_offset, block->len_bytes, plan->cache_granule, images->cache_addr,
                           false);
    if (rc == 0 && block->sparse) {
        block->allocated = calloc(2 * cc_words_for(block->n_pages), 8);
        if (!block->allocated)
            rc = cc_fail(-ENOMEM, "no memory for the page table of sparse block %s", block->name);
        else
            block->punched = block->allocated + cc_words_for(block->n_pages);
        bool guest_can = false, cache_can = false;
        if (rc == 0)
            rc = cc_sparse_can_punch(&block->guest, &guest_can);
        if (rc == 0)
            rc = cc_sparse_can_punch(&block->cache, &cache_can);
        block->keeps_holes = rc == 0 && guest_can && cache_can;
    }
    if (rc == 0 && cc->bounded)
        rc = cc_staging_open(block);
    if (rc == 0)
        rc = cc_spill_open_block(cc, index);
    if (rc == 0) /* on attach as well: nothing is touched through a mapping that has a hole, on a full file system it is a SIGBUS */
        rc = cc_map_reserve(cc->region.fd, entry->bitmap_offset, entry->bitmap_bytes, "the bitmaps in the control region");
    if (rc == 0)
        rc = cc_map_file(cc->region.fd, entry->bitmap_offset, entry->bitmap_bytes, true, &block->bitmap_map);
    if (rc) {
        cc_block_release(block);
        return rc;
    }
    block->bitmap_map_bytes = entry->bitmap_bytes;
    cc_block_bind_bitmaps(block->bitmaps, block->bitmap_map, block->n_pages);
    return 0;
}

void cc_block_let_go(struct cc_block *block)
{
    cc_unmap(block->bitmap_map, block->bitmap_map_bytes);
    cc_forget_drop(&block->forget);
    cc_image_close(&block->guest);
    cc_image_close(&block->cache);
    free(block->allocated);
    cc_staging_close(block);
    cc_spill_close_block(block);
    block->guest = block->cache = (struct cc_image){.fd = -1};
    memset(block->bitmaps, 0, sizeof block->bitmaps);
    block->bitmap_map = NULL;
    block->allocated = block->punched = block->staged_words = NULL;
    block->keeps_holes = false;
    block->staged = NULL;
}

void cc_block_release(struct cc_block *block)
{
    cc_block_let_go(block);
    memset(block, 0, sizeof *block);
    block->guest.fd = block->cache.fd = -1;
}

void cc_block_was_removed(struct cc_block *block, const struct cc_block_entry *entry)
{
    memcpy(block->name, entry->name, sizeof block->name); /* for a sentence */
    block->guest.fd = block->cache.fd = -1;
    block->standing = CC_GONE;
}

bool cc_block_overlap(const struct cc_image_identity *a, uint64_t a_bytes, const struct cc_image_identity *b, uint64_t b_bytes)
{
    return a->device == b->device && a->inode == b->inode && a->offset < b->offset + b_bytes && b->offset < a->offset + a_bytes;
}

int cc_block_identify(const struct colocache_images *images, struct cc_block_plan *plan)
{
    int rc = check_images(images);
    if (rc)
        return rc;
    *plan = (struct cc_block_plan){.guest_granule = CC_PAGE, .cache_granule = CC_PAGE};
    struct cc_block_entry *entry = &plan->entry;
    strcpy(entry->name, images->name); /* its length was checked */
    entry->len_bytes = images->len_bytes;
    entry->page_size = images->page_size;
    entry->sparse = images->sparse != 0;
    if (images->guest_fd < 0)
        return 0;
    rc = cc_image_identify(images->name, images->guest_fd, images->guest_offset, images->len_bytes, &entry->guest, &plan->guest_granule);
    if (rc == 0)
        rc =
            cc_image_identify(images->name, images->cache_fd, images->cache_offset, images->len_bytes, &entry->cache, &plan->cache_granule);
    if (rc == 0 && cc_block_overlap(&entry->guest, images->len_bytes, &entry->cache, images->len_bytes))
        rc = cc_fail(COLOCACHE_E_ARGUMENT, "block %s: guest RAM and cache are the same memory", images->name);
    return rc;
}

/* cc_block_reattach -- block `index` of an existing region, with the images it names and no others */
int cc_block_reattach(struct colocache *cc, uint32_t index, const struct colocache_images *images)
{
    struct cc_block_plan plan;
    const struct cc_block_entry *entry = &cc->region.table[index];
    int rc = cc_block_identify(images, &plan);
    if (rc)
        return rc;
    if (images->guest_fd < 0)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "block %s was given by address: such memory dies with its process", entry->name);
    if (images->len_bytes != entry->len_bytes || images->page_size != entry->page_size)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "block %s has %llu bytes in pages of %u in the region, %llu in pages of %u were given",
                       entry->name, (unsigned long long)entry->len_bytes, entry->page_size, (unsigned long long)images->len_bytes,
                       images->page_size);
    const bool same_guest = memcmp(&plan.entry.guest, &entry->guest, sizeof entry->guest) == 0;
    if (!same_guest || memcmp(&plan.entry.cache, &entry->cache, sizeof entry->cache) != 0)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "block %s: the %s image is not the one this control region was made with", entry->name,
                       same_guest ? "cache" : "guest RAM");
    plan.entry = *entry;
    return cc_block_build(cc, index, images, &plan);
}
