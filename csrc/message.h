/* SPDX-License-Identifier: Apache-2.0 */
/*
 * message.h -- messages on a stream socket, and the PAGES packet.
 *
 *     0  u32  magic "COLO"          24  u32  a      PAGES: block index
 *     4  u16  wire version          28  u32  b      PAGES: number of runs
 *     6  u16  type                  32  u64  checksum of bytes 0..31, in PAGES followed by the runs
 *     8  u64  epoch
 *    16  u64  body_len_bytes        all little-endian
 *
 * Body of PAGES: the runs {u64 first_pfn, u32 n_pages, u32 flags (1 = zero pages)}, then the bytes of all pages of
 * runs that are not zero pages, in their order.  Other types: as they like.
 * The checksum covers what says where bytes go; the bytes themselves are TCP's or TLS's business, and a page of a running
 * guest that changes while it is sent would look damaged.
 */
#ifndef CC_MESSAGE_H
#define CC_MESSAGE_H

#include <stdint.h>
#include <sys/uio.h>

#include "lookout.h"

#define CC_RUN_ZERO 1u

struct cc_run {
    uint64_t first_pfn;
    uint32_t n_pages;
    uint32_t flags;
};

struct cc_message {
    uint32_t type, a, b;
    uint64_t epoch, body_len_bytes, checksum;
};

void cc_message_put(void *header, const struct cc_message *message);
/* Magic and version only; the checksum may cover runs that are still to come. */
int cc_message_get(const void *header, struct cc_message *out);
/* Over the first 32 bytes of the header and n_bytes that follow it. */
uint64_t cc_message_checksum(const void *header, const void *runs, uint64_t n_bytes);

/* Move all bytes of these iovecs (which are used up), however many calls it takes; timeout_ms without a byte moved ends it.
 * A reader looks out before it sleeps, as long as that pays.  0, E_PEER_LOST, E_TIMEOUT, -errno. */
int cc_read_all(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms, struct cc_lookout *lookout);
int cc_write_all(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms);
/* As cc_read_all, but 1 at once, with nothing taken, if not one byte is there yet. */
int cc_read_if_there(int fd, struct iovec *iov, uint32_t n_iov, int timeout_ms, struct cc_lookout *lookout);

#endif
