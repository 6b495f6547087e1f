/* SPDX-License-Identifier: Apache-2.0 */
#include "word.h"

#include "atomics.h"
#include "colocache.h"
#include "error.h"

#define VALUE_BITS 48

/* crc16 -- four bits at a time */
static uint64_t crc16(uint64_t value)
{
    static const uint16_t of_four_bits[16] = {0x0000, 0x1021, 0x2042, 0x3063, 0x4084, 0x50a5, 0x60c6, 0x70e7,
                                              0x8108, 0x9129, 0xa14a, 0xb16b, 0xc18c, 0xd1ad, 0xe1ce, 0xf1ef};
    uint16_t crc = 0;
    for (int shift = VALUE_BITS - 4; shift >= 0; shift -= 4)
        crc = (uint16_t)(crc << 4) ^ of_four_bits[(crc >> 12) ^ (value >> shift & 0xf)];
    return crc;
}

uint64_t cc_word_make(uint64_t value)
{
    return crc16(value) << VALUE_BITS | value;
}

int cc_word_value(const char *name, uint64_t word, uint64_t *value_out)
{
    const uint64_t value = word & COLOCACHE_EPOCH_MAX;
    if (cc_word_make(value) != word)
        return cc_fail(COLOCACHE_E_CORRUPT, "the %s of the control region is %016llx, whose check does not fit its value %llu", name,
                       (unsigned long long)word, (unsigned long long)value);
    *value_out = value;
    return 0;
}

int cc_word_read(const char *name, const uint64_t *word, uint64_t *value_out)
{
    return cc_word_value(name, cc_observe(word), value_out);
}

void cc_word_publish(uint64_t *word, uint64_t value)
{
    cc_publish(word, cc_word_make(value));
}
