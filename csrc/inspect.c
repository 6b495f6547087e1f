/* SPDX-License-Identifier: Apache-2.0 */
/* inspect.c -- looking at a region that somebody else owns: no lock, nothing written, nothing believed. */
#define _GNU_SOURCE /* SEEK_DATA */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "block.h"
#include "commit.h"
#include "control.h"
#include "error.h"
#include "inspect.h"
#include "version.h"

#define TRIES_MAX 1000 /* at a region that changes under our eyes */

int cc_inspect_head(const struct cc_control *control, struct colocache_status *out, struct cc_record *record)
{
    int rc = cc_commit_read(control, record);
    if (rc < 0)
        return rc;
    memcpy(out->history_id, control->history_id, sizeof out->history_id);
    out->n_blocks = (uint32_t)cc_observe(&control->n_blocks);
    out->sealed_epoch = record->epoch;
    out->committed_epoch = record->committed ? record->epoch : record->committed_before;
    out->receiving_epoch = cc_observe(&control->receiving);
    out->device_state_bytes = record->device_bytes;
    out->device_state_max_bytes = control->device_state_max_bytes;
    out->control_bytes = control->bitmap_end;
    out->owner_pid = control->owner_pid;
    out->memory_mode = control->memory_mode == CC_MEMORY_BOUNDED ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR;
    return 0;
}

/* count_bits -- of the words in [begin, end) of the file.  Holes are skipped: the file may be a stranger's, as long as it likes. */
static int count_bits(int fd, uint64_t begin, uint64_t end, uint64_t *count)
{
    uint64_t words[512];
    while (begin < end) {
        off_t data = lseek(fd, (off_t)begin, SEEK_DATA);
        if (data < 0 && errno == ENXIO) /* a hole up to the end */
            return 0;
        if (data >= 0 && (uint64_t)data > begin)
            begin = (uint64_t)data / 8 * 8;
        if (begin >= end)
            return 0;
        uint64_t n_bytes = end - begin < sizeof words ? end - begin : sizeof words;
        int rc = cc_control_read(fd, words, n_bytes, begin);
        if (rc)
            return rc;
        for (uint64_t w = 0; w < n_bytes / 8; w++)
            *count += (uint64_t)__builtin_popcountll(words[w]);
        begin += n_bytes;
    }
    return 0;
}

/* inspect_block -- counts straight from the words: the owner may be at work on the summaries, or dead in the middle of it */
static int inspect_block(int fd, const struct cc_block_entry *entry, struct colocache_block_info *out)
{
    memset(out, 0, sizeof *out);
    memcpy(out->name, entry->name, sizeof out->name);
    out->len_bytes = entry->len_bytes;
    out->page_size = entry->page_size;
    out->sparse = entry->sparse;
    out->n_pages = entry->len_bytes / entry->page_size;
    uint64_t *counts[CC_BITMAPS] = {&out->pvm_pages, &out->svm_pages, &out->flush_pages};
    for (uint32_t kind = 0; kind < CC_BITMAPS; kind++) {
        uint64_t begin = entry->bitmap_offset + cc_block_words_offset(out->n_pages, kind);
        int rc = count_bits(fd, begin, begin + cc_words_for(out->n_pages) * 8, counts[kind]);
        if (rc)
            return rc;
    }
    return 0;
}

static int inspect_blocks(int fd, const struct cc_block_entry *table, uint64_t file_bytes, struct colocache_status *status,
                          struct colocache_block_info *blocks, uint32_t room)
{
    for (uint32_t i = 0; i < status->n_blocks; i++) {
        struct colocache_block_info info;
        int rc = cc_block_check_entry(&table[i], file_bytes);
        if (rc == 0)
            rc = inspect_block(fd, &table[i], &info);
        if (rc)
            return rc;
        status->pvm_pages += info.pvm_pages;
        status->svm_pages += info.svm_pages;
        status->flush_pages += info.flush_pages;
        if (blocks && i < room)
            blocks[i] = info;
    }
    return 0;
}

/* What an owner changes while it lives.  The file is enlarged before anything speaks of what lies there. */
struct changing {
    uint64_t file_bytes, n_blocks, bitmap_end, commit_word;
};

/* read_head -- a copy of the head and, if wanted, of the table behind it, and what of it may have changed a moment later */
static int read_head(int control_fd, void *head, uint64_t n_bytes, struct changing *out)
{
    const struct cc_control *control = head;
    struct stat st;
    int rc = cc_control_read(control_fd, head, n_bytes, 0);
    if (rc)
        return rc;
    memset(out, 0, sizeof *out); /* compared as bytes */
    out->commit_word = control->commit_word;
    out->n_blocks = control->n_blocks;
    out->bitmap_end = control->bitmap_end;
    if (fstat(control_fd, &st) != 0) /* last: at least what the three need */
        return cc_fail_errno("fstat of the control region");
    out->file_bytes = (uint64_t)st.st_size;
    return 0;
}

/* inspect_once -- in a region that was file_bytes long a moment ago */
static int inspect_once(int control_fd, const struct cc_control *control, uint64_t file_bytes, struct colocache_status *status,
                        struct colocache_block_info *blocks, uint32_t room)
{
    struct cc_record record;
    memset(status, 0, sizeof *status);
    int rc = cc_control_check(control, file_bytes);
    if (rc == 0)
        rc = cc_inspect_head(control, status, &record);
    if (rc)
        return rc;
    status->phase = cc_observe(&control->taken_over) ? COLOCACHE_PHASE_FAILED_OVER
                    : record.epoch == 0              ? COLOCACHE_PHASE_EMPTY
                    : record.committed               ? COLOCACHE_PHASE_LIVE
                                                     : COLOCACHE_PHASE_SEALING;
    return inspect_blocks(control_fd, (const void *)((const uint8_t *)control + CC_TABLE_OFFSET), file_bytes, status, blocks, room);
}

int colocache_inspect(int control_fd, struct colocache_status *out, struct colocache_block_info *blocks, uint32_t *n_blocks)
{
    struct colocache_status status;
    struct changing before, after;
    struct cc_control now;
    struct stat st;
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    if (fstat(control_fd, &st) != 0)
        return cc_fail_errno("fstat of the control region");
    if ((uint64_t)st.st_size < CC_DEVICES_OFFSET)
        return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "%llu bytes are too few for a control region", (unsigned long long)st.st_size);
    struct cc_control *control = calloc(1, CC_DEVICES_OFFSET);
    if (!control)
        return cc_fail(-ENOMEM, "no memory for a copy of the control region's head");
    int rc = 0;
    for (int tries = 0; rc == 0; tries++) {
        rc = read_head(control_fd, control, CC_DEVICES_OFFSET, &before);
        if (rc)
            break;
        int found = inspect_once(control_fd, control, before.file_bytes, &status, blocks, n_blocks ? *n_blocks : 0);
        rc = read_head(control_fd, &now, sizeof now, &after);
        /* What does not fit while an owner is at work is no damage: it is what changed under our eyes.  Damage stays. */
        bool moved = memcmp(&before, &after, sizeof before) != 0;
        if (rc == 0 && (found != COLOCACHE_E_CORRUPT || !moved || tries == TRIES_MAX)) {
            rc = found;
            break;
        }
    }
    free(control);
    if (rc)
        return rc;
    if (n_blocks)
        *n_blocks = status.n_blocks;
    return cc_give_struct(out, &status, sizeof status, "status");
}
