/* SPDX-License-Identifier: Apache-2.0 */
/*
 * checkpoint.c -- the conductor: seal, flush, committed, loaded.
 *
 *   seal     claim the epoch | check counts and device state | close gates | unite | record | COMMIT WORD | clear bits | open gates
 *   flush    the strategy makes guest RAM the epoch | record "committed" | commit word
 *   loaded   the VM has its device state: live again
 *
 * Which of them may come when, and what a failover at the same moment does, is epoch.c's table.
 */
#include "internal.h"

#include "block.h"
#include "checksum.h"
#include "clock.h"
#include "commit.h"
#include "device_state.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "flush_set.h"
#include "gate.h"
#include "spill.h"
#include "stats.h"
#include "strategy.h"
#include "version.h"

/* ---- seal ---------------------------------------------------------------------------------------------------------- */

/* commit_epoch -- everything the record speaks of, then the record, then the word */
static int commit_epoch(struct colocache *cc, const struct colocache_seal_args *args, const struct colocache_seal_result *counts,
                        uint64_t flush_checksum)
{
    const struct cc_staged *staged = &cc->epoch.staged;
    struct cc_record before;
    int rc = cc_commit_read(cc->region.control, &before);
    if (rc < 0)
        return rc;
    struct cc_record record = {
        .epoch = staged->epoch,
        .strategy = cc->strategy->number,
        .device_area = staged->area,
        .device_bytes = staged->len_bytes,
        .device_checksum = cc_checksum(cc_device_area(cc, staged->area), staged->len_bytes),
        .flush_checksum = flush_checksum,
        .flush_pages = counts->flush_pages,
        .committed_before = before.epoch,
        .n_blocks = cc->n_blocks,
        .attachment_bytes = args->attachment_bytes,
        .attachment_checksum = args->attachment_checksum,
        .attachment_slot = args->attachment_slot,
    };
    for (uint32_t i = 0; i < cc->n_blocks; i++)
        record.blocks[i / 64] |= (uint64_t)(cc->blocks[i].standing == CC_HERE) << (i % 64);
    rc = cc_spill_seal(cc, &record);
    if (rc)
        return rc;
    return cc_commit_publish(cc->region.control, &record); /* from here on the epoch is what an attach finds */
}

/* seal_claimed -- on error nothing was sealed */
static int seal_claimed(struct colocache *cc, const struct colocache_seal_args *args, struct colocache_seal_result *out)
{
    int rc = cc_epoch_check_complete(cc, args->epoch, args->n_pages);
    if (rc)
        return rc;
    uint64_t t0 = cc_now_ns();
    if (args->check) {
        int veto = args->check(args->check_context, cc_device_area(cc, cc->epoch.staged.area), cc->epoch.staged.len_bytes);
        if (veto)
            return cc_fail(COLOCACHE_E_VETO, "the VM refused the device state of epoch %llu (%llu bytes) with %d",
                           (unsigned long long)args->epoch, (unsigned long long)cc->epoch.staged.len_bytes, veto);
    }
    uint64_t t1 = cc_now_ns(), flush_checksum = 0;
    rc = cc_epoch_close_gate(cc);
    if (rc)
        return rc;
    cc_gate_close(&cc->mark_gate);
    rc = cc_epoch_check_complete(cc, args->epoch, args->n_pages); /* again: a page may have slipped in before the gate closed */
    if (rc == 0)
        rc = cc_flush_set_unite(cc, out, &flush_checksum);
    if (rc == 0)
        rc = cc_flush_set_allocate(cc);
    CC_CRASH_POINT("seal: flush sets are there");
    uint64_t t2 = cc_now_ns(), t3 = t2;
    if (rc == 0)
        rc = commit_epoch(cc, args, out, flush_checksum);
    if (rc == 0) {
        t3 = cc_now_ns();
        cc_blocks_sealed(cc);
        cc_flush_set_moved(cc);
        cc_epoch_sealed(cc);
    }
    cc_gate_open(&cc->mark_gate);
    cc_epoch_open_gate(cc);
    out->epoch = args->epoch;
    out->check_ns = t1 - t0;
    out->union_ns = t2 - t1;
    out->commit_ns = t3 - t2;
    out->clear_ns = cc_now_ns() - t3;
    return rc;
}

#define SEAL_ARGS_LEAST offsetof(struct colocache_seal_args, attachment_bytes) /* what the first callers gave */

int colocache_seal(struct colocache *cc, const struct colocache_seal_args *args, struct colocache_seal_result *out)
{
    struct colocache_seal_args given;
    struct colocache_seal_result result = {0};
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    int rc = cc_take_struct(&given, sizeof given, args, SEAL_ARGS_LEAST, "seal args");
    if (rc)
        return rc;
    if (given.attachment_slot > 1 || given.reserved)
        return cc_fail(COLOCACHE_E_ARGUMENT, "attachment slot %u, reserved %u: there are slots 0 and 1, and what is reserved is 0",
                       given.attachment_slot, given.reserved);
    rc = cc_give_struct(out, &result, sizeof result, "seal result"); /* a caller's mistake is found before anything is sealed */
    if (rc)
        return rc;
    rc = cc_epoch_claim(cc, given.epoch, "be sealed");
    if (rc)
        return rc;
    rc = seal_claimed(cc, &given, &result);
    if (rc) {
        /* Asking for the wrong epoch is no reason to drop the right one, and neither is asking too early. */
        int released = cc_epoch_release(cc, rc != COLOCACHE_E_EPOCH && rc != COLOCACHE_E_RECEIVING);
        return released < 0 ? released : rc;
    }
    cc_stats_sealed(cc, &result);
    cc_log(cc, COLOCACHE_LOG_DEBUG, "epoch %llu sealed: %llu pages to flush", (unsigned long long)given.epoch,
           (unsigned long long)result.flush_pages);
    return cc_give_struct(out, &result, sizeof result, "seal result");
}

/* ---- flush and loaded ---------------------------------------------------------------------------------------------- */

static bool is_sealed(struct colocache *cc)
{
    enum cc_state state = cc_epoch_state(cc);
    return state == CC_SEALED || state == CC_SEALED_ASKED;
}

int colocache_flush(struct colocache *cc, struct colocache_flush_result *out)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    struct cc_record record;
    int rc = cc_commit_read(cc->region.control, &record);
    if (rc < 0)
        return rc;
    if (!is_sealed(cc) || rc == 0 || record.committed)
        return cc_fail(COLOCACHE_E_NOT_SEALED, "there is nothing to flush: the newest sealed epoch, %llu, is committed",
                       (unsigned long long)record.epoch);
    struct colocache_flush_result result = {.epoch = record.epoch};
    rc = cc_give_struct(out, &result, sizeof result, "flush result"); /* a caller's mistake is found before the work */
    if (rc)
        return rc;
    uint64_t t0 = cc_now_ns();
    rc = cc->strategy->begin(cc, &result);
    if (rc == 0)
        rc = cc->strategy->finish(cc, &result);
    if (rc)
        return rc;
    uint64_t t1 = cc_now_ns();
    rc = cc_commit_flushed(cc->region.control, &record);
    if (rc)
        return rc;
    cc_epoch_committed(cc);
    result.copy_ns = t1 - t0 - result.forget_ns;
    result.commit_ns = cc_now_ns() - t1;
    cc_stats_flushed(cc, &result);
    return cc_give_struct(out, &result, sizeof result, "flush result");
}

int colocache_loaded(struct colocache *cc, int ok)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    struct cc_record record;
    int rc = cc_commit_read(cc->region.control, &record);
    if (rc < 0)
        return rc;
    if (is_sealed(cc) && !record.committed)
        return cc_fail(COLOCACHE_E_SEALED, "epoch %llu is sealed but not flushed: flush it before its device state is loaded",
                       (unsigned long long)record.epoch);
    rc = cc_epoch_loaded(cc, ok != 0, record.committed);
    if (rc >= 0) {
        cc_stats_loaded(cc);
        cc_blocks_let_go(cc);
    }
    return rc;
}
