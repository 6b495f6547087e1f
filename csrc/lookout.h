/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lookout.h -- how the reader of a socket waits: it looks out for a moment before it sleeps, where that pays.
 *
 * To be woken takes a reader nearly CC_LOOKOUT_NS here, and a sender on the same machine has to wake it with every few pages, which
 * come after less.  So a wait looks out if CC_LOOKOUT_PAYS bytes or more have come since the wait before.  At the first wait of a call
 * nothing has, and from a slow link bytes drip: those waits sleep at once, or a core would look on for as long as the link takes.
 * Where a look-out brings less than that, because the peer is slower or waits for this very CPU, some of the next waits sleep at once.
 */
#ifndef CC_LOOKOUT_H
#define CC_LOOKOUT_H

#include <stdbool.h>
#include <stdint.h>

#define CC_LOOKOUT_NS 50000u   /* 20000 was in vain too often: slower than none */
#define CC_LOOKOUT_PAYS 16384u /* a Unix socket brings 32 KiB and more at a time, a link of 1 Gbit/s 6 KiB in that moment */
#define CC_LOOKOUT_SLEEPS_MAX 8u

/* All zero at the beginning. */
struct cc_lookout {
    uint64_t until_ns;        /* it is looking out; 0: it is not */
    uint64_t n_bytes;         /* since the last wait */
    bool looked;              /* in the last wait, and then bytes came */
    uint32_t in_vain, sleeps; /* look-outs one after the other; waits that are to sleep at once */
};

/* Nothing is there: ask again, or (false) sleep? */
bool cc_look_out(struct cc_lookout *lookout);
/* So many bytes were there. */
void cc_lookout_came(struct cc_lookout *lookout, uint64_t n_bytes);

#endif
