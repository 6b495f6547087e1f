/* SPDX-License-Identifier: Apache-2.0 */
/*
 * staging.h -- the cache of a bounded region: the pages of the open epoch and nothing else.
 *
 * Memory comes with a page's bytes and goes when its epoch is committed or given up.  A page of the flush set for which the file has a hole
 * is a page of zeros.  A hole is never touched through the mapping: reading one allocates it, and on a full machine that is a SIGBUS.
 *
 * Each block has a bitmap in this process's memory, `staged`: pages whose file range may hold data.  A bit is set before the first byte
 * and cleared after the hole is punched, so that a clear bit is certain.  A process that attaches asks the file (cc_staging_find).
 *
 * `staged_bytes` of the handle counts those bits against the limit, before they are set.  Two threads that bring the same page at the same
 * time count it twice: the limit is then met early, never passed, and the count is right again when the cache is emptied.
 */
#ifndef CC_STAGING_H
#define CC_STAGING_H

#include "internal.h"

int cc_staging_open(struct cc_block *block); /* -ENOMEM */
void cc_staging_close(struct cc_block *block);

#define CC_SPILLS 1
/* Inside the receive gate.  Bytes are about to come: if they would take more than the limit, CC_SPILLS where there is a spill file for them,
 * else E_NO_MEMORY.  If they come through the mapping it is by a system call: it answers a full file system with EFAULT; then cc_spill_drop. */
int cc_staging_expect(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
/* By a system call, whatever another thread does to the same pages meanwhile; into the spill file if need be.  0, E_NO_MEMORY, -errno. */
int cc_staging_write(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, const void *data);
/* Holes, before their bits are set: a page that held data must not show it under a bit. */
int cc_staging_zero(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
int cc_staging_no_room(const struct cc_block *block); /* E_NO_MEMORY with its sentence */

/* Replay: which pages of the flush set hold data.  Nobody receives. */
void cc_staging_find(struct cc_block *block);
/* The cache of one block is a hole, whatever it was. */
int cc_staging_empty_one(struct cc_block *block);
/* The cache of every block is one hole again, and what its flush put aside is freed.  Nobody receives and no bit is set for a page of it.  -errno: some may be left. */
int cc_staging_empty(struct colocache *cc);
/* Memory that the cache files take now, as the file system counts it. */
int cc_staging_bytes(struct colocache *cc, uint64_t *n_bytes_out);

#endif
