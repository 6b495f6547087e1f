/* SPDX-License-Identifier: Apache-2.0 */
/*
 * checksum.h -- one 64-bit checksum for commit records, flush sets, device states and message headers.
 *
 * It finds damage (stray writes, torn or mixed records), not attackers.  Definition, so that anybody can
 * compute it: the data are little-endian 64-bit words w[0..n), the last one padded with zero bytes.
 *
 *     v(i)  = w[i] xor ((i+1) * 0x9E3779B97F4A7C15  mod 2^64)
 *     m(i)  = low32(v) * high32(v) + v                  mod 2^64
 *     sum   = m(0) + ... + m(n-1) + len_bytes           mod 2^64
 *     sum   = (sum xor (sum >> 31)) * 0xBF58476D1CE4E5B9, then sum xor (sum >> 29)
 *
 * Every change of a single bit changes m: flipping bit k of the low half changes it by 2^k * (high32 + 1),
 * of the high half by 2^k * (low32 + 2^32); with k < 32 neither is a multiple of 2^64.  The terms are
 * independent, so it vectorises.  For a bitmap only words that are not zero are summed: the cost is
 * what is dirty, not what the guest has.
 */
#ifndef CC_CHECKSUM_H
#define CC_CHECKSUM_H

#include <stdint.h>

#define CC_CHECKSUM_KEY 0x9E3779B97F4A7C15ull

static inline uint64_t cc_checksum_term(uint64_t word, uint64_t index)
{
    uint64_t v = word ^ ((index + 1) * CC_CHECKSUM_KEY);
    return (v & 0xffffffffull) * (v >> 32) + v;
}

static inline uint64_t cc_checksum_finish(uint64_t sum)
{
    sum = (sum ^ (sum >> 31)) * 0xBF58476D1CE4E5B9ull;
    return sum ^ (sum >> 29);
}

uint64_t cc_checksum(const void *data, uint64_t len_bytes);

#endif
