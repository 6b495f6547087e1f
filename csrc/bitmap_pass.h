/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bitmap_pass.h -- straight passes over bitmap words, per CPU: union with counts and checksum in one reading.
 *
 * The union is read by the CPU once: counting and summing in the same pass costs arithmetic, a second pass would
 * cost memory traffic.  Plain C is the definition; the other variants must give the same.
 */
#ifndef CC_BITMAP_PASS_H
#define CC_BITMAP_PASS_H

#include <stdint.h>

struct cc_union_counts {
    uint64_t pvm, svm, both_or_either; /* bits set in p, in s, in p | s */
    uint64_t sum;                      /* of cc_checksum_term(word, index) over the words of p | s that are not zero */
};

/* f[i] := p[i] | s[i] for n words, the first of which is word `index` of its bitmap; adds to *counts. */
typedef void (*cc_unite_fn)(uint64_t *f, const uint64_t *p, const uint64_t *s, uint64_t n, uint64_t index, struct cc_union_counts *counts);

/* The n-th of those that this CPU can run, the best first; NULL past the last, which is plain C. */
cc_unite_fn cc_unite_variant(unsigned n);
void cc_unite_plain(uint64_t *f, const uint64_t *p, const uint64_t *s, uint64_t n, uint64_t index, struct cc_union_counts *counts);

#endif
