/* SPDX-License-Identifier: Apache-2.0 */
/* message.c -- headers of messages, and moving bytes over a socket with a time limit. */
#define _GNU_SOURCE
#include "message.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

#include "checksum.h"
#include "clock.h"
#include "colocache.h"
#include "error.h"
#include "lookout.h"

#define WIRE_MAGIC 0x4f4c4f43u /* bytes "COLO" */
#define CHECKED_BYTES 32u
#define IOV_AT_ONCE 1024u /* UIO_MAXIOV */

struct wire_header {
    uint32_t magic;
    uint16_t version, type;
    uint64_t epoch, body_len_bytes;
    uint32_t a, b;
    uint64_t checksum;
};

_Static_assert(sizeof(struct wire_header) == COLOCACHE_HEADER_BYTES, "the header is 40 bytes on the wire");

uint64_t cc_message_checksum(const void *header, const void *runs, uint64_t n_bytes)
{
    uint64_t of_header = cc_checksum(header, CHECKED_BYTES);
    return n_bytes ? of_header ^ cc_checksum(runs, n_bytes) : of_header;
}

void cc_message_put(void *header, const struct cc_message *message)
{
    struct wire_header wire = {.magic = WIRE_MAGIC,
                               .version = COLOCACHE_WIRE_VERSION,
                               .type = (uint16_t)message->type,
                               .epoch = message->epoch,
                               .body_len_bytes = message->body_len_bytes,
                               .a = message->a,
                               .b = message->b,
                               .checksum = message->checksum};
    memcpy(header, &wire, sizeof wire);
}

int cc_message_get(const void *header, struct cc_message *out)
{
    struct wire_header wire;
    memcpy(&wire, header, sizeof wire);
    if (wire.magic != WIRE_MAGIC)
        return cc_fail(COLOCACHE_E_PACKET, "message begins with %08x instead of %08x: the peer does not speak this protocol or lost step",
                       wire.magic, WIRE_MAGIC);
    if (wire.version != COLOCACHE_WIRE_VERSION)
        return cc_fail(COLOCACHE_E_PACKET, "message has wire version %u, this build speaks %u", wire.version, COLOCACHE_WIRE_VERSION);
    if (wire.epoch > COLOCACHE_EPOCH_MAX)
        return cc_fail(COLOCACHE_E_PACKET, "message of type %u has epoch %llu, the most is %llu", wire.type, (unsigned long long)wire.epoch,
                       (unsigned long long)COLOCACHE_EPOCH_MAX);
    *out = (struct cc_message){
        .type = wire.type, .a = wire.a, .b = wire.b, .epoch = wire.epoch, .body_len_bytes = wire.body_len_bytes, .checksum = wire.checksum};
    return 0;
}

int colocache_message_header(void *header, uint32_t type, uint64_t epoch, uint64_t body_len_bytes, uint32_t a, uint32_t b)
{
    if (!header || type > UINT16_MAX || type == COLOCACHE_MSG_PAGES)
        return cc_fail(COLOCACHE_E_ARGUMENT, "a header for message type %u can't be filled: types go to 65535, and %d is PAGES", type,
                       COLOCACHE_MSG_PAGES);
    if (epoch > COLOCACHE_EPOCH_MAX)
        return cc_fail(COLOCACHE_E_EPOCH, "a header can't have epoch %llu, the most is %llu", (unsigned long long)epoch,
                       (unsigned long long)COLOCACHE_EPOCH_MAX);
    struct cc_message message = {.type = type, .a = a, .b = b, .epoch = epoch, .body_len_bytes = body_len_bytes};
    cc_message_put(header, &message);
    message.checksum = cc_message_checksum(header, NULL, 0);
    cc_message_put(header, &message);
    return 0;
}

int colocache_message_parse(const void *header, uint32_t *type_out, uint64_t *epoch_out, uint64_t *body_len_bytes_out, uint32_t *a_out,
                            uint32_t *b_out)
{
    struct cc_message message = {0};
    if (!header || !type_out || !epoch_out || !body_len_bytes_out || !a_out || !b_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "header or an out-parameter is NULL");
    int rc = cc_message_get(header, &message);
    if (rc)
        return rc;
    if (message.checksum != cc_message_checksum(header, NULL, 0))
        return cc_fail(COLOCACHE_E_PACKET, "header of message type %u has a wrong checksum", message.type);
    *type_out = message.type;
    *epoch_out = message.epoch;
    *body_len_bytes_out = message.body_len_bytes;
    *a_out = message.a;
    *b_out = message.b;
    return 0;
}

/* ---- bytes over a socket ------------------------------------------------------------------------------------------- */

/* wait_for -- until the socket is ready; the socket's own blocking mode doesn't matter, each call says MSG_DONTWAIT */
static int wait_for(int fd, short events, int timeout_ms)
{
    uint64_t give_up_ns = timeout_ms < 0 ? UINT64_MAX : cc_now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        uint64_t now = cc_now_ns();
        int left_ms = timeout_ms < 0 ? -1 : now >= give_up_ns ? 0 : (int)((give_up_ns - now + 999999u) / 1000000u);
        struct pollfd poll_fd = {.fd = fd, .events = events};
        int n = poll(&poll_fd, 1, left_ms);
        if (n > 0)
            return 0; /* ready, hung up or broken: the call itself tells */
        if (n == 0)
            return cc_fail(COLOCACHE_E_TIMEOUT, "nothing moved on the connection for %d ms", timeout_ms);
        if (errno != EINTR)
            return cc_fail_errno("poll");
    }
}

/* drop -- forget n bytes from the front of the iovecs */
static void drop(struct iovec **iov, uint32_t *n_iov, size_t n)
{
    while (*n_iov && n >= (*iov)->iov_len) {
        n -= (*iov)->iov_len;
        (*iov)++;
        (*n_iov)--;
    }
    if (*n_iov) {
        (*iov)->iov_base = (char *)(*iov)->iov_base + n;
        (*iov)->iov_len -= n;
    }
}

enum move { READ, READ_IF_THERE, WRITE };

/* move_all -- READ_IF_THERE: 1, and nothing is taken, if not one byte is there yet; from the first byte on it is a READ */
static int move_all(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms, enum move move, struct cc_lookout *lookout)
{
    const bool writing = move == WRITE;
    drop(&iov, &n_iov, 0); /* leading empty ones */
    while (n_iov) {
        struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n_iov < IOV_AT_ONCE ? n_iov : IOV_AT_ONCE};
        ssize_t n = writing ? sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) : recvmsg(fd, &msg, MSG_DONTWAIT);
        if (n > 0) {
            drop(&iov, &n_iov, (size_t)n);
            if (!writing) {
                move = READ;
                cc_lookout_came(lookout, (uint64_t)n);
            }
        } else if (n == 0 && !writing) {
            return cc_fail(COLOCACHE_E_PEER_LOST, "the peer closed the connection");
        } else if (errno == EAGAIN) {
            if (move == READ_IF_THERE)
                return 1;
            if (!writing && cc_look_out(lookout))
                continue;
            int rc = wait_for(fd, writing ? POLLOUT : POLLIN, timeout_ms);
            if (rc)
                return rc;
        } else if (errno == ECONNRESET || errno == EPIPE || errno == ETIMEDOUT || errno == ECONNABORTED || errno == EHOSTUNREACH ||
                   errno == ENETUNREACH || errno == ENETDOWN) {
            return cc_fail(COLOCACHE_E_PEER_LOST, "the connection is broken: %s", colocache_strerror(-errno));
        } else if (errno != EINTR) {
            return cc_fail_errno(writing ? "sendmsg" : "recvmsg");
        }
    }
    return 0;
}

int cc_read_all(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms, struct cc_lookout *lookout)
{
    return move_all(fd, iov, n_iov, timeout_ms, READ, lookout);
}

int cc_write_all(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms)
{
    return move_all(fd, iov, n_iov, timeout_ms, WRITE, NULL);
}

int cc_read_if_there(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms, struct cc_lookout *lookout)
{
    return move_all(fd, iov, n_iov, timeout_ms, READ_IF_THERE, lookout);
}
