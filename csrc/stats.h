/* SPDX-License-Identifier: Apache-2.0 */
/* stats.h -- what a handle counts, told by whoever did it. */
#ifndef CC_STATS_H
#define CC_STATS_H

#include "internal.h"

void cc_stats_synced(struct colocache *cc, uint64_t begin_ns);
void cc_stats_sealed(struct colocache *cc, const struct colocache_seal_result *result);
void cc_stats_flushed(struct colocache *cc, const struct colocache_flush_result *result);
void cc_stats_loaded(struct colocache *cc);

#endif
