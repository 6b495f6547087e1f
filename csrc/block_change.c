/* SPDX-License-Identifier: Apache-2.0 */
/*
 * block_change.c -- RAM blocks that come and go, while epochs do.
 *
 *   add     bitmaps at the end of the region | entry | COUNT | receiving threads may name it
 *   remove  leaving | seal: flush sets without it | record without it | COMMIT WORD | gone | flush, load | its memory is let go
 *
 * A death before the count leaves a region without the block, as it was.  No epoch that was sealed has it: both its images are zeros, and a
 * VM that restarts from such an epoch does not know it.  Nobody adds while an epoch is sealed and not flushed: the record's checksum is
 * over the flush sets of the blocks that it knew.
 *
 * That a block is leaving stands in this process only.  A death before the commit word, or an epoch that is aborted, leaves it as it was: the
 * epoch before has it, and its cache was never touched for going.  From the commit word on the record says that it is none of the region's.
 * Its place in the table is never used again, so neither a packet that comes late nor a bitmap can mean another block.
 */
#include "internal.h"

#include <string.h>
#include <unistd.h>

#include "bitmap.h"
#include "block.h"
#include "commit.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "sparse.h"
#include "staging.h"
#include "version.h"
#include "word.h"

/* check_disjoint -- no byte of the new block's images is a byte of another block's: each would be the other's damage */
static int check_disjoint(const struct colocache *cc, const struct cc_block_entry *entry)
{
    const struct cc_image_identity *ours[] = {&entry->guest, &entry->cache};
    for (uint32_t i = 0; i < cc->n_blocks && entry->guest.inode; i++) {
        const struct cc_block_entry *other = &cc->region.table[i];
        if (cc_gone(&cc->blocks[i]))
            continue;
        for (int k = 0; k < 2; k++) {
            if (cc_block_overlap(ours[k], entry->len_bytes, &other->guest, other->len_bytes) ||
                cc_block_overlap(ours[k], entry->len_bytes, &other->cache, other->len_bytes))
                return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: its %s is memory of block %s", entry->name, k ? "cache" : "guest RAM",
                               other->name);
        }
    }
    return 0;
}

/* check_new -- its name and its memory are no other block's */
static int check_new(const struct colocache *cc, const struct cc_block_entry *entry)
{
    if (cc->n_blocks == COLOCACHE_BLOCKS_MAX)
        return cc_fail(COLOCACHE_E_BLOCK, "there are %d blocks already, removed ones included, the most that a region can have",
                       COLOCACHE_BLOCKS_MAX);
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]) && strcmp(cc->blocks[i].name, entry->name) == 0)
            return cc_fail(COLOCACHE_E_BLOCK, "there is a block %s already", entry->name);
    }
    return check_disjoint(cc, entry);
}

/* enlarge -- room for the bitmaps of one more block, all of them zero: an add that was killed before its block counted may have left bits
 * there, so what lies behind the blocks there are is cut off first */
static int enlarge(struct colocache *cc, const struct cc_block_entry *entry)
{
    if (ftruncate(cc->region.fd, (off_t)entry->bitmap_offset) != 0)
        return cc_fail_errno("cutting off what an unfinished block left in the control region");
    CC_CRASH_POINT("add_block: the region ends with its blocks");
    if (ftruncate(cc->region.fd, (off_t)(entry->bitmap_offset + entry->bitmap_bytes)) != 0)
        return cc_fail_errno("enlarging the control region");
    CC_CRASH_POINT("add_block: the region is larger");
    return 0;
}

/* count_as_written -- a block that comes when epochs are sealed already is in none of them.  Whatever is in its guest RAM (memory that the
 * VM has seen, firmware that a VMM put there), the next flush makes it what the primary sends. */
static void count_as_written(struct cc_block *block)
{
    uint64_t at = 0, first, n_bytes;
    while (cc_sparse_next_data(block, at, &first, &n_bytes)) { /* holes in both images are equal, and stay holes */
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_SVM], first >> block->page_shift, n_bytes >> block->page_shift);
        at = first + n_bytes;
    }
    CC_CRASH_POINT("add_block: its pages count as written");
}

static int add(struct colocache *cc, const struct colocache_images *images)
{
    struct cc_block_plan plan;
    struct cc_block_entry *entry = &plan.entry;
    struct cc_block *block = &cc->blocks[cc->n_blocks];
    int rc = cc_block_identify(images, &plan);
    if (rc == 0)
        rc = check_new(cc, entry);
    if (rc)
        return rc;
    entry->bitmap_offset = cc->region.end_bytes;
    entry->bitmap_bytes = cc_block_bitmap_bytes(entry->len_bytes / entry->page_size);
    entry->checksum = cc_block_checksum(entry);
    rc = enlarge(cc, entry);
    if (rc == 0)
        rc = cc_block_build(cc, cc->n_blocks, images, &plan);
    if (rc == 0 && cc->bounded) {
        rc = cc_staging_empty_one(block); /* what was allocated, perhaps: memory comes with the pages */
        if (rc)
            cc_block_release(block);
    }
    if (rc) { /* as before the call */
        if (ftruncate(cc->region.fd, (off_t)entry->bitmap_offset) != 0)
            cc_log(cc, COLOCACHE_LOG_WARN, "could not shrink the control region after an error");
        return rc;
    }
    if (!cc->bounded && cc_peek(&cc->region.control->commit_word))
        count_as_written(block);
    CC_CRASH_POINT("add_block: before the entry");
    CC_HALF(&cc->region.table[cc->n_blocks], entry, sizeof *entry, "add_block: half an entry");
    cc->region.table[cc->n_blocks] = *entry;
    CC_CRASH_POINT("add_block: after the entry");
    cc_poke(&cc->region.end_bytes, entry->bitmap_offset + entry->bitmap_bytes);
    cc_word_publish(&cc->region.control->n_blocks, cc->n_blocks + 1);
    CC_CRASH_POINT("add_block: after the count");
    cc_publish32(&cc->n_blocks, cc->n_blocks + 1); /* receiving threads may name it now: it is in the region */
    if (images->guest_fd < 0)
        cc_log(cc, COLOCACHE_LOG_WARN,
               "block %s is given by address: its memory dies with this process, and nobody can attach to this region then", images->name);
    return 0;
}

/* check_state -- a new block's pages may come into the epoch that is open, and a removed one's as well; of an epoch that is sealed the
 * record says which flush sets there are */
static int check_state(const struct colocache *cc)
{
    switch (cc_epoch_state(cc)) {
    case CC_SEALED:
    case CC_SEALED_ASKED:
    case CC_RUNNING:
        return cc_fail(COLOCACHE_E_SEALED, "blocks can't come or go while an epoch is flushed or loaded: call flush and loaded first");
    case CC_LOAD_FAILED:
        return cc_fail(COLOCACHE_E_LOAD_FAILED, "blocks can't come or go any more: a device state did not load, attach with a fresh VM");
    case CC_TAKING_OVER:
    case CC_FAILED_OVER:
        return cc_fail(COLOCACHE_E_FAILED_OVER, "blocks can't come or go any more: this secondary took over");
    default:
        return 0; /* claimed: another thread aborts, as seals come from this one */
    }
}

int colocache_add_block(struct colocache *cc, const struct colocache_images *images, uint32_t *block_out)
{
    struct colocache_images given;
    int rc = cc_take_struct(&given, sizeof given, images, COLOCACHE_IMAGES_LEAST, "images");
    if (rc)
        return rc;
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    rc = check_state(cc);
    if (rc == 0)
        rc = add(cc, &given);
    if (rc == 0 && block_out)
        *block_out = cc->n_blocks - 1;
    return rc;
}

int colocache_remove_block(struct colocache *cc, uint32_t index)
{
    struct cc_block *block;
    int rc = cc_block_get(cc, index, &block);
    if (rc == 0)
        rc = check_state(cc);
    if (rc == 0)
        cc_publish32(&block->standing, CC_LEAVING);
    return rc;
}

int colocache_block_sealed(struct colocache *cc, uint32_t index)
{
    struct cc_block *block;
    struct cc_record record;
    int rc = cc_block_get(cc, index, &block);
    if (rc == 0)
        rc = cc_commit_read(cc->region.control, &record);
    return rc < 0 ? rc : index < record.n_blocks;
}

void cc_blocks_sealed(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (cc->blocks[i].standing == CC_LEAVING)
            cc_publish32(&cc->blocks[i].standing, CC_GONE);
    }
}

void cc_blocks_let_go(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]) || !cc->blocks[i].bitmap_map)
            continue;
        pthread_mutex_lock(&cc->walking); /* a thread that began to walk over all blocks before the seal may be at this one */
        cc_block_let_go(&cc->blocks[i]);
        pthread_mutex_unlock(&cc->walking);
    }
}
