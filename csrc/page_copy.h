/* SPDX-License-Identifier: Apache-2.0 */
/*
 * page_copy.h -- how bytes of pages move.  Knows no bitmaps.
 *
 * The flush writes memory that nobody reads soon: stores that pull the destination into the CPU cache would cost
 * a read of every line and push out what the VM needs.  So: streaming (non-temporal) stores, and
 * several pages at once, because the hardware prefetcher doesn't cross a 4 KiB page.
 * Streaming stores are ordered by no release store: whoever copied calls fence() before saying done.
 */
#ifndef CC_PAGE_COPY_H
#define CC_PAGE_COPY_H

#include <stdbool.h>
#include <stdint.h>

#define CC_COPY_PAGE 4096u
#define CC_COPY_LANES 8u /* pages that are copied side by side, and as many that are prefetched meanwhile */

struct cc_copy {
    int variant; /* enum colocache_copy, never AUTO */
    /* n_bytes is a multiple of CC_COPY_PAGE, both addresses of 64. */
    void (*run)(void *dst, const void *src, uint64_t n_bytes);
    /* n pages of CC_COPY_PAGE bytes, each at the same offset at[i], a multiple of 64, of both; in no order.  at[n] and the n_next - 1
     * after it: where the following call will begin (only prefetched). */
    void (*pages)(void *dst, const void *src, const uint64_t *at, uint32_t n, uint32_t n_next);
    void (*fence)(void);
};

bool cc_copy_supported(int variant);
/* AUTO gives the best this CPU has; false if this CPU or build lacks the variant. */
bool cc_copy_pick(int variant, struct cc_copy *out);
/* Are these bytes (a multiple of 64) all zero?  Stops at the first that isn't. */
bool cc_is_zero(const void *data, uint64_t n_bytes);

#endif
