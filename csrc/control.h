/* SPDX-License-Identifier: Apache-2.0 */
/* control.h -- the control region of one secondary, open, locked and mapped.  Knows no handle and no blocks. */
#ifndef CC_CONTROL_H
#define CC_CONTROL_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

struct cc_region {
    int fd; /* own open file description: carries the lock; -1: none */
    struct cc_control *control;
    struct cc_block_entry *table;
    uint8_t *devices;
    uint64_t head_bytes; /* mapped from offset 0: head, table, device areas */
};

int cc_control_open(struct cc_region *region, int control_fd, int lock_fd, bool create, uint64_t device_max, bool bounded);
void cc_control_close(struct cc_region *region);
void cc_control_unlock(struct cc_region *region); /* somebody else may own it; the mapping stays */
/* Magic, version, stamp, sizes, reserved bytes of a region whose file has file_bytes. */
int cc_control_check(const struct cc_control *control, uint64_t file_bytes);
/* n_bytes of the file as they are now, without a mapping: reading a hole through one needs memory that a full file system lacks, and
 * reading past the end of a file that shrinks is SIGBUS too.  E_NOT_COLOCACHE: it is shorter. */
int cc_control_read(int fd, void *to, uint64_t n_bytes, uint64_t offset);
/* Another history: whoever saw the one before is no peer of what comes now. */
void cc_control_new_history(struct cc_control *control);

#endif
