/* SPDX-License-Identifier: Apache-2.0 */
/*
 * inspect.c -- looking at a region that somebody else owns: no lock, nothing written, nothing believed, and nothing mapped.
 *
 * It is read by read(2): through a mapping a hole would be allocated (on a full file system a SIGBUS), and so would be what an owner cuts
 * off at that moment.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "bitmap.h"
#include "block.h"
#include "commit.h"
#include "control.h"
#include "error.h"
#include "inspect.h"
#include "version.h"
#include "word.h"

#define TRIES_MAX 1000    /* at a region that changes under our eyes */
#define CHUNK_WORDS 8192u /* of a bitmap at a time */

int cc_inspect_head(const struct cc_control *control, struct colocache_status *out, struct cc_record *record)
{
    int rc = cc_commit_read(control, record);
    if (rc >= 0)
        rc = cc_word_read("newest received epoch", &control->receiving, &out->receiving_epoch);
    if (rc == 0)
        rc = cc_word_read("device-state bound", &control->device_state_max_bytes, &out->device_state_max_bytes);
    uint64_t n_blocks = 0;
    if (rc == 0)
        rc = cc_word_read("number of blocks", &control->n_blocks, &n_blocks);
    if (rc < 0)
        return rc;
    out->n_blocks = (uint32_t)n_blocks;
    memcpy(out->history_id, control->history_id, sizeof out->history_id);
    out->sealed_epoch = record->epoch;
    out->committed_epoch = record->committed ? record->epoch : record->committed_before;
    out->device_state_bytes = record->device_bytes;
    out->attachment_slot = record->attachment_slot;
    out->attachment_bytes = record->attachment_bytes;
    out->attachment_checksum = record->attachment_checksum;
    out->spilled_bytes = record->committed ? 0 : record->spill_bytes;
    out->owner_pid = control->owner_pid;
    out->memory_mode = control->memory_mode == CC_MEMORY_BOUNDED ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR;
    return 0;
}

/* What is read of a region at a time. */
struct look {
    union {
        struct cc_control control;
        uint8_t bytes[CC_PAGE];
    } head;
    uint64_t file_bytes;
    struct cc_block_entry table[COLOCACHE_BLOCKS_MAX];
    uint64_t words[CHUNK_WORDS];
};

static int read_head(int fd, struct look *look)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return cc_fail_errno("fstat of the control region");
    look->file_bytes = (uint64_t)st.st_size;
    if (look->file_bytes < CC_DEVICES_OFFSET)
        return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "%llu bytes are too few for a control region", (unsigned long long)look->file_bytes);
    return cc_control_read(fd, 0, &look->head, sizeof look->head);
}

/* count_bits -- straight from the words: the owner may be at work on the summaries, or dead in the middle of it */
static int count_bits(int fd, uint64_t offset, uint64_t n_words, struct look *look, uint64_t *count)
{
    for (uint64_t w = 0; w < n_words; w += CHUNK_WORDS) {
        const uint64_t n = n_words - w < CHUNK_WORDS ? n_words - w : CHUNK_WORDS;
        int rc = cc_control_read(fd, offset + w * 8, look->words, n * 8);
        if (rc)
            return rc;
        for (uint64_t i = 0; i < n; i++)
            *count += (uint64_t)__builtin_popcountll(look->words[i]);
    }
    return 0;
}

static int inspect_block(int fd, const struct cc_block_entry *entry, struct look *look, struct colocache_block_info *out)
{
    memset(out, 0, sizeof *out);
    memcpy(out->name, entry->name, sizeof out->name);
    out->len_bytes = entry->len_bytes;
    out->page_size = entry->page_size;
    out->sparse = entry->sparse;
    out->n_pages = entry->len_bytes / entry->page_size;
    uint64_t *counts[CC_BITMAPS] = {&out->pvm_pages, &out->svm_pages, &out->flush_pages};
    const uint64_t n_words = cc_words_for(out->n_pages);
    int rc = 0;
    for (uint32_t kind = 0; rc == 0 && kind < CC_BITMAPS; kind++)
        rc = count_bits(fd, entry->bitmap_offset + cc_block_words_offset(out->n_pages, kind), n_words, look, counts[kind]);
    return rc;
}

/* inspect_once -- after read_head */
static int inspect_once(int fd, struct look *look, struct colocache_status *status, struct colocache_block_info *blocks, uint32_t room)
{
    const struct cc_control *control = &look->head.control;
    struct cc_control_values values;
    struct cc_record record;
    memset(status, 0, sizeof *status);
    int rc = cc_control_check(control, look->file_bytes, &values);
    if (rc == 0)
        rc = cc_inspect_head(control, status, &record);
    if (rc == 0)
        rc = cc_control_read(fd, CC_TABLE_OFFSET, look->table, values.n_blocks * sizeof look->table[0]);
    if (rc == 0)
        rc = cc_block_check_table(look->table, values.n_blocks, cc_control_head_bytes(values.device_state_max_bytes), look->file_bytes,
                                  &status->control_bytes);
    if (rc)
        return rc;
    status->phase = values.taken_over   ? COLOCACHE_PHASE_FAILED_OVER
                    : record.epoch == 0 ? COLOCACHE_PHASE_EMPTY
                    : record.committed  ? COLOCACHE_PHASE_LIVE
                                        : COLOCACHE_PHASE_SEALING;
    for (uint32_t i = 0; i < status->n_blocks; i++) {
        struct colocache_block_info info = {0}; /* of a block that was removed: no name, no pages */
        if (cc_commit_has_block(&record, i))
            rc = inspect_block(fd, &look->table[i], look, &info);
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

/* inspect_settled -- what does not fit while an owner is at work is no damage: it is what changed under our eyes.  Damage stays. */
static int inspect_settled(int fd, struct look *look, struct colocache_status *status, struct colocache_block_info *blocks, uint32_t room)
{
    uint8_t before[CC_PAGE];
    for (int tries = 0;; tries++) {
        int rc = read_head(fd, look);
        if (rc)
            return rc;
        const uint64_t file_bytes = look->file_bytes;
        memcpy(before, look->head.bytes, sizeof before);
        int found = inspect_once(fd, look, status, blocks, room);
        if (found != COLOCACHE_E_CORRUPT && found != COLOCACHE_E_NOT_COLOCACHE)
            return found;
        rc = read_head(fd, look);
        if (rc)
            return rc;
        bool moved = file_bytes != look->file_bytes || memcmp(before, look->head.bytes, sizeof before) != 0;
        if (!moved || tries == TRIES_MAX)
            return inspect_once(fd, look, status, blocks, room); /* with its own sentence */
    }
}

int colocache_inspect(int control_fd, struct colocache_status *out, struct colocache_block_info *blocks, uint32_t *n_blocks)
{
    struct colocache_status status;
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    struct look *look = calloc(1, sizeof *look);
    if (!look)
        return cc_fail(-ENOMEM, "no memory to look at a control region");
    int rc = inspect_settled(control_fd, look, &status, blocks, n_blocks ? *n_blocks : 0);
    free(look);
    if (rc)
        return rc;
    if (n_blocks)
        *n_blocks = status.n_blocks;
    return cc_give_struct(out, &status, sizeof status, "status");
}
