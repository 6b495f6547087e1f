/* SPDX-License-Identifier: Apache-2.0 */
/*
 * receive.c -- pages into the cache image, then their bits into the PVM bitmap.
 *
 * Order, for each page: `receiving` >= its epoch, then its bytes, then its bit.  The first makes an attach know that the
 * cache may no longer be the sealed epoch; the last makes a set bit mean a complete page.
 * Many threads receive at once; they meet only in the gate's counter and in bitmap words they share.
 */
#include "internal.h"

#include <string.h>

#include "fault.h"

/* open_epoch -- the first page (or device state) of a new epoch */
static int open_epoch(struct colocache *cc, uint64_t epoch)
{
    int rc = 0;
    pthread_mutex_lock(&cc->opening);
    uint64_t open = cc_observe(&cc->open_epoch);
    if (open == 0) {
        uint64_t newest = cc_observe(&cc->control->receiving);
        if (epoch <= newest || epoch == UINT64_MAX) {
            rc = cc_fail(COLOCACHE_E_EPOCH, "epoch %llu can't be opened: the newest used is %llu, numbers begin at 1 and are never used again",
                         (unsigned long long)epoch, (unsigned long long)newest);
        } else {
            cc_stats_opened(cc);
            CC_CRASH_POINT("receive: before the receiving word");
            cc_publish(&cc->control->receiving, epoch); /* before the first byte */
            CC_CRASH_POINT("receive: after the receiving word");
            cc_publish(&cc->open_epoch, epoch);
            CC_CRASH_POINT("receive: the epoch is open");
        }
    } else if (open != epoch) {
        rc = cc_fail(COLOCACHE_E_EPOCH, "epoch %llu came while epoch %llu is open: seal or abort that first",
                     (unsigned long long)epoch, (unsigned long long)open);
    }
    pthread_mutex_unlock(&cc->opening);
    return rc;
}

/* cc_receive_enter -- into the gate with an open epoch.  The phase is looked at inside, so that a seal or failover that
 * closed the gate before is seen. */
int cc_receive_enter(struct colocache *cc, uint64_t epoch)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    cc_gate_enter(&cc->receive_gate);
    int rc = 0;
    switch (cc_observe32(&cc->phase) & CC_PHASE_MASK) {
    case COLOCACHE_PHASE_SEALING:
        rc = cc_fail(COLOCACHE_E_SEALED, "epoch %llu can't arrive: the epoch before is being sealed, flushed or loaded",
                     (unsigned long long)epoch);
        break;
    case COLOCACHE_PHASE_LOAD_FAILED:
        rc = cc_fail(COLOCACHE_E_LOAD_FAILED, "epoch %llu can't arrive: the device state before it did not load",
                     (unsigned long long)epoch);
        break;
    case COLOCACHE_PHASE_FAILED_OVER:
        rc = cc_fail(COLOCACHE_E_FAILED_OVER, "epoch %llu can't arrive: this secondary took over", (unsigned long long)epoch);
        break;
    default:
        if (epoch == 0 || cc_observe(&cc->open_epoch) != epoch) /* 0 also stands for "none is open": it must not pass for it */
            rc = open_epoch(cc, epoch);
    }
    if (rc)
        cc_gate_leave(&cc->receive_gate);
    return rc;
}

void cc_receive_leave(struct colocache *cc)
{
    cc_gate_leave(&cc->receive_gate);
}

/* cc_receive_done -- the bytes of these pages are in the cache */
void cc_receive_done(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    CC_CRASH_POINT("receive: bytes, before their bits");
    cc_bitmap_set(&block->bitmaps[COLOCACHE_BITMAP_PVM], first_pfn, n_pages);
    CC_CRASH_POINT("receive: after the bits");
    cc_add(&cc->received_pages, n_pages);
}

/* locate -- block and range, with the sparse pages allocated; inside the gate */
static int locate(struct colocache *cc, uint32_t index, uint64_t first_pfn, uint64_t n_pages, struct cc_block **block)
{
    int rc = cc_block_get(cc, index, block);
    if (rc == 0)
        rc = cc_block_range(*block, first_pfn, n_pages);
    return rc;
}

int colocache_receive_pages(struct colocache *cc, uint64_t epoch, uint32_t block_index, const uint64_t *pfns, uint64_t n_pages,
                            const void *data, uint64_t len_bytes)
{
    struct cc_block *block;
    if (n_pages && (!pfns || !data))
        return cc_fail(COLOCACHE_E_ARGUMENT, "pfns or data is NULL");
    int rc = cc_block_get(cc, block_index, &block);
    for (uint64_t i = 0; rc == 0 && i < n_pages; i++)
        rc = cc_block_range(block, pfns[i], 1);
    if (rc)
        return rc;
    if (n_pages > block->n_pages * 64 || len_bytes != n_pages * block->page_size) /* the first keeps the product small */
        return cc_fail(COLOCACHE_E_LENGTH, "%llu bytes were given for %llu pages, block %s uses %u a page",
                       (unsigned long long)len_bytes, (unsigned long long)n_pages, block->name, block->page_size);
    for (uint64_t i = 0; block->sparse && i < n_pages; i++) {
        rc = cc_block_allocate(block, pfns[i], 1);
        if (rc)
            return rc;
    }
    rc = cc_receive_enter(cc, epoch);
    if (rc)
        return rc;
    const uint8_t *from = data;
    for (uint64_t i = 0; i < n_pages; i++) {
        CC_HALF(cc_cache_page(block, pfns[i]), from + i * block->page_size, block->page_size, "receive: half a page");
        memcpy(cc_cache_page(block, pfns[i]), from + i * block->page_size, block->page_size);
        cc_receive_done(cc, block, pfns[i], 1);
    }
    cc_receive_leave(cc);
    return 0;
}

int colocache_receive_page(struct colocache *cc, uint64_t epoch, uint32_t block, uint64_t pfn, const void *data, uint64_t len_bytes)
{
    return colocache_receive_pages(cc, epoch, block, &pfn, 1, data, len_bytes);
}

int colocache_receive_zero(struct colocache *cc, uint64_t epoch, uint32_t block_index, uint64_t first_pfn, uint64_t n_pages)
{
    struct cc_block *block;
    int rc = locate(cc, block_index, first_pfn, n_pages, &block);
    if (rc == 0)
        rc = cc_block_allocate(block, first_pfn, n_pages);
    if (rc == 0)
        rc = cc_receive_enter(cc, epoch);
    if (rc)
        return rc;
    memset(cc_cache_page(block, first_pfn), 0, n_pages << block->page_shift);
    cc_receive_done(cc, block, first_pfn, n_pages);
    cc_receive_leave(cc);
    return 0;
}

/* The device state's room: in the area that the current record does not name, so that the state before stays whole. */
int colocache_device_state_begin(struct colocache *cc, uint64_t epoch, uint64_t len_bytes, void **addr_out)
{
    if (!cc || !addr_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or addr_out is NULL");
    if (len_bytes > cc->control->device_state_max_bytes)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "device state is %llu bytes, this region takes %llu: create it with a larger bound",
                       (unsigned long long)len_bytes, (unsigned long long)cc->control->device_state_max_bytes);
    struct cc_record current;
    int rc = cc_commit_read(cc->control, &current);
    if (rc < 0)
        return rc;
    uint32_t area = rc == 0 ? 0 : 1 - current.device_area;
    uint64_t offset = CC_DEVICES_OFFSET + area * cc->control->device_area_bytes;
    rc = len_bytes ? cc_reserve(cc->control_fd, offset, len_bytes, "the device-state area") : 0;
    CC_CRASH_POINT("device state: room is there");
    if (rc == 0)
        rc = cc_receive_enter(cc, epoch);
    if (rc)
        return rc;
    cc->staging = (struct cc_device_staging){.epoch = epoch, .len_bytes = len_bytes, .area = area};
    *addr_out = cc_device_area(cc, area);
    cc_receive_leave(cc);
    return 0;
}

int colocache_device_state(struct colocache *cc, const void **addr_out, uint64_t *len_bytes_out)
{
    struct cc_record current;
    if (!cc || !addr_out || !len_bytes_out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or an out-parameter is NULL");
    int rc = cc_commit_read(cc->control, &current);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return cc_fail(COLOCACHE_E_NO_STATE, "no epoch has been sealed yet, so there is no device state");
    *addr_out = cc_device_area(cc, current.device_area);
    *len_bytes_out = current.device_bytes;
    return 0;
}
