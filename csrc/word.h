/* SPDX-License-Identifier: Apache-2.0 */
/*
 * word.h -- the words of the region that decide: a value and its check in the same 64 bits, so that one store changes both.
 *
 *     bits 0..47   value, at most COLOCACHE_EPOCH_MAX
 *     bits 48..63  CRC-16 of the value (polynomial 0x1021, beginning with 0, highest bit first)
 *
 * A death can't part the two.  The code words differ in at least four bits from each other, so up to three bits that were turned
 * over are found, whatever the value; and 0 is the word of value 0, as a fresh region has it.
 */
#ifndef CC_WORD_H
#define CC_WORD_H

#include <stdint.h>

#include "layout.h"

/* The word for `value`, which is at most COLOCACHE_EPOCH_MAX. */
uint64_t cc_word_make(uint64_t value);
/* The value of a word that was observed; E_CORRUPT, with `name` in its sentence, if its check does not fit. */
int cc_word_value(const char *name, uint64_t word, uint64_t *value_out);
/* Observe (acquire) and take the value. */
int cc_word_read(const char *name, const uint64_t *word, uint64_t *value_out);
/* Publish (release) one store. */
void cc_word_publish(uint64_t *word, uint64_t value);

#endif
