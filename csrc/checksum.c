/* SPDX-License-Identifier: Apache-2.0 */
#include "checksum.h"

#include <string.h>

#include "colocache.h"

/* cc_checksum -- the definition in checksum.h, over bytes at any alignment */
uint64_t cc_checksum(const void *data, uint64_t len_bytes)
{
    const unsigned char *bytes = data;
    uint64_t n_words = len_bytes / 8;
    uint64_t sum = len_bytes;
    for (uint64_t i = 0; i < n_words; i++) {
        uint64_t word;
        memcpy(&word, bytes + 8 * i, 8);
        sum += cc_checksum_term(word, i);
    }
    if (len_bytes % 8) {
        uint64_t word = 0;
        memcpy(&word, bytes + 8 * n_words, len_bytes % 8);
        sum += cc_checksum_term(word, n_words);
    }
    return cc_checksum_finish(sum);
}

uint64_t colocache_checksum(const void *data, uint64_t len_bytes)
{
    return cc_checksum(data, len_bytes);
}
