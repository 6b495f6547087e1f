/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats.c -- what a handle has done since it was made, and where the time of its newest checkpoint went.
 *
 * Each field has one writer (dirty_log.c, checkpoint.c through the functions here) and is read as it stands.
 */
#include "internal.h"

#include "clock.h"
#include "epoch.h"
#include "error.h"
#include "stats.h"
#include "version.h"

void cc_stats_synced(struct colocache *cc, uint64_t begin_ns)
{
    cc_add(&cc->stats.open_sync_ns, cc_now_ns() - begin_ns);
}

void cc_stats_sealed(struct colocache *cc, const struct colocache_seal_result *result)
{
    struct cc_stats *stats = &cc->stats;
    cc_add(&stats->sealed_epochs, 1);
    cc_poke(&stats->epoch, result->epoch);
    cc_poke(&stats->sync_ns, cc_peek(&stats->open_sync_ns));
    cc_poke(&stats->open_sync_ns, 0);
    cc_poke(&stats->seal_ns, result->check_ns + result->union_ns + result->commit_ns + result->clear_ns);
    cc_poke(&stats->flush_ns, 0);
    cc_poke(&stats->load_ns, 0);
}

void cc_stats_flushed(struct colocache *cc, const struct colocache_flush_result *result)
{
    struct cc_stats *stats = &cc->stats;
    cc_add(&stats->flushed_pages, result->n_pages);
    cc_add(&stats->flushed_bytes, result->n_bytes);
    cc_add(&stats->flush_total_ns, result->copy_ns + result->forget_ns + result->commit_ns);
    cc_poke(&stats->flush_ns, result->copy_ns + result->forget_ns + result->commit_ns);
    cc_poke(&stats->flushed_at_ns, cc_now_ns());
}

void cc_stats_loaded(struct colocache *cc)
{
    uint64_t flushed_at = cc_peek(&cc->stats.flushed_at_ns);
    if (flushed_at) /* 0: a process that attached loads without a flush of its own */
        cc_poke(&cc->stats.load_ns, cc_now_ns() - flushed_at);
}

int colocache_get_stats(struct colocache *cc, struct colocache_stats *out)
{
    if (!cc || !out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle or out is NULL");
    const struct cc_stats *stats = &cc->stats;
    struct colocache_stats now = {
        .sealed_epochs = cc_peek(&stats->sealed_epochs),
        .aborted_epochs = cc_peek(&cc->epoch.n_given_up),
        .flushed_pages = cc_peek(&stats->flushed_pages),
        .flushed_bytes = cc_peek(&stats->flushed_bytes),
        .flush_total_ns = cc_peek(&stats->flush_total_ns),
        .epoch = cc_peek(&stats->epoch),
        .sync_ns = cc_peek(&stats->sync_ns),
        .seal_ns = cc_peek(&stats->seal_ns),
        .flush_ns = cc_peek(&stats->flush_ns),
        .load_ns = cc_peek(&stats->load_ns),
    };
    now.received_pages = cc_epoch_received_in_all(cc);
    return cc_give_struct(out, &now, sizeof now, "stats");
}
