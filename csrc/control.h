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
    uint64_t device_reserved[2]; /* bytes of each device-state area that this process knows to be there */
    uint64_t head_bytes;         /* mapped from offset 0: head, table, device areas */
    uint64_t device_state_max_bytes;
    uint64_t end_bytes; /* first byte after the last block's bitmaps */
};

/* What the words of the head say. */
struct cc_control_values {
    uint64_t device_state_max_bytes, n_blocks, receiving, taken_over;
};

static inline uint64_t cc_control_head_bytes(uint64_t device_state_max_bytes)
{
    return CC_DEVICES_OFFSET + 2 * cc_round_to_page(device_state_max_bytes);
}

int cc_control_open(struct cc_region *region, int control_fd, int lock_fd, bool create, uint64_t device_max, bool bounded);
void cc_control_close(struct cc_region *region);
void cc_control_unlock(struct cc_region *region); /* somebody else may own it; the mapping stays */
/* Magic, version, stamp, words, sizes, reserved bytes of a region whose file has file_bytes.  E_NOT_COLOCACHE, E_LAYOUT, E_CORRUPT. */
int cc_control_check(const struct cc_control *control, uint64_t file_bytes, struct cc_control_values *out);
/* By read(2), which allocates nothing.  0, E_NOT_COLOCACHE when the file ends before, -errno. */
int cc_control_read(int fd, uint64_t offset, void *to, uint64_t n_bytes);
/* Another history: whoever saw the one before is no peer of what comes now. */
void cc_control_new_history(struct cc_control *control);

#endif
