/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h -- the handle, and who writes what.  Data only: what a room does stands in its own header.
 *
 *   what                                   its only writer     readers
 *   cache bytes, PVM bits                  receive.c           flush_set.c, flush_copy.c, guest_pages.c, validate.c
 *   holes in a bounded cache               staging.c           flush_staged.c, sparse.c
 *   the spill file                         spill.c             spill.c
 *   SVM bits                               dirty_log.c         flush_set.c
 *   flush set; clearing of any bit         flush_set.c         flush_copy.c, recover.c, validate.c
 *   guest RAM                              flush_copy.c (the strategy), guest_pages.c (preflush, restart); give_back.c; the VM
 *   device-state areas                     the caller, at the address device_state.c gave out
 *   commit word, records                   commit.c            everybody
 *   `receiving`, `taken_over`; state, open epoch, staged device state, receive gate   epoch.c   everybody
 *   table, n_blocks                        block_change.c            everybody
 *   magic, sizes, history id, owner        control.c           everybody
 *
 * Setting a bit and clearing it are two writers of one word: sets are atomic and come through a gate, clears are flush_set.c's while
 * both gates are closed (or, in preflush, takes that no set can be lost to: atomics.h).
 * Locks: none in shared memory but the owner's.  In the process: `opening` (first page of an epoch), two gates.
 * Order of the gates: receiving before marking; never both waited for by somebody inside one of them.
 */
#ifndef CC_INTERNAL_H
#define CC_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* OFD locks, fallocate, sched_getaffinity */
#endif

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "atomics.h"
#include "bitmap.h"
#include "colocache.h"
#include "control.h"
#include "forget.h"
#include "gate.h"
#include "image.h"
#include "layout.h"
#include "page_copy.h"
#include "pool.h"

/* A block that was removed keeps its index, which is not given to another: the wire and the bitmaps' places go by it. */
enum cc_standing {
    CC_HERE = 0,
    CC_LEAVING, /* as ever, but the next epoch that is sealed is without it */
    CC_GONE     /* sealed: nothing of it is touched any more, and its memory is let go when the VM is loaded */
};

struct cc_block {
    uint32_t standing; /* enum cc_standing; GONE is stored with both gates closed, so inside one it does not change to it */
    char name[COLOCACHE_NAME_BYTES];
    uint64_t len_bytes, n_pages;
    uint32_t page_size, page_shift;
    bool sparse;
    struct cc_image guest, cache;
    struct cc_bitmap bitmaps[CC_BITMAPS]; /* enum colocache_bitmap_kind */
    void *bitmap_map;
    uint64_t bitmap_map_bytes;
    bool keeps_holes;         /* sparse, on 4 KiB pages that can be given back one by one (sparse.h) */
    uint64_t *allocated;      /* sparse: pages whose both images are allocated (this process's knowledge) */
    uint64_t *punched;        /* sparse: pages of guest RAM that were given back since `allocated` was asked last */
    struct cc_bitmap *staged; /* bounded: pages whose range of the cache may hold data (staging.h); else NULL */
    uint64_t *staged_words;
    struct cc_bitmap *spilled; /* with a spill file: pages whose newest bytes are in it (spill.h); else NULL */
    uint64_t *spilled_words;
    uint64_t spill_offset;   /* of its part of that file */
    struct cc_forget forget; /* bounded: the private pages of the VM's mapping */
};

/* The device state being written for an epoch that is not sealed. */
struct cc_staged {
    uint64_t epoch; /* 0 = none */
    uint64_t len_bytes;
    uint32_t area;
};

/* The open epoch and what may be done with it: epoch.c's alone. */
struct cc_epoch {
    _Alignas(64) uint32_t state;      /* enum cc_state */
    _Alignas(64) struct cc_gate gate; /* receivers */
    _Alignas(64) uint64_t open;       /* 0 = none */
    uint64_t received_pages;          /* of the open epoch, or of the last that was */
    uint64_t received_before;         /* of all epochs before it */
    uint64_t n_given_up;
    struct cc_staged staged;
    uint64_t receive_wait_ns; /* longest wait for receives that are under way */
    bool stale;               /* bounded: the cache holds pages of an epoch that is committed or given up; over it: `opening` */
    pthread_mutex_t opening;  /* over `open` while it is 0, and the two counts together */
};

/* Where pages of the open epoch go that the limit has no room for (spill.h). */
struct cc_spill {
    int fd;               /* -1: nowhere */
    bool used;            /* the file may not be empty */
    pthread_mutex_t lock; /* over bytes, bits and counts */
    uint64_t waiting;     /* bytes that the kernel may have in memory */
    uint64_t n_bytes;     /* of the pages that have a bit */
};

/* What stats.c keeps.  `open_sync_ns` counts towards the epoch that is not sealed yet. */
struct cc_stats {
    uint64_t sealed_epochs, flushed_pages, flushed_bytes, flush_total_ns;
    uint64_t epoch, sync_ns, seal_ns, flush_ns, load_ns; /* of the newest sealed epoch */
    uint64_t open_sync_ns, flushed_at_ns;
};

struct colocache {
    struct cc_region region;
    bool bounded; /* memory mode of the region */

    uint32_t n_blocks;       /* grows while other threads receive: those observe it */
    struct cc_block *blocks; /* COLOCACHE_BLOCKS_MAX, so that their addresses stay */

    struct cc_pool *pool;
    struct cc_copy copy;
    const struct cc_strategy *strategy; /* of the epochs that this handle seals */
    void (*log)(void *log_context, int level, const char *sentence);
    void *log_context;

    pthread_mutex_t walking; /* over the descriptors of all blocks, for threads beside the conductor, while a removed one's are closed */

    _Alignas(64) uint64_t staged_bytes; /* bounded: pages whose range of a cache may hold data (staging.h) */
    uint64_t staged_limit;              /* 0 = none */
    struct cc_spill spill;

    struct cc_epoch epoch;
    _Alignas(64) struct cc_gate mark_gate; /* who sets SVM bits */
    struct cc_stats stats;
};

static inline bool cc_gone(const struct cc_block *block)
{
    const uint32_t standing = cc_observe32(&block->standing);
    return standing == CC_GONE;
}

/* handle.c */
int cc_handle_open(int control_fd, bool create, const struct colocache_options *options, struct colocache **out);
void cc_handle_free(struct colocache *cc);
void cc_log(const struct colocache *cc, int level, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
