/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sender.c -- the primary's half: what must still be sent, and what is not acknowledged.
 *
 * A page taken from the dirty log goes into `unacked` and `pending` before it is read.  `pending` loses a bit when the page is about to be
 * read for sending; `unacked` loses bits only when the peer has sealed.  So an abort or a lost connection costs a resend of
 * unacked, never a page.  Both live in this process: a primary that dies takes its whole half with it.
 */
#include "sender.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "atomics.h"
#include "bitmap.h"
#include "bounds.h"
#include "error.h"
#include "source.h"

int colocache_sender_create(struct colocache_sender **out)
{
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    *out = calloc(1, sizeof **out);
    return *out ? 0 : cc_fail(-ENOMEM, "no memory for a sender");
}

int colocache_sender_close(struct colocache_sender *sender)
{
    for (uint32_t i = 0; sender && i < sender->n_blocks; i++)
        free(sender->blocks[i].memory);
    free(sender);
    return 0;
}

int colocache_sender_add_block(struct colocache_sender *sender, const char *name, const void *addr, uint64_t len_bytes, uint32_t page_size,
                               uint32_t *block_out)
{
    if (!sender || !addr)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender or the block's address is NULL");
    if (cc_bounds_name(name))
        return COLOCACHE_E_ARGUMENT; /* the sentence has been left */
    if (sender->n_blocks == COLOCACHE_BLOCKS_MAX)
        return cc_fail(COLOCACHE_E_BLOCK, "there are %d blocks already, removed ones included, the most there can be",
                       COLOCACHE_BLOCKS_MAX);
    for (uint32_t i = 0; i < sender->n_blocks; i++) {
        if (!cc_sender_gone(&sender->blocks[i]) && strcmp(sender->blocks[i].name, name) == 0)
            return cc_fail(COLOCACHE_E_BLOCK, "there is a block %s already", name);
    }
    int rc = cc_bounds_block(name, len_bytes, page_size);
    if (rc)
        return rc;
    struct cc_sender_block *block = &sender->blocks[sender->n_blocks];
    uint64_t n_pages = len_bytes / page_size, n_words = cc_words_for(n_pages), n_summary = cc_words_for(n_words);
    block->memory = calloc(2 * (n_words + n_summary), 8);
    if (!block->memory)
        return cc_fail(-ENOMEM, "no memory for the bitmaps of block %s", name);
    strcpy(block->name, name); /* its length was checked */
    block->addr = addr;
    block->n_pages = n_pages;
    block->page_size = page_size;
    block->page_shift = (uint32_t)__builtin_ctz(page_size);
    cc_bitmap_init(&block->pending, block->memory, block->memory + 2 * n_words, n_pages);
    cc_bitmap_init(&block->unacked, block->memory + n_words, block->memory + 2 * n_words + n_summary, n_pages);
    if (cc_observe32(&sender->sent)) /* the peer has nothing of it; before the first page the caller says what is to be sent */
        cc_sender_mark_again(block, 0, n_pages);
    if (block_out)
        *block_out = sender->n_blocks;
    cc_publish32(&sender->n_blocks, sender->n_blocks + 1); /* sending threads may find it now */
    return 0;
}

int colocache_sender_remove_block(struct colocache_sender *sender, uint32_t index)
{
    const uint32_t n_blocks = sender ? sender->n_blocks : 0;
    if (index >= n_blocks || cc_sender_gone(&sender->blocks[index]))
        return cc_fail(COLOCACHE_E_BLOCK, "there is no block %u to remove, the sender had %u", index, n_blocks);
    cc_publish32(&sender->blocks[index].gone, 1); /* the bitmaps stay until close: a thread that marks or sends may be at them */
    return 0;
}

/* mark_in_turn -- unacked before pending: a page that can be sent is never unknown to unacked.  And unacked once more after it:
 * sender_received in another thread may have taken the first bit before it could see the pending one. */
static void mark_in_turn(struct cc_sender_block *block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    struct cc_bitmap *in_turn[] = {&block->unacked, &block->pending, &block->unacked};
    for (int i = 0; i < 3; i++) {
        if (words)
            cc_bitmap_or_words(in_turn[i], first_pfn, n_pages, words);
        else
            cc_bitmap_set(in_turn[i], first_pfn, n_pages);
    }
}

void cc_sender_mark_again(struct cc_sender_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    mark_in_turn(block, first_pfn, n_pages, NULL);
}

static int mark(struct colocache_sender *sender, uint32_t index, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    if (!sender)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
    const uint32_t n_blocks = cc_observe32(&sender->n_blocks);
    if (index >= n_blocks)
        return cc_fail(COLOCACHE_E_BLOCK, "there is no block %u, the sender has %u", index, n_blocks);
    struct cc_sender_block *block = &sender->blocks[index];
    if (cc_sender_gone(block))
        return cc_fail(COLOCACHE_E_BLOCK, "block %s was removed", block->name);
    int rc = cc_bounds_range(block->name, block->n_pages, first_pfn, n_pages);
    if (rc)
        return rc;
    if (words && !cc_bitmap_tail_ok(words, n_pages))
        return cc_fail(COLOCACHE_E_TAIL, "words for %llu pages of block %s have bits set past the last page", (unsigned long long)n_pages,
                       block->name);
    mark_in_turn(block, first_pfn, n_pages, words);
    return 0;
}

static int take_into_sender(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    struct colocache_sender *sender = context;
    if (block < sender->n_blocks) { /* else mark says so */
        int rc = cc_source_page_size(sender->blocks[block].name, sender->blocks[block].page_size);
        if (rc)
            return rc;
    }
    return mark(sender, block, first_pfn, n_pages, words);
}

int colocache_sender_sync_dirty_log(struct colocache_sender *sender, struct colocache_source *source)
{
    if (!sender || !source)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender or the source is NULL");
    return cc_source_sync(source, take_into_sender, sender);
}

int colocache_sender_sync_words(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn, uint64_t n_pages,
                                const uint64_t *words)
{
    if (!words)
        return cc_fail(COLOCACHE_E_ARGUMENT, "words is NULL");
    return mark(sender, block, first_pfn, n_pages, words);
}

int colocache_sender_mark_dirty(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn, uint64_t n_pages)
{
    return mark(sender, block, first_pfn, n_pages, NULL);
}

int colocache_sender_mark_all(struct colocache_sender *sender)
{
    for (uint32_t i = 0; sender && i < sender->n_blocks; i++) {
        cc_bitmap_set_all(&sender->blocks[i].unacked);
        cc_bitmap_set_all(&sender->blocks[i].pending);
    }
    return sender ? 0 : cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
}

int colocache_sender_received(struct colocache_sender *sender)
{
    if (!sender)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
    for (uint32_t i = 0; i < sender->n_blocks; i++) {
        struct cc_sender_block *block = &sender->blocks[i];
        uint64_t bits;
        /* What is pending has not been sent: user space may have marked it since.  It stays unacked. */
        for (uint64_t w = 0; cc_bitmap_take_next(&block->unacked, &w, block->unacked.n_words, &bits); w++) {
            uint64_t still_pending = bits & cc_observe(&block->pending.words[w]);
            if (still_pending)
                cc_bitmap_or_words(&block->unacked, w * 64, block->n_pages - w * 64 < 64 ? block->n_pages - w * 64 : 64, &still_pending);
        }
    }
    return 0;
}

int colocache_sender_resend(struct colocache_sender *sender)
{
    for (uint32_t i = 0; sender && i < sender->n_blocks; i++)
        cc_bitmap_or_words(&sender->blocks[i].pending, 0, sender->blocks[i].n_pages, sender->blocks[i].unacked.words);
    return sender ? 0 : cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
}

int colocache_sender_count(struct colocache_sender *sender, uint64_t *pending_out, uint64_t *unacked_out)
{
    uint64_t pending = 0, unacked = 0;
    if (!sender)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
    for (uint32_t i = 0; i < sender->n_blocks; i++) {
        if (cc_sender_gone(&sender->blocks[i]))
            continue;
        pending += cc_bitmap_count(&sender->blocks[i].pending);
        unacked += cc_bitmap_count(&sender->blocks[i].unacked);
    }
    if (pending_out)
        *pending_out = pending;
    if (unacked_out)
        *unacked_out = unacked;
    return 0;
}
