/* SPDX-License-Identifier: Apache-2.0 */
/* forget.h -- private copies of a VM's pages go, with as little of it in the pause as can be. */
#ifndef CC_FORGET_H
#define CC_FORGET_H

#include <stdbool.h>
#include <stdint.h>

/* Of one mapping: what was put aside, and which way is the cheaper for this VM. */
struct cc_forget {
    void *aside; /* private pages of an epoch that is over, at another address; NULL: none */
    uint64_t aside_bytes, used_bytes;
    uint8_t *used;     /* where in it they are */
    bool whole;        /* next time everything is put aside, unseen */
    bool cannot;       /* be put aside: that failed once */
    uint32_t in_a_row; /* forgotten run by run so many times, though that was not cheap */
};

/* The mapping shows its file again; its VM stands.  0, -errno; -EINVAL: its memory is locked. */
int cc_forget(struct cc_forget *forget, void *addr, uint64_t len_bytes);
/* What was put aside is looked at, for the next time, and freed; the VM may run. */
void cc_forget_rest(struct cc_forget *forget);
void cc_forget_drop(struct cc_forget *forget); /* freed, unseen */

#endif
