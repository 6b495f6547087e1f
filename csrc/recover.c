/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recover.c -- attach: what a process finds after another one died, and what it does about it.
 *
 *   record        `receiving`        guest RAM            what happens                               action
 *   none          any                partial              the initial copy starts again              NOTHING
 *   sealed(N)     = N                half old, half new   flush set copied, committed                REPLAYED
 *   committed(N)  = N                the dead VM's own    whole cache copied, VM restarts from N     RESTART
 *   committed(N)  > N                the dead VM's own    nothing to restart from; the SVM's log     NO_RESTART
 *                                                         is unknown: every page counts as written
 *
 * In bounded memory guest RAM is epoch N whenever N is committed, whatever had come of a newer one, and the dead VM's writes died with it:
 *
 *   none          any                partial              the initial copy starts again              NOTHING
 *   sealed(N)     = N                half old, half new   flush set from the cache, committed        REPLAYED
 *   committed(N)  any                exactly N            nothing                                    RESTART
 *
 * and after each of them first the bits are cleared, then the cache is emptied: in that order, as a hole under a bit is a page of zeros.
 *
 * Every one of these can be killed at any point and repeated: copying again is idempotent, `receiving` is never lowered, and a
 * record is only replaced by publishing the next.  The bitmaps' summaries are rebuilt; the commit record's checksum, the flush
 * set's and the device state's are verified before anything is written.
 */
#include "internal.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "bitmap.h"
#include "block.h"
#include "commit.h"
#include "control.h"
#include "device_state.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "flush_set.h"
#include "guest_pages.h"
#include "spill.h"
#include "strategy.h"
#include "validate.h"
#include "version.h"

/* nth_images -- of a caller's array, whose elements are as long as the caller's header says, not as ours does */
static const struct colocache_images *nth_images(const struct colocache_images *images, uint32_t n)
{
    return (const void *)((const char *)images + n * images->struct_size);
}

/* find_images -- those that were given for a block; NULL: none */
static const struct colocache_images *find_images(const struct colocache_images *images, uint32_t n_images, const char *name)
{
    for (uint32_t i = 0; i < n_images; i++) {
        const struct colocache_images *one = nth_images(images, i);
        if (one->name && strncmp(one->name, name, COLOCACHE_NAME_BYTES) == 0)
            return one;
    }
    return NULL;
}

/* find_block -- of the region, by name; a name may have been used again after its block was removed.  n_blocks: none */
static uint64_t find_block(const struct cc_block_entry *table, uint64_t n_blocks, const struct cc_record *record, const char *name)
{
    uint64_t b = 0;
    while (b < n_blocks && (!cc_commit_has_block(record, b) || strncmp(name, table[b].name, COLOCACHE_NAME_BYTES) != 0))
        b++;
    return b;
}

/* check_names -- images for every block of the region and for no other: a block that was being added, or removed, when its owner died may
 * be one of the region's or not, and a VM that runs on a block which is none would lose it at the next takeover */
static int check_names(const struct cc_block_entry *table, uint64_t n_blocks, const struct cc_record *record,
                       const struct colocache_images *images, uint32_t n_images)
{
    for (uint64_t b = 0; b < n_blocks; b++) {
        if (cc_commit_has_block(record, b) && !find_images(images, n_images, table[b].name))
            return cc_fail(COLOCACHE_E_BLOCK, "no images were given for block %s: inspect names the blocks of the control region",
                           table[b].name);
    }
    for (uint32_t i = 0; i < n_images; i++) {
        const struct colocache_images *one = nth_images(images, i);
        if (!one->name || find_block(table, n_blocks, record, one->name) == n_blocks)
            return cc_fail(COLOCACHE_E_BLOCK,
                           "images were given for block %s, which the control region does not have: inspect names those that it has",
                           one->name ? one->name : "without a name");
        if (find_images(images, n_images, one->name) != one)
            return cc_fail(COLOCACHE_E_BLOCK, "images were given twice for block %s", one->name);
    }
    return 0;
}

/* bind_blocks -- every block of the region with the images that were given for its name */
static int bind_blocks(struct colocache *cc, const struct colocache_images *images, uint32_t n_images, uint64_t n_blocks,
                       uint64_t file_bytes)
{
    struct colocache_images given;
    struct cc_record record; /* says which were removed */
    const struct cc_block_entry *table = cc->region.table;
    int rc = cc_commit_read(cc->region.control, &record);
    for (uint32_t i = 0; rc >= 0 && i < n_images; i++)
        rc = cc_take_struct(&given, sizeof given, nth_images(images, i), COLOCACHE_IMAGES_LEAST, "images");
    if (rc >= 0)
        rc = cc_block_check_table(table, n_blocks, cc->region.head_bytes, file_bytes, &cc->region.end_bytes);
    if (rc == 0)
        rc = check_names(table, n_blocks, &record, images, n_images);
    for (uint32_t b = 0; rc == 0 && b < n_blocks; b++) {
        if (!cc_commit_has_block(&record, b)) {
            cc_block_was_removed(&cc->blocks[b], &table[b]);
        } else {
            rc = cc_take_struct(&given, sizeof given, find_images(images, n_images, table[b].name), COLOCACHE_IMAGES_LEAST, "images");
            if (rc == 0)
                rc = cc_block_reattach(cc, b, &given);
        }
        if (rc == 0)
            cc->n_blocks = b + 1;
    }
    return rc;
}

/* start_again -- nothing was ever sealed: as good as new, but epoch numbers that were used stay used */
static void start_again(struct colocache *cc)
{
    cc_flush_set_forget(cc);
    cc_control_new_history(cc->region.control);
}

/* rebuild_summaries -- of bitmaps that are in order; no summary of a dead process is trusted */
static void rebuild_summaries(struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        for (uint32_t kind = 0; kind < CC_BITMAPS && !cc_gone(&cc->blocks[i]); kind++)
            cc_bitmap_rebuild_summary(&cc->blocks[i].bitmaps[kind]);
    }
}

/* verify -- all that the record speaks of, and tails, which are checked and not mended.  Writes nothing: a refusal leaves the region as it was. */
static int verify(struct colocache *cc, const struct cc_record *record)
{
    int rc = cc_validate_bitmaps(cc, false);
    if (rc == 0)
        rc = cc_device_state_check(cc, record);
    if (rc || record->committed)
        return rc;
    uint64_t found = cc_flush_set_checksum(cc);
    if (found != record->flush_checksum)
        return cc_fail(COLOCACHE_E_CORRUPT,
                       "the flush set of sealed epoch %llu has checksum %016llx, its record says %016llx: not replayed",
                       (unsigned long long)record->epoch, (unsigned long long)found, (unsigned long long)record->flush_checksum);
    return 0;
}

static int replay(struct colocache *cc, const struct cc_strategy *strategy, struct cc_record *record, struct colocache_recovery *report)
{
    struct colocache_flush_result result = {0};
    int rc = strategy->replay(cc, &result);
    if (rc)
        return rc;
    rc = cc_commit_flushed(cc->region.control, record);
    if (rc)
        return rc;
    report->action = COLOCACHE_RECOVERED_REPLAYED;
    report->n_pages = result.n_pages;
    snprintf(report->sentence, sizeof report->sentence,
             "epoch %llu was sealed but not committed: replayed its flush, %llu pages; guest RAM and device state are epoch %llu",
             (unsigned long long)record->epoch, (unsigned long long)result.n_pages, (unsigned long long)record->epoch);
    return 0;
}

static int restart(struct colocache *cc, const struct cc_record *record, struct colocache_recovery *report)
{
    int rc = cc_guest_copy_all(cc, &report->n_pages);
    report->action = COLOCACHE_RECOVERED_RESTART;
    snprintf(report->sentence, sizeof report->sentence,
             "epoch %llu is committed and no newer page had come: restarted from epoch %llu, %llu pages copied from the cache",
             (unsigned long long)record->epoch, (unsigned long long)record->epoch, (unsigned long long)report->n_pages);
    return rc;
}

static int no_restart(struct colocache *cc, const struct cc_record *record, struct colocache_recovery *report)
{
    report->action = COLOCACHE_RECOVERED_NO_RESTART;
    report->epoch = 0;
    snprintf(report->sentence, sizeof report->sentence,
             "cannot restart: pages of epoch %llu had already come over epoch %llu and the VM that ran is gone; the next checkpoint makes "
             "the secondary whole",
             (unsigned long long)report->receiving_epoch, (unsigned long long)record->epoch);
    int rc = colocache_dirty_log_lost(cc);
    CC_CRASH_POINT("attach: every page counts as written");
    return rc;
}

/* forget_private -- bounded: where the VM is mapped already (firmware, a test), what it has written is of no epoch */
static int forget_private(struct colocache *cc)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]))
            rc = colocache_private_forget(cc->blocks[i].guest.vm_addr, cc->blocks[i].len_bytes);
    }
    return rc;
}

static int restart_bounded(const struct cc_record *record, struct colocache_recovery *report)
{
    report->action = COLOCACHE_RECOVERED_RESTART;
    snprintf(report->sentence, sizeof report->sentence,
             "epoch %llu is committed and guest RAM is exactly that: restarted from epoch %llu%s", (unsigned long long)record->epoch,
             (unsigned long long)record->epoch, report->receiving_epoch > record->epoch ? "; what had come since is sent again" : "");
    return 0;
}

/* recover -- by the table above */
static int recover(struct colocache *cc, uint64_t receiving, struct colocache_recovery *report)
{
    struct cc_record record;
    int rc = cc_commit_read(cc->region.control, &record);
    if (rc < 0)
        return rc;
    report->receiving_epoch = receiving;
    report->epoch = record.epoch;
    if (cc->bounded) {
        int forgotten = forget_private(cc);
        if (forgotten)
            return forgotten;
    }
    if (rc == 0) {
        start_again(cc);
        report->action = COLOCACHE_RECOVERED_NOTHING;
        snprintf(report->sentence, sizeof report->sentence, "no epoch was sealed yet: the initial copy starts again");
        if (cc->bounded)
            cc_epoch_empty_cache(cc);
        return 0;
    }
    const struct cc_strategy *strategy = cc_strategy_find(record.strategy);
    if (!strategy)
        return cc_fail(COLOCACHE_E_STRATEGY,
                       "epoch %llu was sealed for flush strategy %u, which this build does not have: attach with the "
                       "build that sealed it",
                       (unsigned long long)record.epoch, record.strategy);
    if (strategy->bounded != cc->bounded)
        return cc_fail(COLOCACHE_E_CORRUPT, "epoch %llu was sealed for flush strategy %u, which is not for this region's memory mode",
                       (unsigned long long)record.epoch, record.strategy);
    if (report->receiving_epoch < record.epoch)
        return cc_fail(COLOCACHE_E_CORRUPT, "epoch %llu is sealed but only epoch %llu was ever received", (unsigned long long)record.epoch,
                       (unsigned long long)report->receiving_epoch);
    rc = verify(cc, &record);
    if (rc)
        return rc;
    if (!record.committed && report->receiving_epoch > record.epoch)
        return cc_fail(COLOCACHE_E_CORRUPT,
                       "epoch %llu is sealed and not committed, but pages of epoch %llu came: the cache can't be trusted",
                       (unsigned long long)record.epoch, (unsigned long long)report->receiving_epoch);
    rc = cc_spill_find(cc, &record);
    if (rc)
        return rc;
    CC_CRASH_POINT("attach: all is verified");
    rebuild_summaries(cc);
    if (!record.committed)
        rc = replay(cc, strategy, &record, report);
    else if (cc->bounded)
        rc = restart_bounded(&record, report);
    else if (report->receiving_epoch == record.epoch)
        rc = restart(cc, &record, report);
    else
        return no_restart(cc, &record, report);
    if (rc == 0 && cc->bounded) {
        cc_flush_set_forget(cc);
        cc_epoch_empty_cache(cc);
    }
    if (rc == 0)
        cc_epoch_recovered(cc);
    return rc;
}

int colocache_attach(int control_fd, const struct colocache_options *options, const struct colocache_images *images, uint32_t n_images,
                     struct colocache_recovery *report, struct colocache **out)
{
    struct colocache *cc;
    struct colocache_recovery found = {0};
    struct cc_control_values values;
    struct stat st;
    if (!out || (n_images && !images))
        return cc_fail(COLOCACHE_E_ARGUMENT, "out or images is NULL");
    *out = NULL;
    int rc = cc_handle_open(control_fd, false, options, &cc);
    if (rc)
        return rc;
    if (fstat(cc->region.fd, &st) != 0)
        rc = cc_fail_errno("fstat of the control region");
    if (rc == 0)
        rc = cc_control_check(cc->region.control, (uint64_t)st.st_size, &values);
    if (rc == 0 && values.taken_over)
        rc = cc_fail(COLOCACHE_E_FAILED_OVER, "this secondary took over and its process ended: there is no older state to go back to");
    if (rc == 0)
        rc = bind_blocks(cc, images, n_images, values.n_blocks, (uint64_t)st.st_size);
    if (rc == 0)
        rc = recover(cc, values.receiving, &found);
    if (rc) {
        cc_handle_free(cc);
        return rc;
    }
    cc_log(cc, COLOCACHE_LOG_INFO, "%s", found.sentence);
    if (report)
        *report = found;
    *out = cc;
    return 0;
}
