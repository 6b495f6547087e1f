/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transfer.c -- what a checkpoint costs over a socket, by three ways, all of them in C on both sides:
 *
 *   ours     the engine: dirty pages sent from the primary's memory, received into the cache, sealed, flushed, loaded
 *   hot      as many bytes from one buffer into another, both small enough to stay in the CPU's caches, then QEMU's union and flush
 *   in place the least that any COLO must do: the dirty pages from where they lie to where they belong, no header, no bitmap, their
 *            runs known to both sides before the clock starts; then QEMU's union and flush of what came
 *
 * A thread sends and the caller receives.  Both stand ready when the clock starts, so that making a thread is in none of the times.
 * Every way reads as a pair's secondary does while its machine stands: it stays awake for the first byte of what comes next, as
 * Channel.spin of replication/channel.py does, and within a stream of pages it looks out before it sleeps (lookout.h).
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "atomics.h"
#include "clock.h"
#include "colocache.h"
#include "lookout.h"

/* colocache.h has no names for messages without pages: the device state, which comes before the last of them, and how many they were */
#define VMSTATE_SEND 3
#define VMSTATE_SIZE 4
#define IOV_AT_ONCE 64   /* the kernel reads all of them in every call, and a socket brings some 200 KiB in one */
#define AWAKE_NS 1000000 /* as SPIN_SECONDS of replication/channel.py */
#define HOT_BYTES (1u << 20)
#define STACK_BYTES (64u << 10) /* more than sending needs */

struct transfer {
    int near, far, timeout_ms; /* received from, sent to: stream sockets, blocking, with the same limit of their own */
    /* ours */
    void *cc, *sender; /* handles of the library */
    uint64_t epoch, n_pages, state_bytes;
    const uint64_t *words; /* dirty pages: the primary's, and those of the SVM's log */
    uint64_t arrived_ns;   /* out: from the start to the last page */
    /* the others: QEMU's bitmap and the log that goes into it, and where the pages lie */
    uint64_t *received;
    const uint64_t *log;
    const char *primary;
    char *cache, *guest;
    /* inside */
    struct cc_lookout lookout;
    struct iovec *from, *to;
    uint32_t n_iov;
    uint64_t n_bytes;
    uint32_t ready, go; /* 1 when the sender stands ready, and when the clock runs */
    int sent;           /* what the sender came to */
    int (*send)(struct transfer *transfer);
};

/* stay_awake -- until a byte is there, for a moment: to sleep and be woken would take longer than most waits */
static void stay_awake(int fd)
{
    const uint64_t until = cc_now_ns() + AWAKE_NS;
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    while (poll(&readable, 1, 0) == 0 && cc_now_ns() < until)
        ;
}

/* move_all -- every byte of these iovecs, by a blocking socket: written, or read with a look-out before each sleep.  0 or -errno */
static int move_all(int fd, struct iovec *iov, uint32_t n_iov, struct cc_lookout *reading)
{
    bool asleep = false;
    while (n_iov) {
        struct msghdr msg = {.msg_iov = iov, .msg_iovlen = n_iov < IOV_AT_ONCE ? n_iov : IOV_AT_ONCE};
        ssize_t n = reading ? recvmsg(fd, &msg, asleep ? 0 : MSG_DONTWAIT) : sendmsg(fd, &msg, MSG_NOSIGNAL);
        if (n == 0)
            return -EPIPE;
        if (n < 0 && reading && !asleep && errno == EAGAIN) {
            asleep = !cc_look_out(reading);
            continue;
        }
        if (n < 0 && errno != EINTR)
            return -errno; /* EAGAIN: the socket's own limit */
        if (n > 0 && reading) {
            cc_lookout_came(reading, (uint64_t)n);
            asleep = false;
        }
        for (; n_iov && n >= (ssize_t)iov->iov_len; iov++, n_iov--)
            n -= (ssize_t)iov->iov_len;
        if (n > 0) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

static int move_bytes(int fd, void *bytes, uint64_t n_bytes, struct cc_lookout *reading)
{
    struct iovec iov = {.iov_base = bytes, .iov_len = n_bytes};
    return n_bytes ? move_all(fd, &iov, 1, reading) : 0;
}

/* have_stack -- as a thread that has sent before: the pages of its stack are there */
static __attribute__((noinline)) void have_stack(void)
{
    volatile char stack[STACK_BYTES];
    for (unsigned i = 0; i < sizeof stack; i += 4096)
        stack[i] = 0;
}

static void *sending(void *context)
{
    struct transfer *transfer = context;
    have_stack();
    cc_publish32(&transfer->ready, 1);
    while (!cc_observe32(&transfer->go))
        sched_yield();
    transfer->sent = transfer->send(transfer);
    if (transfer->sent)
        shutdown(transfer->far, SHUT_RDWR); /* or the receiver would wait for what does not come */
    return NULL;
}

/* both -- `receive` beside `send`; nanoseconds from the start of both to the end of `receive`, or what went wrong */
static int64_t both(struct transfer *transfer, int (*send)(struct transfer *), int (*receive)(struct transfer *))
{
    pthread_t thread;
    transfer->ready = transfer->go = 0;
    transfer->lookout = (struct cc_lookout){0};
    transfer->send = send;
    int rc = pthread_create(&thread, NULL, sending, transfer);
    if (rc)
        return -rc;
    while (!cc_observe32(&transfer->ready))
        sched_yield();
    const uint64_t start = cc_now_ns();
    cc_publish32(&transfer->go, 1);
    rc = receive(transfer);
    const uint64_t took = cc_now_ns() - start;
    transfer->arrived_ns -= start < transfer->arrived_ns ? start : transfer->arrived_ns;
    if (rc)
        shutdown(transfer->near, SHUT_RDWR);
    pthread_join(thread, NULL);
    return rc ? rc : transfer->sent ? transfer->sent : (int64_t)took;
}

/* ---- ours -------------------------------------------------------------------------------------------------------------- */

static int send_message(struct transfer *transfer, uint32_t type, const struct iovec *body, uint64_t n_pages)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct iovec iov[] = {{.iov_base = header, .iov_len = sizeof header}, *body};
    int rc = colocache_message_header(header, type, transfer->epoch, body->iov_len, (uint32_t)n_pages, 0);
    return rc ? rc : move_all(transfer->far, iov, 2, NULL);
}

static int send_ours(struct transfer *transfer)
{
    struct colocache_send_result result = {.struct_size = sizeof result};
    int rc = send_message(transfer, VMSTATE_SEND, transfer->from, 0);
    if (rc == 0)
        rc = colocache_sender_send(transfer->sender, transfer->far, transfer->timeout_ms, transfer->epoch, 0, 1, 0, &result);
    return rc ? rc : send_message(transfer, VMSTATE_SIZE, &(struct iovec){0}, result.n_pages);
}

/* receive_message -- pages until a message of this type, with a body of so many bytes */
static int receive_message(struct transfer *transfer, uint32_t type_wanted, uint64_t n_bytes, uint32_t *n_pages)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t epoch, body_bytes;
    uint32_t type, zero;
    stay_awake(transfer->near);
    int rc = colocache_receive_stream(transfer->cc, transfer->near, transfer->timeout_ms, transfer->epoch, header, NULL);
    if (rc == 0)
        rc = colocache_message_parse(header, &type, &epoch, &body_bytes, n_pages, &zero);
    if (rc == 0 && (type != type_wanted || epoch != transfer->epoch || body_bytes != n_bytes))
        rc = COLOCACHE_E_PACKET;
    return rc;
}

static int receive_ours(struct transfer *transfer)
{
    struct colocache *cc = transfer->cc;
    uint32_t n_pages;
    void *state;
    int rc = receive_message(transfer, VMSTATE_SEND, transfer->state_bytes, &n_pages);
    if (rc == 0)
        rc = colocache_device_state_begin(cc, transfer->epoch, transfer->state_bytes, &state);
    if (rc == 0)
        rc = move_bytes(transfer->near, state, transfer->state_bytes, &transfer->lookout);
    if (rc == 0)
        rc = receive_message(transfer, VMSTATE_SIZE, 0, &n_pages);
    transfer->arrived_ns = cc_now_ns();
    if (rc == 0)
        rc = colocache_sync_words(cc, 0, 0, transfer->n_pages, transfer->words);
    if (rc == 0)
        rc = colocache_seal(
            cc,
            &(struct colocache_seal_args){.struct_size = sizeof(struct colocache_seal_args), .epoch = transfer->epoch, .n_pages = n_pages},
            NULL);
    if (rc == 0)
        rc = colocache_flush(cc, NULL);
    return rc ? rc : colocache_loaded(cc, 1);
}

int64_t transfer_ours(struct transfer *transfer)
{
    struct iovec state = {.iov_base = calloc(1, transfer->state_bytes), .iov_len = transfer->state_bytes};
    if (!state.iov_base)
        return -ENOMEM;
    transfer->from = &state;
    int64_t took = both(transfer, send_ours, receive_ours);
    free(state.iov_base);
    return took;
}

/* ---- what it is compared with ------------------------------------------------------------------------------------------ */

static void qemu_part(struct transfer *transfer, const char *cache)
{
    transfer->arrived_ns = cc_now_ns();
    baseline_qemu_union(transfer->received, transfer->log, (transfer->n_pages + 63) / 64);
    baseline_qemu_flush(transfer->received, transfer->n_pages, transfer->guest, cache);
}

static int pass_hot(struct transfer *transfer, int fd, struct cc_lookout *reading)
{
    int rc = 0;
    char *buffer = reading ? transfer->to->iov_base : transfer->from->iov_base;
    for (uint64_t left = transfer->n_bytes, n; rc == 0 && left; left -= n) {
        n = left < HOT_BYTES ? left : HOT_BYTES;
        rc = move_bytes(fd, buffer, n, reading);
    }
    return rc;
}

static int send_hot(struct transfer *transfer)
{
    return pass_hot(transfer, transfer->far, NULL);
}

static int receive_hot(struct transfer *transfer)
{
    stay_awake(transfer->near);
    int rc = pass_hot(transfer, transfer->near, &transfer->lookout);
    if (rc == 0)
        qemu_part(transfer, transfer->primary); /* nothing was stored: the primary's memory stands for a cache that has it all */
    return rc;
}

int64_t transfer_hot(struct transfer *transfer, uint64_t n_bytes)
{
    char *buffers = malloc(2 * HOT_BYTES);
    if (!buffers)
        return -ENOMEM;
    memset(buffers, 1, 2 * HOT_BYTES); /* there, and in the caches */
    struct iovec from = {.iov_base = buffers}, to = {.iov_base = buffers + HOT_BYTES};
    transfer->n_bytes = n_bytes;
    transfer->from = &from;
    transfer->to = &to;
    int64_t took = both(transfer, send_hot, receive_hot);
    free(buffers);
    return took;
}

static int send_in_place(struct transfer *transfer)
{
    return move_all(transfer->far, transfer->from, transfer->n_iov, NULL);
}

static int receive_in_place(struct transfer *transfer)
{
    stay_awake(transfer->near);
    int rc = move_all(transfer->near, transfer->to, transfer->n_iov, &transfer->lookout);
    if (rc == 0)
        qemu_part(transfer, transfer->cache);
    return rc;
}

int64_t transfer_in_place(struct transfer *transfer)
{
    const uint64_t n_pages = transfer->n_pages;
    struct iovec *iov = calloc(2 * (n_pages / 2 + 1), sizeof *iov);
    if (!iov)
        return -ENOMEM;
    transfer->from = iov;
    transfer->to = iov + n_pages / 2 + 1;
    transfer->n_iov = 0;
    for (uint64_t at = 0, end; (at = find_bit(transfer->words, n_pages, at, 0)) < n_pages; at = end) {
        end = find_bit(transfer->words, n_pages, at, ~0ull);
        transfer->from[transfer->n_iov] = (struct iovec){.iov_base = (char *)transfer->primary + at * 4096, .iov_len = (end - at) * 4096};
        transfer->to[transfer->n_iov++] = (struct iovec){.iov_base = transfer->cache + at * 4096, .iov_len = (end - at) * 4096};
    }
    int64_t took = both(transfer, send_in_place, receive_in_place);
    free(iov);
    return took;
}
