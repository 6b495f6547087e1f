/* SPDX-License-Identifier: Apache-2.0 */
/*
 * give_back.c -- pages that the SVM gives back to its host: a balloon, free page reporting.
 *
 * First its SVM bits, then the hole in guest RAM: a death in between leaves extra bits.  The cache stays as it is, as it may be needed to
 * restart from; the next flush brings the primary's bytes back, unless they are zeros there as well.
 * Inside the mark gate, so that a seal's union has the bits, and never between a seal and loaded: a flush writes guest RAM then.
 */
#include "internal.h"

#include "bitmap.h"
#include "block.h"
#include "epoch.h"
#include "error.h"
#include "gate.h"
#include "sparse.h"

/* check_state -- inside the mark gate, where a seal that has the epoch waits for us */
static int check_state(const struct colocache *cc)
{
    switch (cc_epoch_state(cc)) {
    case CC_LIVE:
    case CC_CLAIMED:
    case CC_CLAIMED_ASKED:
    case CC_TAKING_OVER:
    case CC_FAILED_OVER:
        return 0;
    case CC_SEALED:
    case CC_SEALED_ASKED:
    case CC_RUNNING:
        return cc_fail(COLOCACHE_E_SEALED, "pages can't be given back between a seal and colocache_loaded: try again after it");
    default:
        return cc_fail(COLOCACHE_E_ORDER, "pages can be given back when the VM runs: there is no epoch yet that it could run from");
    }
}

int colocache_give_back(struct colocache *cc, uint32_t index, uint64_t first_pfn, uint64_t n_pages)
{
    struct cc_block *block;
    int rc = cc_block_get(cc, index, &block);
    if (rc == 0)
        rc = cc_block_range(block, first_pfn, n_pages);
    if (rc || n_pages == 0)
        return rc;
    if (cc->bounded)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "block %s is in bounded memory, whose guest image is the newest epoch: its pages stay",
                       block->name);
    cc_gate_enter(&cc->mark_gate);
    rc = cc_block_still_here(block); /* again: a seal may have closed the gate in between */
    if (rc == 0 && !block->keeps_holes)
        rc = cc_fail(COLOCACHE_E_UNSUPPORTED,
                     "block %s is reserved whole or on huge pages: only a sparse block of 4 KiB pages gives memory back", block->name);
    if (rc == 0)
        rc = check_state(cc);
    if (rc == 0) {
        cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_SVM], first_pfn, n_pages);
        rc = cc_sparse_punch_guest(block, first_pfn, n_pages);
    }
    cc_gate_leave(&cc->mark_gate);
    return rc;
}
