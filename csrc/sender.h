/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sender.h -- the primary's half, as its two files see it: sender.c (what is pending and what is unacked) and sender_send.c (taking
 * pages that are pending, for a socket or for a caller that transports them).
 *
 *   what        who sets                                who takes
 *   unacked     sender.c, before `pending`              colocache_sender_received: what is not pending
 *   pending     sender.c; sender_send.c what came back  sender_send.c, before a page is read
 */
#ifndef CC_SENDER_H
#define CC_SENDER_H

#include <stdbool.h>
#include <stdint.h>

#include "atomics.h"
#include "bitmap.h"
#include "colocache.h"

struct cc_sender_block {
    char name[COLOCACHE_NAME_BYTES];
    uint32_t gone; /* removed: its bits mean nothing, its memory may be no more */
    const uint8_t *addr;
    uint64_t n_pages;
    uint32_t page_size, page_shift;
    struct cc_bitmap pending, unacked;
    uint64_t *memory; /* words and summaries of both */
};

struct colocache_sender {
    uint32_t n_blocks; /* grows while other threads send: those observe it */
    uint32_t sent;     /* pages went out: all of a block that is added now must follow */
    struct cc_sender_block blocks[COLOCACHE_BLOCKS_MAX];
};

static inline bool cc_sender_gone(const struct cc_sender_block *block)
{
    const uint32_t gone = cc_observe32(&block->gone);
    return gone != 0;
}

/* Pages that were taken from `pending` and not handed over; any thread. */
void cc_sender_mark_again(struct cc_sender_block *block, uint64_t first_pfn, uint64_t n_pages);

#endif
