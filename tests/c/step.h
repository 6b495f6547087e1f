/* SPDX-License-Identifier: Apache-2.0 */
/*
 * step.h -- a child process run one instruction at a time, and each change that it makes to shared memory.
 *
 * The library is the one that ships, without crash points: what is found here does not depend on where somebody thought of putting one.
 */
#ifndef STEP_H
#define STEP_H

#include "crash_world.h"

enum area { CONTROL, GUEST, CACHE };

/* What one instruction, or one system call, did to one area. */
struct change {
    enum area area;
    uint32_t offset, n_bytes;
    size_t bytes_at;  /* in the recording's bytes */
    uint64_t next_pc; /* of the instruction after it: for addr2line */
};

/* One stretch from step_begin to step_end. */
struct stretch {
    struct picture *before;
    size_t first_change, n_changes;
};

enum { STRETCHES_MAX = 32 };

struct recording {
    struct stretch stretches[STRETCHES_MAX];
    unsigned n_stretches;
    struct change *changes;
    size_t n_changes, changes_room;
    uint8_t *bytes;
    size_t n_bytes, bytes_room;
    uint64_t n_instructions;
};

/* In the child: from here on one instruction at a time, and no more. */
void step_begin(void);
void step_end(void);

/* Runs work(context) in a child to its end; 0, -1 if it did not end with status 0, -2 if this machine allows no tracing. */
int step_child(const struct memory *memory, void (*work)(void *context), void *context, struct recording *out);
/* Applies one change to a picture. */
void step_apply(const struct recording *recording, const struct change *change, struct picture *picture);
void step_free(struct recording *recording);

#endif
