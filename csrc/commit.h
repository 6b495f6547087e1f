/* SPDX-License-Identifier: Apache-2.0 */
/* commit.h -- the commit word and its two records; the word and what it promises are at the head of commit.c. */
#ifndef CC_COMMIT_H
#define CC_COMMIT_H

#include <stdbool.h>

#include "layout.h"

/* Has the region block `n` of its table still?  One that came after the record, or before there was any, it has. */
static inline bool cc_commit_has_block(const struct cc_record *record, uint64_t n)
{
    return n >= record->n_blocks || record->blocks[n / 64] >> (n % 64) & 1;
}

/* The record that is named: 1 there is one, 0 nothing was ever sealed (*out is zero), E_CORRUPT.  Any thread, also while one publishes. */
int cc_commit_read(const struct cc_control *control, struct cc_record *out);
/* Make `record` the valid one.  Everything it speaks of is in place already.  0, or E_CORRUPT and nothing was written. */
int cc_commit_publish(struct cc_control *control, struct cc_record *record);
/* Guest RAM is the epoch of `record`, page for page: say so. */
int cc_commit_flushed(struct cc_control *control, struct cc_record *record);

#endif
