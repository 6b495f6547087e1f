/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spill.h -- pages of a bounded region's open epoch that its limit leaves no memory for: in a file on a disk.
 *
 * Why a file beside the cache, and not the cache itself on the disk: a page cache that must be written back to stay small is paid for by
 * every epoch, and what is missing or damaged on a disk would be a SIGBUS in a mapping.  So the cache stays memory, the file is only read
 * and written by system calls, and all that can go wrong with a disk is an error with a sentence.
 *
 *   file    per block, in the order of the region's table: its bitmap, rounded up to a page, then room for its pages at their places
 *   bitmap  `spilled` of a block, in this process's memory: the newest bytes of these pages are in the file, whatever the cache has of
 *           them.  Set after the bytes; dropped after newer ones are in the cache, or its hole is there.  The file's copy is written by a
 *           seal, whose record has its checksum, the numbers and which file it is.  So no file system is asked for its holes.
 *   memory  what waits to be written, or was read, is at most CC_SPILL_WINDOW of the kernel's page cache: more is written back and dropped.
 */
#ifndef CC_SPILL_H
#define CC_SPILL_H

#include "internal.h"

#define CC_SPILL_WINDOW (512u << 10)
#define CC_SPILL_PART (32u << 10) /* of a page or a run that comes from a socket */

/* `fd` 0: none.  E_ARGUMENT, -errno. */
int cc_spill_open(struct colocache *cc, int fd);
void cc_spill_close(struct colocache *cc);
int cc_spill_open_block(struct colocache *cc, uint32_t index); /* -ENOMEM */
void cc_spill_close_block(struct cc_block *block);

/* Inside the receive gate: `n_bytes` of the pages from `first_pfn` on, `at` bytes behind its first.  Bits are set by cc_spill_done, when all
 * of them are there.  E_NO_MEMORY, -errno. */
int cc_spill_write(struct colocache *cc, const struct cc_block *block, uint64_t first_pfn, uint64_t at, const void *data, uint64_t n_bytes);
void cc_spill_done(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
/* What the cache has of these pages is newer. */
void cc_spill_drop(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);

/* In a seal, flush sets united and nobody inside the gate: bitmaps into the file, all of it written, told to the record. */
int cc_spill_seal(struct colocache *cc, struct cc_record *record);
/* Attach: the bitmaps of the epoch that is sealed and not committed.  E_FOREIGN_IMAGE: it is not the file, or not whole.  Writes nothing. */
int cc_spill_find(struct colocache *cc, const struct cc_record *record);
/* Flush: what is newer in the file is not copied from the cache. */
void cc_spill_hide(const struct cc_block *block);
/* The pages of the flush set that are in the file, to guest RAM.  -errno, and it may be repeated. */
int cc_spill_flush(struct colocache *cc, struct colocache_flush_result *out);
/* Nothing is in the file.  Nobody receives. */
void cc_spill_empty(struct colocache *cc);

static inline bool cc_spill_may(const struct colocache *cc)
{
    return cc->spill.fd >= 0;
}

/* Of 64 pages from 64 * word on: which are in the file */
static inline uint64_t cc_spill_word(const struct cc_block *block, uint64_t word)
{
    return block->spilled ? block->spilled->words[word] : 0;
}

#endif
