/* SPDX-License-Identifier: Apache-2.0 */
/*
 * commit.c -- the commit word and its two records.
 *
 * The word is a generation with its check (word.h); its lowest bit names the record that is valid.  A new record is written into the other one,
 * complete with its checksum, and then the word is stored with release order: one aligned 64-bit store, which no
 * death of a process can tear.  So at every instant exactly one record is named, and it is complete.  A named record
 * whose checksum fails is therefore damage, never a crash: it is refused, and the older record is never used.
 */
#include "commit.h"

#include <string.h>

#include "atomics.h"
#include "checksum.h"
#include "colocache.h"
#include "error.h"
#include "fault.h"
#include "word.h"

static uint64_t record_checksum(const struct cc_record *record)
{
    return cc_checksum(record, offsetof(struct cc_record, checksum));
}

int cc_commit_read(const struct cc_control *control, struct cc_record *out)
{
    uint64_t generation, word = cc_observe(&control->commit_word);
    for (;;) {
        int rc = cc_word_value("commit word", word, &generation);
        if (rc)
            return rc;
        if (word == 0) {
            memset(out, 0, sizeof *out);
            uint64_t written = cc_observe(&control->records[0].generation); /* record 0 is first written when the generation is 1 */
            word = cc_observe(&control->commit_word);
            if (word == 0)
                return written == 0 ? 0
                                    : cc_fail(COLOCACHE_E_CORRUPT, "the commit word is 0 but record %llu was written: not used",
                                              (unsigned long long)written);
            continue;
        }
        cc_observe_words(out, &control->records[generation & 1], sizeof *out / 8);
        uint64_t now = cc_observe(&control->commit_word);
        if (now == word)
            break;
        word = now; /* two records were published meanwhile, perhaps over what was read */
    }
    uint64_t expected = record_checksum(out);
    if (out->checksum != expected)
        return cc_fail(COLOCACHE_E_CORRUPT, "commit record %llu has checksum %016llx, computed %016llx: not used", (unsigned long long)word,
                       (unsigned long long)out->checksum, (unsigned long long)expected);
    uint64_t device_max;
    int rc = cc_word_read("device-state bound", &control->device_state_max_bytes, &device_max);
    if (rc)
        return rc;
    if (out->generation != generation || out->epoch == 0 || out->epoch > COLOCACHE_EPOCH_MAX || out->committed > 1 ||
        out->device_area > 1 || out->device_bytes > device_max || out->attachment_slot > 1 || out->spill_pages > out->flush_pages ||
        (out->spill_pages == 0 && (out->spill_bytes | out->spill_checksum | out->spill_device | out->spill_inode)))
        return cc_fail(COLOCACHE_E_CORRUPT, "commit record %llu does not fit its region (generation %llu, epoch %llu): not used",
                       (unsigned long long)generation, (unsigned long long)out->generation, (unsigned long long)out->epoch);
    uint64_t n_blocks, reserved = out->reserved1; /* the count is stored before a record that knows it, and only grows */
    for (size_t i = 0; i < sizeof out->reserved / sizeof *out->reserved; i++)
        reserved |= out->reserved[i];
    rc = cc_word_read("number of blocks", &control->n_blocks, &n_blocks);
    if (rc)
        return rc;
    for (uint64_t n = 0; n < COLOCACHE_BLOCKS_MAX && out->n_blocks <= n_blocks; n++)
        reserved |= n >= out->n_blocks && (out->blocks[n / 64] >> (n % 64) & 1);
    if (out->n_blocks > n_blocks || reserved)
        return cc_fail(COLOCACHE_E_CORRUPT, "commit record %llu has %llu blocks of %llu, or reserved bytes that are not zero: not used",
                       (unsigned long long)generation, (unsigned long long)out->n_blocks, (unsigned long long)n_blocks);
    return 1;
}

int cc_commit_publish(struct cc_control *control, struct cc_record *record)
{
    uint64_t before;
    int rc = cc_word_read("commit word", &control->commit_word, &before);
    if (rc)
        return rc;
    const uint64_t generation = before + 1; /* two an epoch: at a checkpoint a millisecond its 48 bits last for 4,000 years */
    record->generation = generation;
    record->checksum = record_checksum(record);
    CC_CRASH_POINT("commit: before the record");
    CC_HALF(&control->records[generation & 1], record, sizeof *record, "commit: half a record");
    cc_publish_words(&control->records[generation & 1], record, sizeof *record / 8);
    CC_CRASH_POINT("commit: before the word");
    cc_word_publish(&control->commit_word, generation); /* from here on the epoch is what an attach finds */
    CC_CRASH_POINT("commit: after the word");
    return 0;
}

int cc_commit_flushed(struct cc_control *control, struct cc_record *record)
{
    record->committed = 1;
    record->flush_checksum = 0; /* the flush set may be written again from here on */
    return cc_commit_publish(control, record);
}
