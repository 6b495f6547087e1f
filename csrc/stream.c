/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.c -- PAGES packets from a socket, or from memory, straight into cache images.
 *
 * A packet's header and runs are read and checked whole before one byte of it goes to the cache; then its pages are scattered to where
 * they belong, and receive.c sets their bits.
 */
#include "internal.h"

#include <string.h>

#include "block.h"
#include "error.h"
#include "message.h"
#include "receive.h"

struct packet {
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct cc_message message;
    struct cc_block *block;
    struct cc_run runs[COLOCACHE_PACKET_RUNS_MAX];
    struct iovec iov[COLOCACHE_PACKET_RUNS_MAX];
};

/* Where the bytes come from: a socket, or memory that holds `left` of them, enough for what is asked. */
struct reader {
    int fd, timeout_ms;
    struct cc_lookout lookout;
    const uint8_t *memory; /* NULL: the socket */
    uint64_t left;
};

/* bring -- by scattering reads, or copies, to where the bytes belong */
static int bring(void *context, struct iovec *iov, uint32_t n_iov)
{
    struct reader *reader = context;
    if (!reader->memory)
        return cc_read_all(reader->fd, iov, n_iov, reader->timeout_ms, &reader->lookout);
    for (uint32_t i = 0; i < n_iov; i++) {
        memcpy(iov[i].iov_base, reader->memory, iov[i].iov_len);
        reader->memory += iov[i].iov_len;
        reader->left -= iov[i].iov_len;
    }
    return 0;
}

/* read_runs -- the rest of what the checksum covers */
static int read_runs(struct reader *reader, struct packet *packet)
{
    const struct cc_message *message = &packet->message;
    if (message->b == 0 || message->b > COLOCACHE_PACKET_RUNS_MAX)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "PAGES packet says %u runs, 1 to %d are allowed", message->b, COLOCACHE_PACKET_RUNS_MAX);
    uint64_t n_bytes = message->b * sizeof packet->runs[0];
    struct iovec iov = {.iov_base = packet->runs, .iov_len = n_bytes};
    if (n_bytes > message->body_len_bytes)
        return cc_fail(COLOCACHE_E_PACKET, "PAGES packet says %llu bytes, its %u runs alone have more",
                       (unsigned long long)message->body_len_bytes, message->b);
    int rc = bring(reader, &iov, 1);
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
    return 0;
}

static int receive_packet(struct colocache *cc, struct reader *reader, struct packet *packet, uint64_t *n_pages)
{
    int rc = read_runs(reader, packet);
    if (rc == 0)
        rc = check_runs(cc, packet);
    if (rc)
        return rc;
    const uint64_t left = reader->left - (packet->message.body_len_bytes - packet->message.b * sizeof packet->runs[0]);
    rc = cc_receive_runs(cc, packet->message.epoch, packet->block, packet->runs, packet->message.b, packet->iov, bring, reader,
                         reader->memory, n_pages);
    if (rc == 0 && reader->memory && reader->left != left) { /* they were staged from where they are */
        reader->memory += reader->left - left;
        reader->left = left;
    }
    return rc;
}

/* read_header -- COLOCACHE_READY_NOT: of a next message nothing has come, or, from memory, not all of a PAGES packet */
static int read_header(struct reader *reader, bool only_what_is_there, struct packet *packet)
{
    struct iovec iov = {.iov_base = packet->header, .iov_len = sizeof packet->header};
    if (!reader->memory) {
        int rc = (only_what_is_there ? cc_read_if_there : cc_read_all)(reader->fd, &iov, 1, reader->timeout_ms, &reader->lookout);
        if (rc)
            return rc > 0 ? COLOCACHE_READY_NOT : rc;
        return cc_message_get(packet->header, &packet->message);
    }
    if (reader->left < sizeof packet->header)
        return COLOCACHE_READY_NOT;
    int rc = cc_message_get(reader->memory, &packet->message);
    if (rc)
        return rc;
    if (packet->message.type == COLOCACHE_MSG_PAGES && packet->message.body_len_bytes > reader->left - sizeof packet->header)
        return COLOCACHE_READY_NOT;
    return bring(reader, &iov, 1);
}

/* receive -- packets until another message (0), until `max_pages` have come, or, if `only_what_is_there`, until nothing more has */
static int receive(struct colocache *cc, struct reader *reader, uint64_t epoch, bool only_what_is_there, uint64_t max_pages, void *header,
                   uint64_t *n_pages)
{
    struct packet packet; /* 32 KiB of stack: no allocation that could fail while a peer waits */
    int rc = 0;
    while (rc == 0) {
        if (max_pages && *n_pages >= max_pages)
            return COLOCACHE_READY_MORE;
        rc = read_header(reader, only_what_is_there, &packet);
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
            rc = receive_packet(cc, reader, &packet, n_pages);
    }
    return rc;
}

int colocache_receive_stream(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, void *header, uint64_t *n_pages_out)
{
    uint64_t n_pages = 0;
    struct reader reader = {.fd = fd, .timeout_ms = timeout_ms};
    int rc = cc && header ? receive(cc, &reader, epoch, false, 0, header, &n_pages)
                          : cc_fail(COLOCACHE_E_ARGUMENT, "the handle or header is NULL");
    if (n_pages_out)
        *n_pages_out = n_pages;
    return rc;
}

int colocache_receive_ready(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, uint64_t max_pages, void *header,
                            uint64_t *n_pages_out)
{
    uint64_t n_pages = 0;
    struct reader reader = {.fd = fd, .timeout_ms = timeout_ms};
    int rc = cc && header ? receive(cc, &reader, epoch, true, max_pages, header, &n_pages)
                          : cc_fail(COLOCACHE_E_ARGUMENT, "the handle or header is NULL");
    if (n_pages_out)
        *n_pages_out = n_pages;
    return rc;
}

int colocache_receive_packets(struct colocache *cc, const void *data, uint64_t len_bytes, uint64_t epoch, void *header,
                              uint64_t *n_used_out, uint64_t *n_pages_out)
{
    uint64_t n_pages = 0;
    struct reader reader = {.memory = data, .left = len_bytes};
    int rc = cc && data && header && n_used_out ? receive(cc, &reader, epoch, false, 0, header, &n_pages)
                                                : cc_fail(COLOCACHE_E_ARGUMENT, "the handle, data, header or n_used_out is NULL");
    if (n_used_out)
        *n_used_out = len_bytes - reader.left;
    if (n_pages_out)
        *n_pages_out = n_pages;
    return rc;
}
