/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.c -- PAGES packets from a socket straight into cache images.
 *
 * A packet's header and runs are read and checked whole before one byte of it goes to the cache; then its pages are scattered by the
 * kernel to where they belong.  When the connection breaks inside a packet the pages that may have been touched get
 * their bits all the same: the epoch can't be sealed any more (its count is short), and a page whose bytes
 * changed without a bit would be a page that guest RAM and cache silently disagree on.
 */
#include "internal.h"

#include <string.h>

#include "fault.h"
#include "stream.h"

struct packet {
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct cc_message message;
    struct cc_block *block;
    struct cc_run runs[COLOCACHE_PACKET_RUNS_MAX];
    struct iovec iov[COLOCACHE_PACKET_RUNS_MAX];
};

/* read_runs -- the rest of what the checksum covers */
static int read_runs(int fd, int timeout_ms, struct packet *packet)
{
    const struct cc_message *message = &packet->message;
    if (message->b == 0 || message->b > COLOCACHE_PACKET_RUNS_MAX)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "PAGES packet says %u runs, 1 to %d are allowed", message->b, COLOCACHE_PACKET_RUNS_MAX);
    uint64_t n_bytes = message->b * sizeof packet->runs[0];
    struct iovec iov = {.iov_base = packet->runs, .iov_len = n_bytes};
    int rc = cc_read_all(fd, &iov, 1, timeout_ms);
    if (rc)
        return rc;
    if (message->checksum != cc_message_checksum(packet->header, packet->runs, n_bytes))
        return cc_fail(COLOCACHE_E_PACKET, "PAGES packet of epoch %llu has a wrong header checksum", (unsigned long long)message->epoch);
    return 0;
}

/* check_runs -- every run against its block, and the lengths against each other */
static int check_runs(struct colocache *cc, struct packet *packet)
{
    const struct cc_message *message = &packet->message;
    int rc = cc_block_get(cc, message->a, &packet->block);
    uint64_t n_pages = 0, data_pages = 0;
    for (uint32_t i = 0; rc == 0 && i < message->b; i++) {
        const struct cc_run *run = &packet->runs[i];
        rc = cc_block_range(packet->block, run->first_pfn, run->n_pages);
        if (rc == 0 && (run->n_pages == 0 || run->flags & ~CC_RUN_ZERO))
            rc = cc_fail(COLOCACHE_E_PACKET, "PAGES packet has a run of %u pages with flags %x", run->n_pages, run->flags);
        n_pages += run->n_pages; /* at most 1024 * 2^32 */
        data_pages += run->flags & CC_RUN_ZERO ? 0 : run->n_pages;
    }
    if (rc)
        return rc;
    if (n_pages > COLOCACHE_PACKET_PAGES_MAX)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "PAGES packet has %llu pages, at most %d are allowed", (unsigned long long)n_pages,
                       COLOCACHE_PACKET_PAGES_MAX);
    uint64_t expected = message->b * sizeof packet->runs[0] + (data_pages << packet->block->page_shift);
    if (message->body_len_bytes != expected)
        return cc_fail(COLOCACHE_E_PACKET, "PAGES packet says %llu bytes, its runs make %llu", (unsigned long long)message->body_len_bytes,
                       (unsigned long long)expected);
    for (uint32_t i = 0; rc == 0 && i < message->b; i++)
        rc = cc_block_allocate(packet->block, packet->runs[i].first_pfn, packet->runs[i].n_pages);
    return rc;
}

/* scatter -- zero runs by memset, the others by one gathering read; then the bits of all */
static int scatter(struct colocache *cc, int fd, int timeout_ms, struct packet *packet, uint64_t *n_pages)
{
    struct cc_block *block = packet->block;
    uint32_t n_iov = 0;
    for (uint32_t i = 0; i < packet->message.b; i++) {
        const struct cc_run *run = &packet->runs[i];
        uint64_t bytes = (uint64_t)run->n_pages << block->page_shift;
        if (run->flags & CC_RUN_ZERO)
            memset(cc_cache_page(block, run->first_pfn), 0, bytes);
        else
            packet->iov[n_iov++] = (struct iovec){.iov_base = cc_cache_page(block, run->first_pfn), .iov_len = bytes};
    }
    int rc = cc_read_all(fd, packet->iov, n_iov, timeout_ms);
    CC_CRASH_POINT("stream: a packet's bytes, whole or torn");
    for (uint32_t i = 0; i < packet->message.b; i++) {
        const struct cc_run *run = &packet->runs[i];
        if (rc) { /* touched, perhaps torn: the bit, but not the count */
            cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], run->first_pfn, run->n_pages);
        } else {
            cc_receive_done(cc, block, run->first_pfn, run->n_pages);
            *n_pages += run->n_pages;
        }
    }
    return rc;
}

static int receive_packet(struct colocache *cc, int fd, int timeout_ms, struct packet *packet, uint64_t *n_pages)
{
    int rc = read_runs(fd, timeout_ms, packet);
    if (rc == 0)
        rc = check_runs(cc, packet);
    if (rc == 0)
        rc = cc_receive_enter(cc, packet->message.epoch);
    if (rc)
        return rc;
    rc = scatter(cc, fd, timeout_ms, packet, n_pages);
    cc_receive_leave(cc);
    return rc;
}

int colocache_receive_stream(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, void *header, uint64_t *n_pages_out)
{
    struct packet packet; /* 32 KiB of stack: no allocation that could fail while a peer waits */
    uint64_t n_pages = 0;
    int rc = cc && header ? 0 : cc_fail(COLOCACHE_E_ARGUMENT, "the handle or header is NULL");
    while (rc == 0) {
        struct iovec iov = {.iov_base = packet.header, .iov_len = sizeof packet.header};
        rc = cc_read_all(fd, &iov, 1, timeout_ms);
        if (rc == 0)
            rc = cc_message_get(packet.header, &packet.message);
        if (rc)
            break;
        if (packet.message.type != COLOCACHE_MSG_PAGES) {
            if (packet.message.checksum == cc_message_checksum(packet.header, NULL, 0))
                memcpy(header, packet.header, sizeof packet.header);
            else
                rc = cc_fail(COLOCACHE_E_PACKET, "header of message type %u has a wrong checksum", packet.message.type);
            break;
        }
        if (epoch && packet.message.epoch != epoch)
            rc = cc_fail(COLOCACHE_E_EPOCH, "a PAGES packet of epoch %llu came, epoch %llu is expected",
                         (unsigned long long)packet.message.epoch, (unsigned long long)epoch);
        else
            rc = receive_packet(cc, fd, timeout_ms, &packet, &n_pages);
    }
    if (n_pages_out)
        *n_pages_out = n_pages;
    return rc;
}
