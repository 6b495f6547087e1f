/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sender_send.c -- pending pages taken, stripe by stripe: into PAGES packets for a socket or for a caller's memory, or as runs for a
 * caller's own transport.
 *
 * A page's pending bit is taken before the page is read, so a write that comes later, and is in the log, makes it pending again.  What was
 * taken and could not be handed over is marked again, in the order of a dirty page: unacked before pending.
 */
#include "sender.h"

#include <stdbool.h>
#include <string.h>

#include "atomics.h"
#include "bitmap.h"
#include "bounds.h"
#include "error.h"
#include "message.h"
#include "page_copy.h"
#include "version.h"

/* ---- the pages of a stripe --------------------------------------------------------------------------------------------- */

#define GROUP_WORDS 64u /* of 64 pages each, 16 MiB: what the stripes are dealt in turn */

/* Where a call stands.  `bits` are pages of word `word` that it has taken and not used yet; 0: the words from there are not looked at. */
struct walk {
    struct colocache_sender *sender;
    uint32_t stripe, n_stripes, block;
    uint64_t word, group_end, bits;
};

static void to_group(struct walk *walk, uint64_t first_word)
{
    walk->word = first_word;
    walk->group_end = first_word + GROUP_WORDS;
}

static struct walk walk_from(struct colocache_sender *sender, uint32_t stripe, uint32_t n_stripes)
{
    struct walk walk = {.sender = sender, .stripe = stripe, .n_stripes = n_stripes};
    to_group(&walk, (uint64_t)stripe * GROUP_WORDS);
    return walk;
}

/* fetch_after -- the first line of each page that is pending in the next word: the zero check would wait for memory page by page.  Words that
 * have a summary word of their own come without. */
static void fetch_after(const struct cc_sender_block *block, uint64_t w)
{
    const uint64_t later = w % 64 == 63 ? 0 : cc_read_summary(&block->pending.summary[w / 64]) >> (w % 64 + 1);
    if (!later)
        return;
    w += 1 + (uint64_t)__builtin_ctzll(later);
    for (uint64_t bits = cc_peek(&block->pending.words[w]); bits; bits &= bits - 1)
        __builtin_prefetch(block->addr + ((w * 64 + (uint64_t)__builtin_ctzll(bits)) << block->page_shift));
}

/* next_page -- take the next pending page; false if the stripe has none.  A word is looked at once: marks that go on can't hold it. */
static bool next_page(struct walk *walk, uint64_t *pfn)
{
    while (!walk->bits) {
        if (walk->block == cc_observe32(&walk->sender->n_blocks))
            return false;
        if (cc_sender_gone(&walk->sender->blocks[walk->block])) {
            walk->block++;
            to_group(walk, (uint64_t)walk->stripe * GROUP_WORDS);
            continue;
        }
        struct cc_bitmap *pending = &walk->sender->blocks[walk->block].pending;
        uint64_t end = walk->group_end < pending->n_words ? walk->group_end : pending->n_words;
        if (walk->word < end && cc_bitmap_take_next(pending, &walk->word, end, &walk->bits)) {
            fetch_after(&walk->sender->blocks[walk->block], walk->word);
            break;
        }
        if (walk->group_end < pending->n_words) {
            to_group(walk, walk->group_end + (uint64_t)(walk->n_stripes - 1) * GROUP_WORDS);
        } else {
            walk->block++;
            to_group(walk, (uint64_t)walk->stripe * GROUP_WORDS);
        }
    }
    *pfn = walk->word * 64 + (uint64_t)__builtin_ctzll(walk->bits);
    walk->bits &= walk->bits - 1;
    walk->word += !walk->bits;
    return true;
}

/* put_back -- what was taken and not used, and one page in hand if there is one */
static void put_back(struct walk *walk, const uint64_t *in_hand)
{
    if (in_hand)
        cc_sender_mark_again(&walk->sender->blocks[walk->block], *in_hand, 1);
    for (; walk->bits; walk->bits &= walk->bits - 1)
        cc_sender_mark_again(&walk->sender->blocks[walk->block], walk->word * 64 + (uint64_t)__builtin_ctzll(walk->bits), 1);
}

static bool page_is_zero(const struct cc_sender_block *block, uint64_t pfn)
{
    return cc_is_zero(block->addr + (pfn << block->page_shift), block->page_size);
}

static int check_stripe(const struct colocache_sender *sender, uint32_t stripe, uint32_t n_stripes)
{
    if (!sender)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the sender is NULL");
    if (n_stripes == 0 || stripe >= n_stripes)
        return cc_fail(COLOCACHE_E_ARGUMENT, "there is no stripe %u of %u: stripes count from 0", stripe, n_stripes);
    return 0;
}

/* ---- for a caller's own transport ---------------------------------------------------------------------------------------- */

int colocache_sender_next(struct colocache_sender *sender, uint32_t stripe, uint32_t n_stripes, uint64_t max_pages,
                          struct colocache_run *runs, uint32_t max_runs, uint32_t *n_runs_out)
{
    int rc = check_stripe(sender, stripe, n_stripes);
    if (rc)
        return rc;
    if (!runs || !max_runs || !n_runs_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "there is no room for runs: give an array of at least one, and where their number goes");
    cc_publish32(&sender->sent, 1);
    struct walk walk = walk_from(sender, stripe, n_stripes);
    uint32_t n_runs = 0;
    uint64_t n_pages = 0, pfn;
    while ((!max_pages || n_pages < max_pages) && next_page(&walk, &pfn)) {
        const struct cc_sender_block *block = &sender->blocks[walk.block];
        const uint32_t zero = page_is_zero(block, pfn);
        struct colocache_run *last = n_runs ? &runs[n_runs - 1] : NULL;
        if (last && last->block == walk.block && last->first_pfn + last->n_pages == pfn && last->zero == zero) {
            last->n_pages++;
        } else if (n_runs < max_runs) {
            runs[n_runs++] = (struct colocache_run){
                .block = walk.block, .zero = zero, .first_pfn = pfn, .n_pages = 1, .addr = block->addr + (pfn << block->page_shift)};
        } else {
            put_back(&walk, &pfn);
            break;
        }
        n_pages++;
    }
    put_back(&walk, NULL);
    *n_runs_out = n_runs;
    return 0;
}

/* ---- packets ------------------------------------------------------------------------------------------------------------ */

#define SOCKET_BYTES (512u << 10) /* of pages in a packet for a socket: the peer takes them in while the next are looked for */

struct outgoing {
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct cc_run runs[COLOCACHE_PACKET_RUNS_MAX];
    struct iovec iov[COLOCACHE_PACKET_RUNS_MAX + 2];
    uint32_t block, n_runs, n_pages, n_data_pages;
};

/* Where packets go: a socket, or memory that has room for `left` more bytes. */
struct writer {
    int fd, timeout_ms;
    uint8_t *memory; /* NULL: the socket */
    uint64_t left;
};

static int write_all(struct writer *writer, struct iovec *iov, uint32_t n_iov)
{
    if (!writer->memory)
        return cc_write_all(writer->fd, iov, n_iov, writer->timeout_ms);
    for (uint32_t i = 0; i < n_iov; i++) {
        memcpy(writer->memory, iov[i].iov_base, iov[i].iov_len);
        writer->memory += iov[i].iov_len;
        writer->left -= iov[i].iov_len;
    }
    return 0;
}

/* fits -- is there room for this packet with one more page, in a run of its own?  A socket always has some. */
static bool fits(const struct writer *writer, const struct outgoing *packet, const struct cc_sender_block *block, bool zero)
{
    if (!writer->memory)
        return true;
    /* at most 40 + 1025 runs of 16 bytes + 4097 pages of 2 MiB: no overflow */
    uint64_t data_pages = (uint64_t)packet->n_data_pages + !zero;
    return sizeof packet->header + (packet->n_runs + 1u) * sizeof packet->runs[0] + (data_pages << block->page_shift) <= writer->left;
}

static bool goes_on(const struct outgoing *packet, uint64_t pfn, bool zero)
{
    const struct cc_run *last = packet->n_runs ? &packet->runs[packet->n_runs - 1] : NULL;
    return last && last->first_pfn + last->n_pages == pfn && last->flags == (zero ? CC_RUN_ZERO : 0);
}

static bool is_full(const struct writer *writer, const struct outgoing *packet, const struct cc_sender_block *block, uint64_t pfn,
                    bool zero)
{
    const bool goes = !writer->memory && (uint64_t)packet->n_data_pages << block->page_shift >= SOCKET_BYTES;
    return goes || packet->n_pages == COLOCACHE_PACKET_PAGES_MAX ||
           (packet->n_runs == COLOCACHE_PACKET_RUNS_MAX && !goes_on(packet, pfn, zero));
}

/* add_page -- to the last run if it goes on, else to a new one; the packet is not full */
static void add_page(struct outgoing *packet, uint64_t pfn, bool zero)
{
    if (goes_on(packet, pfn, zero))
        packet->runs[packet->n_runs - 1].n_pages++;
    else
        packet->runs[packet->n_runs++] = (struct cc_run){.first_pfn = pfn, .n_pages = 1, .flags = zero ? CC_RUN_ZERO : 0};
    packet->n_pages++;
    packet->n_data_pages += !zero;
}

/* send_packet -- its pages are pending again if it can't be sent whole */
static int send_packet(struct colocache_sender *sender, struct writer *writer, uint64_t epoch, struct outgoing *packet,
                       struct colocache_send_result *result)
{
    struct cc_sender_block *block = &sender->blocks[packet->block];
    uint64_t run_bytes = packet->n_runs * sizeof packet->runs[0];
    uint64_t data_bytes = (uint64_t)packet->n_data_pages << block->page_shift;
    struct cc_message message = {
        .type = COLOCACHE_MSG_PAGES, .a = packet->block, .b = packet->n_runs, .epoch = epoch, .body_len_bytes = run_bytes + data_bytes};
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
    int rc = write_all(writer, packet->iov, n_iov);
    if (rc == 0) {
        result->n_pages += packet->n_pages;
        result->n_zero += packet->n_pages - packet->n_data_pages;
        result->n_bytes += sizeof packet->header + run_bytes + data_bytes;
        result->n_packets++;
    }
    for (uint32_t i = 0; rc && i < packet->n_runs; i++)
        cc_sender_mark_again(block, packet->runs[i].first_pfn, packet->runs[i].n_pages);
    packet->n_runs = packet->n_pages = packet->n_data_pages = 0;
    return rc;
}

/* send_stripe -- until the stripe has nothing pending, `max_pages` are out, or memory is full */
static int send_stripe(struct colocache_sender *sender, struct writer *writer, uint64_t epoch, uint32_t stripe, uint32_t n_stripes,
                       uint64_t max_pages, struct colocache_send_result *out)
{
    int rc = check_stripe(sender, stripe, n_stripes);
    if (rc)
        return rc;
    rc = cc_bounds_epoch(epoch);
    if (rc)
        return rc;
    struct colocache_send_result result = {0};
    rc = cc_give_struct(out, &result, sizeof result, "send result"); /* a caller's mistake is found before anything is sent */
    if (rc)
        return rc;
    cc_publish32(&sender->sent, 1);
    struct walk walk = walk_from(sender, stripe, n_stripes);
    struct outgoing packet; /* 32 KiB of stack */
    packet.n_runs = packet.n_pages = packet.n_data_pages = 0;
    uint64_t pfn;
    while (rc == 0 && (!max_pages || result.n_pages + packet.n_pages < max_pages) && next_page(&walk, &pfn)) {
        const struct cc_sender_block *block = &sender->blocks[walk.block];
        const bool zero = page_is_zero(block, pfn);
        if (packet.n_pages && (packet.block != walk.block || is_full(writer, &packet, block, pfn, zero)))
            rc = send_packet(sender, writer, epoch, &packet, &result);
        packet.block = walk.block;
        if (rc == 0 && fits(writer, &packet, block, zero)) {
            add_page(&packet, pfn, zero);
            continue;
        }
        put_back(&walk, &pfn);
        if (rc == 0 && !packet.n_pages && !result.n_pages)
            rc = cc_fail(COLOCACHE_E_LENGTH, "room for %llu bytes takes no packet with a page of block %s, which has %u",
                         (unsigned long long)writer->left, block->name, block->page_size);
        break;
    }
    put_back(&walk, NULL);
    if (rc == 0 && packet.n_pages)
        rc = send_packet(sender, writer, epoch, &packet, &result);
    int given = cc_give_struct(out, &result, sizeof result, "send result");
    return rc ? rc : given;
}

int colocache_sender_send(struct colocache_sender *sender, int fd, int timeout_ms, uint64_t epoch, uint32_t stripe, uint32_t n_stripes,
                          uint64_t max_pages, struct colocache_send_result *out)
{
    struct writer writer = {.fd = fd, .timeout_ms = timeout_ms};
    return send_stripe(sender, &writer, epoch, stripe, n_stripes, max_pages, out);
}

int colocache_sender_pack(struct colocache_sender *sender, void *room, uint64_t room_bytes, uint64_t epoch, uint32_t stripe,
                          uint32_t n_stripes, uint64_t max_pages, struct colocache_send_result *out)
{
    if (!room)
        return cc_fail(COLOCACHE_E_ARGUMENT, "there is no room for packets: give memory and its size");
    struct writer writer = {.memory = room, .left = room_bytes};
    return send_stripe(sender, &writer, epoch, stripe, n_stripes, max_pages, out);
}
