/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sender.c -- the primary's half: what must still be sent, what is not acknowledged, and PAGES packets gathered from guest RAM.
 *
 * A page taken from the dirty log goes into `unacked` and `pending` before it is read.  `pending` loses a bit when the page is about to be
 * read for sending; `unacked` loses bits only when the peer has sealed.  So an abort or a lost connection costs a resend of
 * unacked, never a page.  Both live in this process: a primary that dies takes its whole half with it.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "stream.h"

struct sender_block {
    char name[COLOCACHE_NAME_BYTES];
    const uint8_t *addr;
    uint64_t n_pages;
    uint32_t page_size, page_shift;
    struct cc_bitmap pending, unacked;
    uint64_t *memory; /* words and summaries of both */
};

struct colocache_sender {
    uint32_t n_blocks;
    uint32_t sent; /* pages went out: the blocks stay as they are */
    struct sender_block blocks[COLOCACHE_BLOCKS_MAX];
};

/* ---- blocks and bits -------------------------------------------------------------------------------------------------- */

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

int colocache_sender_add_block(struct colocache_sender *sender, const char *name, const void *addr, uint64_t len_bytes,
                               uint32_t page_size, uint32_t *block_out)
{
    if (!sender || !name || !*name || strnlen(name, COLOCACHE_NAME_BYTES) >= COLOCACHE_NAME_BYTES || !addr)
        return cc_fail(COLOCACHE_E_ARGUMENT, "a sender's block needs a name of 1 to %d bytes and an address", COLOCACHE_NAME_BYTES - 1);
    if (cc_observe32(&sender->sent))
        return cc_fail(COLOCACHE_E_ORDER, "block %s: blocks are added before the first page is sent", name);
    if (sender->n_blocks == COLOCACHE_BLOCKS_MAX)
        return cc_fail(COLOCACHE_E_BLOCK, "there are %d blocks already, the most there can be", COLOCACHE_BLOCKS_MAX);
    for (uint32_t i = 0; i < sender->n_blocks; i++) {
        if (strcmp(sender->blocks[i].name, name) == 0)
            return cc_fail(COLOCACHE_E_BLOCK, "there is a block %s already", name);
    }
    if (page_size < 4096 || page_size > 2u << 20 || (page_size & (page_size - 1)) || !len_bytes || len_bytes % page_size ||
        len_bytes > (1ull << 50))
        return cc_fail(COLOCACHE_E_LENGTH, "block %s is %llu bytes in pages of %u: pages are powers of two from 4096 to 2 MiB, a block a multiple of them",
                       name, (unsigned long long)len_bytes, page_size);
    struct sender_block *block = &sender->blocks[sender->n_blocks];
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
    if (block_out)
        *block_out = sender->n_blocks;
    sender->n_blocks++;
    return 0;
}

/* mark -- unacked before pending: a page that can be sent is never unknown to unacked.  And unacked once more after it:
 * sender_received in another thread may have taken the first bit before it could see the pending one. */
static int mark(struct colocache_sender *sender, uint32_t index, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    if (!sender || index >= sender->n_blocks)
        return cc_fail(COLOCACHE_E_BLOCK, "there is no block %u, the sender has %u", index, sender ? sender->n_blocks : 0);
    struct sender_block *block = &sender->blocks[index];
    if (first_pfn >= block->n_pages || n_pages > block->n_pages - first_pfn)
        return cc_fail(COLOCACHE_E_RANGE, "pages %llu+%llu lie past the end of block %s, which has %llu", (unsigned long long)first_pfn,
                       (unsigned long long)n_pages, block->name, (unsigned long long)block->n_pages);
    if (words && !cc_bitmap_tail_ok(words, n_pages))
        return cc_fail(COLOCACHE_E_TAIL, "words for %llu pages of block %s have bits set past the last page",
                       (unsigned long long)n_pages, block->name);
    struct cc_bitmap *in_turn[] = {&block->unacked, &block->pending, &block->unacked};
    for (int i = 0; i < 3; i++) {
        if (words)
            cc_bitmap_or_words(in_turn[i], first_pfn, n_pages, words);
        else
            cc_bitmap_set(in_turn[i], first_pfn, n_pages);
    }
    return 0;
}

static int take_into_sender(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    return mark(context, block, first_pfn, n_pages, words);
}

int colocache_sender_sync_dirty_log(struct colocache_sender *sender, struct colocache_source *source)
{
    if (!sender || !source)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender or the source is NULL");
    return source->sync(source, take_into_sender, sender);
}

int colocache_sender_sync_words(struct colocache_sender *sender, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
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
        struct sender_block *block = &sender->blocks[i];
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
        pending += cc_bitmap_count(&sender->blocks[i].pending);
        unacked += cc_bitmap_count(&sender->blocks[i].unacked);
    }
    if (pending_out)
        *pending_out = pending;
    if (unacked_out)
        *unacked_out = unacked;
    return 0;
}

/* ---- packets ------------------------------------------------------------------------------------------------------------ */

struct outgoing {
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct cc_run runs[COLOCACHE_PACKET_RUNS_MAX];
    struct iovec iov[COLOCACHE_PACKET_RUNS_MAX + 2];
    uint32_t n_runs, n_pages, n_data_pages;
};

/* add_page -- to the last run if it goes on, else to a new one; false if the packet is full */
static bool add_page(struct outgoing *packet, uint64_t pfn, bool zero)
{
    struct cc_run *last = packet->n_runs ? &packet->runs[packet->n_runs - 1] : NULL;
    uint32_t flags = zero ? CC_RUN_ZERO : 0;
    bool goes_on = last && last->first_pfn + last->n_pages == pfn && last->flags == flags;
    if (packet->n_pages == COLOCACHE_PACKET_PAGES_MAX || (!goes_on && packet->n_runs == COLOCACHE_PACKET_RUNS_MAX))
        return false;
    if (goes_on)
        last->n_pages++;
    else
        packet->runs[packet->n_runs++] = (struct cc_run){.first_pfn = pfn, .n_pages = 1, .flags = flags};
    packet->n_pages++;
    packet->n_data_pages += !zero;
    return true;
}

static int send_packet(const struct sender_block *block, uint32_t index, int fd, int timeout_ms, uint64_t epoch, struct outgoing *packet,
                       struct colocache_send_result *result)
{
    if (packet->n_pages == 0)
        return 0;
    uint64_t run_bytes = packet->n_runs * sizeof packet->runs[0];
    uint64_t data_bytes = (uint64_t)packet->n_data_pages << block->page_shift;
    struct cc_message message = {.type = COLOCACHE_MSG_PAGES, .a = index, .b = packet->n_runs, .epoch = epoch,
                                 .body_len_bytes = run_bytes + data_bytes};
    cc_message_put(packet->header, &message);
    message.checksum = cc_message_checksum(packet->header, packet->runs, run_bytes);
    cc_message_put(packet->header, &message);

    uint32_t n_iov = 0;
    packet->iov[n_iov++] = (struct iovec){.iov_base = packet->header, .iov_len = sizeof packet->header};
    packet->iov[n_iov++] = (struct iovec){.iov_base = packet->runs, .iov_len = run_bytes};
    for (uint32_t i = 0; i < packet->n_runs; i++) {
        const struct cc_run *run = &packet->runs[i];
        if (!(run->flags & CC_RUN_ZERO)) /* sendmsg only reads: the cast away from const is the interface's */
            packet->iov[n_iov++] = (struct iovec){.iov_base = (void *)(uintptr_t)(block->addr + (run->first_pfn << block->page_shift)),
                                                  .iov_len = (uint64_t)run->n_pages << block->page_shift};
    }
    int rc = cc_write_all(fd, packet->iov, n_iov, timeout_ms);
    if (rc == 0) {
        result->n_pages += packet->n_pages;
        result->n_zero += packet->n_pages - packet->n_data_pages;
        result->n_bytes += sizeof packet->header + run_bytes + data_bytes;
        result->n_packets++;
    }
    packet->n_runs = packet->n_pages = packet->n_data_pages = 0;
    return rc;
}

/* send_block -- the pending pages of this stripe; words of 64 pages are dealt out to the stripes in turn, by 64 words (16 MiB) */
static int send_block(struct colocache_sender *sender, uint32_t index, int fd, int timeout_ms, uint64_t epoch, uint32_t stripe,
                      uint32_t n_stripes, uint64_t max_pages, struct outgoing *packet, struct colocache_send_result *result)
{
    struct sender_block *block = &sender->blocks[index];
    int rc = 0;
    for (uint64_t group = stripe; group * 64 < block->pending.n_words && rc == 0; group += n_stripes) {
        uint64_t end = (group + 1) * 64 < block->pending.n_words ? (group + 1) * 64 : block->pending.n_words;
        uint64_t bits;
        for (uint64_t w = group * 64; rc == 0 && cc_bitmap_take_next(&block->pending, &w, end, &bits); w++) {
            for (uint64_t left = bits; left && rc == 0; left &= left - 1) {
                uint64_t pfn = w * 64 + (uint64_t)__builtin_ctzll(left);
                if (max_pages && result->n_pages + packet->n_pages >= max_pages) {
                    cc_bitmap_or_words(&block->pending, w * 64, block->n_pages - w * 64 < 64 ? block->n_pages - w * 64 : 64, &left);
                    return send_packet(block, index, fd, timeout_ms, epoch, packet, result);
                }
                bool zero = cc_is_zero(block->addr + (pfn << block->page_shift), block->page_size);
                if (!add_page(packet, pfn, zero)) {
                    rc = send_packet(block, index, fd, timeout_ms, epoch, packet, result);
                    add_page(packet, pfn, zero);
                }
            }
        }
    }
    return rc ? rc : send_packet(block, index, fd, timeout_ms, epoch, packet, result);
}

int colocache_sender_send(struct colocache_sender *sender, int fd, int timeout_ms, uint64_t epoch, uint32_t stripe,
                          uint32_t n_stripes, uint64_t max_pages, struct colocache_send_result *out)
{
    if (!sender)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
    if (n_stripes == 0 || stripe >= n_stripes)
        return cc_fail(COLOCACHE_E_ARGUMENT, "there is no stripe %u of %u: stripes count from 0", stripe, n_stripes);
    if (epoch == 0 || epoch == UINT64_MAX)
        return cc_fail(COLOCACHE_E_EPOCH, "pages can't be sent with epoch %llu: epochs begin at 1", (unsigned long long)epoch);
    cc_publish32(&sender->sent, 1);
    struct outgoing packet; /* 32 KiB of stack */
    packet.n_runs = packet.n_pages = packet.n_data_pages = 0;
    struct colocache_send_result result = {0};
    int rc = 0;
    for (uint32_t i = 0; i < sender->n_blocks && rc == 0; i++) {
        if (max_pages && result.n_pages >= max_pages)
            break;
        rc = send_block(sender, i, fd, timeout_ms, epoch, stripe, n_stripes, max_pages, &packet, &result);
    }
    int given = cc_give_struct(out, &result, sizeof result, "send result");
    return rc ? rc : given;
}
