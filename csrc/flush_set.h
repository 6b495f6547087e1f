/* SPDX-License-Identifier: Apache-2.0 */
/* flush_set.h -- what must be copied at an epoch, and who clears bits. */
#ifndef CC_FLUSH_SET_H
#define CC_FLUSH_SET_H

#include "internal.h"

/* Flush set := PVM | SVM for every block, with its counts and its checksum; both gates are closed.  0 or E_TAIL. */
int cc_flush_set_unite(struct colocache *cc, struct colocache_seal_result *out, uint64_t *checksum_out);
/* The same checksum, from the flush sets as they stand: what an attach compares with. */
uint64_t cc_flush_set_checksum(struct colocache *cc);
/* Sparse images: what the flush will touch must be there before the commit point, and before a replay.  0, E_NO_MEMORY, -errno. */
int cc_flush_set_allocate(struct colocache *cc);
/* After the commit point, gates closed: from the seal on PVM and SVM bits belong to the next epoch. */
void cc_flush_set_moved(struct colocache *cc);
/* Attach with nothing sealed: no bit of any bitmap means anything. */
void cc_flush_set_forget(struct colocache *cc);
/* Before anything is sealed: the next word of PVM bits from *word on, taken before its pages are copied; false if there is none. */
bool cc_flush_set_take_arrived(struct cc_block *block, uint64_t *word, uint64_t *bits_out);
/* They could not be copied. */
void cc_flush_set_put_back(struct cc_block *block, uint64_t word, uint64_t bits);
/* Bounded: no page has come.  The receive gate is closed, or nobody receives yet. */
void cc_flush_set_drop(struct colocache *cc);

#endif
