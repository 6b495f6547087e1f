/* SPDX-License-Identifier: Apache-2.0 */
/*
 * source.h -- what all dirty sources share.  A source knows a log (KVM's, the kernel's) and hands its words on; whoever takes them
 * (dirty_log.c on a secondary, sender.c on a primary) knows blocks.
 *
 * A new source is one file: a struct that begins with struct colocache_source, its sync and close, and a colocache_source_* that makes it.
 */
#ifndef CC_SOURCE_H
#define CC_SOURCE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "colocache.h"

#define CC_SOURCE_PAGE 4096u /* what every source tracks; a block with other pages is refused by whoever takes */
#define CC_SOURCE_PARTS_MAX 65536u
#define CC_SOURCE_PAGES_MAX (COLOCACHE_BLOCK_BYTES_MAX / CC_SOURCE_PAGE) /* of a slot or range */

/* Words of a log: bit 0 of words[0] is page first_pfn of the block.  0, or an error and nothing was taken. */
typedef int cc_take_fn(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words);

struct cc_kept; /* words that were taken before slots were changed, and are handed on with the next sync */

struct colocache_source {
    /* Get what was written since the last clear and hand it on; then clear.  `take` may be called several times a block.  If it fails
     * the bits are still in the log, or kept for the next sync; where a get has cleared them already, E_LOG_LOST. */
    int (*sync)(struct colocache_source *source, cc_take_fn *take, void *context);
    void (*close)(struct colocache_source *source);
    /* Of a source with KVM slots: these from now on; 0, or an error and those from before.  Nothing is logged that was not taken. */
    int (*set_slots)(struct colocache_source *source, const struct colocache_kvm_slot *slots, uint32_t n_slots);
    pthread_mutex_t lock; /* of the two below: a ring source is synced by several threads */
    struct cc_kept *kept;
    bool changing; /* between change_begin and change_end */
};

/* Fill in what every source has; `set_slots` may be NULL. */
void cc_source_init(struct colocache_source *source, int (*sync)(struct colocache_source *, cc_take_fn *, void *),
                    void (*close)(struct colocache_source *),
                    int (*set_slots)(struct colocache_source *, const struct colocache_kvm_slot *, uint32_t));
/* What whoever takes calls: what was kept first, then the log.  E_ORDER while slots are changed. */
int cc_source_sync(struct colocache_source *source, cc_take_fn *take, void *context);

/* Would `take` have these pages?  Asked for all parts of a log before the first is got: a part that fits no block is then found
 * while nothing is lost. */
int cc_source_fits(cc_take_fn *take, void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages);
/* For whoever takes: has the block pages of the size that sources track?  0 or E_LENGTH. */
int cc_source_page_size(const char *block_name, uint32_t page_size);
/* What a source says when pages fit and `take` failed all the same: E_LOG_LOST. */
int cc_source_not_taken(const char *log);
/* E_LOG_LOST for a call of the kernel that failed; errno says how. */
int cc_source_lost(const char *call);
/* KVM slots as a caller gives them: their number and the length of each. */
int cc_source_check_slots(const struct colocache_kvm_slot *slots, uint32_t n_slots);

#endif
