/* SPDX-License-Identifier: Apache-2.0 */
/*
 * checkpoint.c -- the conductor: seal, clear, flush, committed, loaded; abort; and who may take over.
 *
 *   seal     check counts and device state | close gates | unite | record | COMMIT WORD | clear bits | open gates
 *   flush    copy the flush set | record "committed" | commit word
 *   loaded   the VM has its device state: live again
 *
 * The phase word decides between a checkpoint and a failover that come at the same moment: both change it by
 * compare-and-exchange from the same value, so one of them is first and the other sees it.
 *
 *   EMPTY --seal--> SEALING(was empty) --commit word--> SEALING --loaded--> LIVE --seal--> SEALING ...
 *   LIVE --failover--> FAILED_OVER          SEALING --failover--> SEALING(pending) --loaded--> FAILED_OVER
 *   SEALING --loaded(failed)--> LOAD_FAILED
 */
#include "internal.h"

#include <string.h>

#include "checksum.h"
#include "fault.h"

/* ---- failover ---------------------------------------------------------------------------------------------------- */

/* took_over -- so that no later attach brings back an epoch that the world has moved on from */
static void took_over(struct colocache *cc)
{
    CC_CRASH_POINT("failover: decided, not told");
    cc_publish(&cc->control->taken_over, 1);
    CC_CRASH_POINT("failover: told");
    cc_log(cc, COLOCACHE_LOG_INFO, "this secondary took over");
}

int colocache_failover(struct colocache *cc, uint64_t *epoch_out)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    struct cc_record current;
    int rc = cc_commit_read(cc->control, &current);
    if (rc < 0)
        return rc;
    if (epoch_out)
        *epoch_out = current.epoch;

    uint32_t phase = cc_observe32(&cc->phase);
    for (;;) {
        switch (phase & CC_PHASE_MASK) {
        case COLOCACHE_PHASE_LIVE:
            if (cc_decide32(&cc->phase, &phase, COLOCACHE_PHASE_FAILED_OVER)) {
                took_over(cc);
                return 0;
            }
            continue; /* somebody was faster; phase is what it is now */
        case COLOCACHE_PHASE_SEALING:
            if (phase & CC_PHASE_WAS_EMPTY)
                return cc_fail(COLOCACHE_E_NO_STATE, "there is no state to take over from: the first epoch is only just being sealed");
            if ((phase & CC_PHASE_PENDING) || cc_decide32(&cc->phase, &phase, phase | CC_PHASE_PENDING))
                return 1;
            continue;
        case COLOCACHE_PHASE_FAILED_OVER:
            return 0;
        case COLOCACHE_PHASE_LOAD_FAILED:
            return cc_fail(COLOCACHE_E_LOAD_FAILED, "the device state of epoch %llu did not load: attach with a fresh VM to take over from it",
                           (unsigned long long)current.epoch);
        default:
            if (current.epoch == 0)
                return cc_fail(COLOCACHE_E_NO_STATE, "there is no secondary yet: no epoch has been sealed");
            return cc_fail(COLOCACHE_E_NO_STATE,
                           "there is no state to take over from: pages newer than epoch %llu are in the cache and the VM that ran is gone",
                           (unsigned long long)current.epoch);
        }
    }
}

/* ---- seal ---------------------------------------------------------------------------------------------------------- */

/* begin_sealing -- the phase before, or an error */
static int begin_sealing(struct colocache *cc, uint32_t *before)
{
    uint32_t phase = cc_observe32(&cc->phase);
    for (;;) {
        uint32_t sealing = COLOCACHE_PHASE_SEALING;
        switch (phase & CC_PHASE_MASK) {
        case COLOCACHE_PHASE_EMPTY:
            sealing |= CC_PHASE_WAS_EMPTY;
            break;
        case COLOCACHE_PHASE_LIVE:
            break;
        case COLOCACHE_PHASE_SEALING:
            return cc_fail(COLOCACHE_E_SEALED, "an epoch is sealed already: flush it and call loaded first");
        case COLOCACHE_PHASE_LOAD_FAILED:
            return cc_fail(COLOCACHE_E_LOAD_FAILED, "the device state before did not load: attach with a fresh VM");
        default:
            return cc_fail(COLOCACHE_E_FAILED_OVER, "this secondary took over: it seals no more epochs");
        }
        *before = phase;
        if (cc_decide32(&cc->phase, &phase, sealing))
            return 0;
    }
}

/* give_up_epoch -- its number is spent; bits and cache stay until an epoch that contains them is sealed.  The gate is closed on
 * the way, so that no late page of it can follow a newer one into the cache. */
static void give_up_epoch(struct colocache *cc)
{
    cc_gate_close(&cc->receive_gate);
    cc->staging.epoch = 0;
    cc_publish(&cc->open_epoch, 0);
    cc_stats_aborted(cc);
    cc_gate_open(&cc->receive_gate);
}

/* stop_sealing -- back to the phase before; a failover asked for meanwhile is granted, as the SVM's own state is intact: 1 then */
static int stop_sealing(struct colocache *cc, uint32_t before)
{
    uint32_t phase = cc_observe32(&cc->phase);
    while (!cc_decide32(&cc->phase, &phase, phase & CC_PHASE_PENDING ? COLOCACHE_PHASE_FAILED_OVER : before))
        ;
    if (phase & CC_PHASE_PENDING)
        took_over(cc);
    return (phase & CC_PHASE_PENDING) != 0;
}

static int check_complete(struct colocache *cc, const struct colocache_seal_args *args)
{
    uint64_t open = cc_observe(&cc->open_epoch);
    if (args->epoch != open || open == 0)
        return cc_fail(COLOCACHE_E_EPOCH, "epoch %llu can't be sealed: %s%llu", (unsigned long long)args->epoch,
                       open ? "the open one is " : "none is open, the newest used is ",
                       (unsigned long long)(open ? open : cc_observe(&cc->control->receiving)));
    if (cc->staging.epoch != args->epoch)
        return cc_fail(COLOCACHE_E_INCOMPLETE,
                       "epoch %llu is aborted, it has no device state: call device_state_begin, with length 0 if there is none",
                       (unsigned long long)args->epoch);
    uint64_t received = cc_observe(&cc->received_pages);
    if (args->n_pages != COLOCACHE_ANY_COUNT && args->n_pages != received)
        return cc_fail(COLOCACHE_E_INCOMPLETE, "epoch %llu is aborted: %llu pages were sent, %llu came", (unsigned long long)args->epoch,
                       (unsigned long long)args->n_pages, (unsigned long long)received);
    return 0;
}

/* commit_epoch -- everything the record speaks of, then the record, then the word */
static int commit_epoch(struct colocache *cc, const struct colocache_seal_result *counts, uint64_t flush_checksum)
{
    struct cc_record before;
    int rc = cc_commit_read(cc->control, &before);
    if (rc < 0)
        return rc;
    struct cc_record record = {
        .epoch = cc->staging.epoch,
        .strategy = CC_STRATEGY_COPY,
        .device_area = cc->staging.area,
        .device_bytes = cc->staging.len_bytes,
        .device_checksum = cc_checksum(cc_device_area(cc, cc->staging.area), cc->staging.len_bytes),
        .flush_checksum = flush_checksum,
        .flush_pages = counts->flush_pages,
        .committed_before = before.epoch,
    };
    cc_commit_publish(cc->control, &record);
    return 0;
}

/* clear_moved_bits -- from the seal on both bitmaps belong to the next epoch.  A death before this leaves extra bits. */
static void clear_moved_bits(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        cc_bitmap_clear_all(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_PVM]);
        CC_CRASH_POINT("seal: between clearing PVM and SVM bits");
        cc_bitmap_clear_all(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_SVM]);
        CC_CRASH_POINT("seal: bits are cleared");
    }
}

/* seal_open_epoch -- between the phase change and its end; on error nothing was sealed */
static int seal_open_epoch(struct colocache *cc, const struct colocache_seal_args *args, struct colocache_seal_result *out)
{
    int rc = check_complete(cc, args);
    if (rc)
        return rc;
    uint64_t t0 = cc_now_ns();
    if (args->check) {
        int veto = args->check(args->check_context, cc_device_area(cc, cc->staging.area), cc->staging.len_bytes);
        if (veto)
            return cc_fail(COLOCACHE_E_VETO, "the VM refused the device state of epoch %llu (%llu bytes) with %d",
                           (unsigned long long)args->epoch, (unsigned long long)cc->staging.len_bytes, veto);
    }
    uint64_t t1 = cc_now_ns(), flush_checksum = 0;
    cc_gate_close(&cc->receive_gate); /* the last receiver is out: its bytes and bits are seen */
    cc_gate_close(&cc->mark_gate);
    rc = check_complete(cc, args); /* again: a page may have slipped in before the gate closed */
    if (rc == 0)
        rc = cc_flush_set_unite(cc, out, &flush_checksum);
    if (rc == 0)
        rc = cc_flush_set_allocate(cc);
    CC_CRASH_POINT("seal: flush sets are there");
    uint64_t t2 = cc_now_ns(), t3 = t2;
    if (rc == 0)
        rc = commit_epoch(cc, out, flush_checksum);
    if (rc == 0) {
        t3 = cc_now_ns();
        clear_moved_bits(cc);
        cc->staging.epoch = 0;
        cc_publish(&cc->open_epoch, 0);
    }
    cc_gate_open(&cc->mark_gate);
    cc_gate_open(&cc->receive_gate);
    out->epoch = args->epoch;
    out->check_ns = t1 - t0;
    out->union_ns = t2 - t1;
    out->commit_ns = t3 - t2;
    out->clear_ns = cc_now_ns() - t3;
    return rc;
}

int colocache_seal(struct colocache *cc, const struct colocache_seal_args *args, struct colocache_seal_result *out)
{
    struct colocache_seal_args given;
    struct colocache_seal_result result = {0};
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    int rc = cc_take_struct(&given, sizeof given, args, sizeof given, "seal args");
    if (rc)
        return rc;
    uint32_t before = COLOCACHE_PHASE_EMPTY;
    rc = cc_give_struct(out, &result, sizeof result, "seal result"); /* a caller's mistake is found before anything is sealed */
    if (rc)
        return rc;
    rc = begin_sealing(cc, &before);
    if (rc)
        return rc;
    rc = seal_open_epoch(cc, &given, &result);
    if (rc) {
        if (rc != COLOCACHE_E_EPOCH) /* asking for the wrong epoch is no reason to drop the right one */
            give_up_epoch(cc);
        stop_sealing(cc, before);
        return rc;
    }
    cc_and32(&cc->phase, ~CC_PHASE_WAS_EMPTY); /* from the commit word on there is a state to take over from */
    cc_stats_sealed(cc, &result);
    cc_log(cc, COLOCACHE_LOG_DEBUG, "epoch %llu sealed: %llu pages to flush", (unsigned long long)given.epoch,
           (unsigned long long)result.flush_pages);
    return cc_give_struct(out, &result, sizeof result, "seal result");
}

/* ---- flush and loaded ---------------------------------------------------------------------------------------------- */

/* cc_finish_flush -- copy, and publish "committed"; also what a replay does */
int cc_finish_flush(struct colocache *cc, struct cc_record *record, struct colocache_flush_result *out)
{
    uint64_t t0 = cc_now_ns();
    CC_CRASH_POINT("flush: before the first page");
    cc_flush_copy(cc, out);
    CC_CRASH_POINT("flush: after the last page");
    uint64_t t1 = cc_now_ns();
    record->committed = 1;
    record->flush_checksum = 0; /* the flush set may be written again from here on */
    cc_commit_publish(cc->control, record);
    out->epoch = record->epoch;
    out->copy_ns = t1 - t0;
    out->commit_ns = cc_now_ns() - t1;
    return 0;
}

int colocache_flush(struct colocache *cc, struct colocache_flush_result *out)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    struct cc_record record;
    int rc = cc_commit_read(cc->control, &record);
    if (rc < 0)
        return rc;
    bool sealing = (cc_observe32(&cc->phase) & CC_PHASE_MASK) == COLOCACHE_PHASE_SEALING;
    if (!sealing || rc == 0 || record.committed)
        return cc_fail(COLOCACHE_E_NOT_SEALED, "there is nothing to flush: the newest sealed epoch, %llu, is committed",
                       (unsigned long long)record.epoch);
    struct colocache_flush_result result = {0};
    rc = cc_give_struct(out, &result, sizeof result, "flush result"); /* a caller's mistake is found before the work */
    if (rc)
        return rc;
    rc = cc_finish_flush(cc, &record, &result);
    if (rc)
        return rc;
    cc_stats_flushed(cc, &result);
    return cc_give_struct(out, &result, sizeof result, "flush result");
}

int colocache_loaded(struct colocache *cc, int ok)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    struct cc_record record;
    int rc = cc_commit_read(cc->control, &record);
    if (rc < 0)
        return rc;
    uint32_t phase = cc_observe32(&cc->phase);
    if ((phase & CC_PHASE_MASK) != COLOCACHE_PHASE_SEALING)
        return cc_fail(COLOCACHE_E_NOT_SEALED, "loaded was called but no epoch is sealed");
    if (!record.committed)
        return cc_fail(COLOCACHE_E_SEALED, "epoch %llu is sealed but not flushed: flush it before its device state is loaded",
                       (unsigned long long)record.epoch);
    for (;;) {
        uint32_t next = !ok ? COLOCACHE_PHASE_LOAD_FAILED
                            : (phase & CC_PHASE_PENDING ? COLOCACHE_PHASE_FAILED_OVER : COLOCACHE_PHASE_LIVE);
        if (cc_decide32(&cc->phase, &phase, next)) {
            cc_stats_loaded(cc);
            if (next == COLOCACHE_PHASE_FAILED_OVER)
                took_over(cc);
            return next == COLOCACHE_PHASE_FAILED_OVER;
        }
    }
}

/* ---- before the first epoch, and instead of a seal ------------------------------------------------------------------- */

int colocache_preflush(struct colocache *cc, uint64_t *n_pages_out)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    if (cc_observe(&cc->control->commit_word) || (cc_observe32(&cc->phase) & CC_PHASE_MASK) != COLOCACHE_PHASE_EMPTY)
        return cc_fail(COLOCACHE_E_ORDER, "preflush is only for the initial copy, before anything is sealed");
    uint64_t n_pages = 0;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        struct cc_block *block = &cc->blocks[i];
        struct cc_bitmap *pvm = &block->bitmaps[COLOCACHE_BITMAP_PVM];
        uint64_t bits;
        /* Bits are taken before the bytes are read: a page that comes again meanwhile sets its bit again. */
        for (uint64_t w = 0; cc_bitmap_take_next(pvm, &w, pvm->n_words, &bits); w++)
            n_pages += cc_flush_copy_word(cc, block, w, bits);
    }
    if (n_pages_out)
        *n_pages_out = n_pages;
    return 0;
}

int colocache_abort(struct colocache *cc, uint64_t epoch, const char *reason)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    uint32_t phase = cc_observe32(&cc->phase) & CC_PHASE_MASK, before = COLOCACHE_PHASE_EMPTY;
    uint64_t open = cc_observe(&cc->open_epoch);
    if ((phase == COLOCACHE_PHASE_EMPTY || phase == COLOCACHE_PHASE_LIVE) && (open != epoch || !open))
        return cc_fail(COLOCACHE_E_EPOCH, "epoch %llu can't be aborted: the open one is %llu", (unsigned long long)epoch,
                       (unsigned long long)open); /* found out before the phase changes: receives of the open one go on */
    int rc = begin_sealing(cc, &before); /* the same decision as a seal's: only one of the two can have the epoch */
    if (rc)
        return rc;
    open = cc_observe(&cc->open_epoch);
    if (open == epoch && open) {
        give_up_epoch(cc);
        cc_log(cc, COLOCACHE_LOG_WARN, "epoch %llu aborted: %s", (unsigned long long)epoch, reason ? reason : "no reason given");
    } else {
        rc = cc_fail(COLOCACHE_E_EPOCH, "epoch %llu can't be aborted: the open one is %llu", (unsigned long long)epoch,
                     (unsigned long long)open);
    }
    int take_over = stop_sealing(cc, before);
    return rc ? rc : take_over;
}
