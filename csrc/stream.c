/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stream.c -- PAGES packets from a socket straight into cache images.
 *
 * A packet's header and runs are read and checked whole before one byte of it goes to the cache; then the kernel scatters its pages
 * to where they belong, and receive.c sets their bits.
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
    return 0;
}

struct socket_reader {
    int fd, timeout_ms;
};

/* bring -- by one scattering read, from the socket to where the pages belong */
static int bring(void *context, struct iovec *iov, uint32_t n_iov)
{
    const struct socket_reader *reader = context;
    return cc_read_all(reader->fd, iov, n_iov, reader->timeout_ms);
}

static int receive_packet(struct colocache *cc, int fd, int timeout_ms, struct packet *packet, uint64_t *n_pages)
{
    struct socket_reader reader = {.fd = fd, .timeout_ms = timeout_ms};
    int rc = read_runs(fd, timeout_ms, packet);
    if (rc == 0)
        rc = check_runs(cc, packet);
    if (rc)
        return rc;
    return cc_receive_runs(cc, packet->message.epoch, packet->block, packet->runs, packet->message.b, packet->iov, bring, &reader, n_pages);
}

/* receive -- packets until another message (0), until `max_pages` have come, or, if `only_what_is_there`, until nothing more has */
static int receive(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, bool only_what_is_there, uint64_t max_pages, void *header,
                   uint64_t *n_pages)
{
    struct packet packet; /* 32 KiB of stack: no allocation that could fail while a peer waits */
    int rc = 0;
    while (rc == 0) {
        if (max_pages && *n_pages >= max_pages)
            return COLOCACHE_READY_MORE;
        struct iovec iov = {.iov_base = packet.header, .iov_len = sizeof packet.header};
        rc = (only_what_is_there ? cc_read_if_there : cc_read_all)(fd, &iov, 1, timeout_ms);
        if (rc > 0)
            return COLOCACHE_READY_NOT;
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
            rc = receive_packet(cc, fd, timeout_ms, &packet, n_pages);
    }
    return rc;
}

int colocache_receive_stream(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, void *header, uint64_t *n_pages_out)
{
    uint64_t n_pages = 0;
    int rc = cc && header ? receive(cc, fd, timeout_ms, epoch, false, 0, header, &n_pages)
                          : cc_fail(COLOCACHE_E_ARGUMENT, "the handle or header is NULL");
    if (n_pages_out)
        *n_pages_out = n_pages;
    return rc;
}

int colocache_receive_ready(struct colocache *cc, int fd, int timeout_ms, uint64_t epoch, uint64_t max_pages, void *header,
                            uint64_t *n_pages_out)
{
    uint64_t n_pages = 0;
    int rc = cc && header ? receive(cc, fd, timeout_ms, epoch, true, max_pages, header, &n_pages)
                          : cc_fail(COLOCACHE_E_ARGUMENT, "the handle or header is NULL");
    if (n_pages_out)
        *n_pages_out = n_pages;
    return rc;
}
