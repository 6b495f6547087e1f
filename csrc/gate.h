/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gate.h -- many go through, one can close it and be alone.
 *
 * Receivers and markers pass through a gate with one atomic add; the conductor closes it, waits until all are out,
 * and may then touch bitmaps with plain loads and stores.  No lock per page, no reader waits unless it is closed.
 */
#ifndef CC_GATE_H
#define CC_GATE_H

#include <stdint.h>

struct cc_gate {
    uint32_t word; /* CC_GATE_CLOSED | how many are inside; the futex word */
};

#define CC_GATE_CLOSED 0x80000000u

void cc_gate_enter(struct cc_gate *gate); /* waits while it is closed */
void cc_gate_leave(struct cc_gate *gate);
void cc_gate_close(struct cc_gate *gate); /* returns when nobody is inside; one closer at a time */
/* 0: closed; else it is open again, and so many were inside all the time allowed. */
uint32_t cc_gate_close_within(struct cc_gate *gate, uint64_t longest_ns);
void cc_gate_open(struct cc_gate *gate);

#endif
