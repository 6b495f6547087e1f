/* SPDX-License-Identifier: Apache-2.0 */
/* bitmap_room.h -- a bitmap between guard words, beside its oracle of one byte per page. */
#ifndef BITMAP_ROOM_H
#define BITMAP_ROOM_H

#include "bitmap.h"
#include "check.h"

/* Lengths around the edges of a word (64), of a summary word (64 * 64), and odd ones between. */
static const uint64_t lengths[] = {1, 2, 63, 64, 65, 100, 127, 128, 129, 1000, 4095, 4096, 4097, 4160, 8191, 12345};
#define N_LENGTHS (sizeof lengths / sizeof *lengths)
#define BITS_MAX 12345u
#define WORDS_MAX (BITS_MAX / 64 + 2)

struct room { /* a bitmap with guard words around its parts, and its oracle */
    uint64_t memory[2 * WORDS_MAX + 16];
    struct cc_bitmap bitmap;
    uint8_t oracle[BITS_MAX + 64];
};

static struct room rooms[3];

static inline struct cc_bitmap *fresh(struct room *room, uint64_t n_bits)
{
    memset(room, 0, sizeof *room);
    uint64_t n_words = cc_words_for(n_bits);
    room->memory[0] = room->memory[n_words + 1] = room->memory[n_words + 2 + cc_words_for(n_words)] = 0xdeadbeefdeadbeefull;
    cc_bitmap_init(&room->bitmap, room->memory + 1, room->memory + n_words + 2, n_bits);
    return &room->bitmap;
}

/* nothing_hidden -- every word with bits is found by passes, and no summary bit is past the end */
static inline bool nothing_hidden(const struct cc_bitmap *b)
{
    return cc_bitmap_next_hidden(b, 0) == b->n_words && cc_bitmap_tail_ok(b->summary, b->n_words);
}

/* next_run -- the first run in [from, end), cut at end; false if there is none */
static inline bool next_run(const struct cc_bitmap *b, uint64_t from, uint64_t end, uint64_t *first, uint64_t *n)
{
    struct cc_bit_run runs[CC_RUNS_MIN];
    if (cc_bitmap_runs(b, &from, end, runs, CC_RUNS_MIN) == 0)
        return false;
    *first = runs[0].first;
    *n = runs[0].n;
    return true;
}

static inline bool bit_of(const uint64_t *words, uint64_t n)
{
    return words[n / 64] >> (n % 64) & 1;
}

static inline void compare(const struct room *room)
{
    const struct cc_bitmap *b = &room->bitmap;
    uint64_t count = 0;
    for (uint64_t i = 0; i < b->n_words * 64; i++) {
        bool expected = i < b->n_bits && room->oracle[i];
        count += expected;
        if (bit_of(b->words, i) != expected) {
            CHECK_SAY("bit %llu of %llu is %d", (unsigned long long)i, (unsigned long long)b->n_bits, !expected);
            return;
        }
    }
    for (uint64_t w = 0; w < b->n_words; w++)
        CHECK(!b->words[w] || bit_of(b->summary, w));
    CHECK(nothing_hidden(b));
    CHECK(cc_bitmap_tail_ok(b->words, b->n_bits));
    CHECK_EQ(count, cc_bitmap_count(b));
    CHECK_EQ(0xdeadbeefdeadbeefull, room->memory[0]);
    CHECK_EQ(0xdeadbeefdeadbeefull, room->memory[b->n_words + 1]);
    CHECK_EQ(0xdeadbeefdeadbeefull, room->memory[b->n_words + 2 + b->n_summary_words]);
}

/* random_bits -- into bitmap and oracle: scattered, dense, or runs, so that the passes by summary and straight through both happen */
static inline void random_bits(struct room *room, struct dice *dice)
{
    uint64_t n = room->bitmap.n_bits;
    switch (below(dice, 4)) {
    case 0: /* a few */
        for (int i = 0; i < 5; i++) {
            uint64_t at = below(dice, n);
            cc_bitmap_set(&room->bitmap, at, 1);
            room->oracle[at] = 1;
        }
        break;
    case 1: /* half of them */
        for (uint64_t at = 0; at < n; at++) {
            if (roll(dice) & 1) {
                cc_bitmap_set(&room->bitmap, at, 1);
                room->oracle[at] = 1;
            }
        }
        break;
    case 2: /* runs */
        for (int i = 0; i < 3; i++) {
            uint64_t at = below(dice, n), len = 1 + below(dice, n - at);
            cc_bitmap_set(&room->bitmap, at, len);
            memset(room->oracle + at, 1, len);
        }
        break;
    default: /* first and last */
        cc_bitmap_set(&room->bitmap, 0, 1);
        cc_bitmap_set(&room->bitmap, n - 1, 1);
        room->oracle[0] = room->oracle[n - 1] = 1;
    }
}

#endif
