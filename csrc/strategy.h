/* SPDX-License-Identifier: Apache-2.0 */
/*
 * strategy.h -- how guest RAM is made a sealed epoch.  A new strategy is one file and one line in strategy.c.
 *
 *     seal | begin | device state loaded, VM runs | finish | committed          what checkpoint.c calls, and when
 *
 * A strategy that copies does everything in `begin`, while the VM stands, and nothing is left to finish.  One that lets the VM run
 * earlier leaves work for `finish`; until it has returned, no page of the next epoch enters the cache.
 * After a death `replay` does what both would have done; the VM that ran is gone with its process.
 * Each may be killed on every line and is then replayed: the cache and the flush set stay as they are until `committed` is published.
 */
#ifndef CC_STRATEGY_H
#define CC_STRATEGY_H

#include "internal.h"

struct cc_strategy {
    uint32_t number;                                                         /* in commit records; never given to another strategy */
    bool bounded;                                                            /* the memory mode it is for */
    int (*begin)(struct colocache *cc, struct colocache_flush_result *out);  /* 0, or an error and begin may be called again */
    int (*finish)(struct colocache *cc, struct colocache_flush_result *out); /* adds to *out */
    int (*replay)(struct colocache *cc, struct colocache_flush_result *out);
};

/* The one whose number a record has; NULL: this build has none. */
const struct cc_strategy *cc_strategy_find(uint32_t number);
const struct cc_strategy *cc_strategy_default(bool bounded);

#endif
