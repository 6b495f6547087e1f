/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash_damage.c -- a control region with one bit turned over is refused, and nothing is written.
 *
 * A process death can't tear an aligned word, so a record, device state or flush set that does not fit its checksum is damage: attach says
 * so and never falls back to the older record, whose epoch the cache no longer holds.
 */
#define _GNU_SOURCE
#include "crash_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "layout.h"

#define OWNER_PID offsetof(struct cc_control, owner_pid)

static struct memory memory;
static unsigned long long flips;

struct state {
    const char *name;
    enum kind kind;
    uint8_t control[1 << 20], guest[PAGES * PAGE], cache[PAGES * PAGE];
    uint64_t control_bytes;
};

static void run_work(void *history)
{
    run_steps(&memory, history, false);
}

static void keep(struct state *state)
{
    state->control_bytes = (uint64_t)lseek(memory.control, 0, SEEK_END);
    memcpy(state->control, memory.control_at, state->control_bytes);
    memcpy(state->guest, memory.guest_at[0], PAGES_0 * PAGE);
    memcpy(state->guest + PAGES_0 * PAGE, memory.guest_at[1], PAGES_1 * PAGE);
    memcpy(state->cache, memory.cache_at[0], PAGES_0 * PAGE);
    memcpy(state->cache + PAGES_0 * PAGE, memory.cache_at[1], PAGES_1 * PAGE);
}

static void restore(const struct state *state)
{
    memcpy(memory.control_at, state->control, state->control_bytes);
    memcpy(memory.guest_at[0], state->guest, PAGES_0 * PAGE);
    memcpy(memory.guest_at[1], state->guest + PAGES_0 * PAGE, PAGES_1 * PAGE);
}

static void __attribute__((noreturn)) breach(const struct state *state, const char *what, uint64_t offset, unsigned bit, int rc)
{
    fprintf(stderr, "%s, byte %llu bit %u of the region (%s) turned over: attach gave %d (%s)\n", state->name, (unsigned long long)offset,
            bit, what, rc, rc ? colocache_last_error() : "no error");
    exit(1);
}

/* flip -- one bit; attach must give `wanted` or `or_else`, and on an error have written nothing but its process id */
static void flip(const struct state *state, const char *what, uint64_t offset, unsigned bit, int wanted, int or_else)
{
    struct colocache *cc;
    restore(state);
    memory.control_at[offset] ^= (uint8_t)(1u << bit);
    flips++;
    int rc = memory_attach(&memory, NULL, &cc);
    if (rc != wanted && rc != or_else)
        breach(state, what, offset, bit, rc);
    if (rc == 0) {
        colocache_close(cc);
        return;
    }
    memory.control_at[offset] ^= (uint8_t)(1u << bit);
    memcpy(memory.control_at + OWNER_PID, state->control + OWNER_PID, 8);
    const struct cc_block_entry *blocks = (const void *)(state->control + CC_TABLE_OFFSET);
    uint64_t summaries = CC_BITMAPS * CC_PAGE; /* of each block, after its words: made anew, which changes nothing they say */
    for (unsigned block = 0; block < 2; block++)
        memcpy(memory.control_at + blocks[block].bitmap_offset + summaries, state->control + blocks[block].bitmap_offset + summaries,
               summaries);
    if (memcmp(memory.control_at, state->control, state->control_bytes) != 0)
        breach(state, "refused, but the region was written", offset, bit, rc);
    for (unsigned page = 0; page < PAGES; page++) {
        const uint8_t *cache = page < PAGES_0 ? memory.cache_at[0] + page * PAGE : memory.cache_at[1];
        if (memcmp(memory_page(&memory, page), state->guest + page * PAGE, PAGE) != 0 ||
            memcmp(cache, state->cache + page * PAGE, PAGE) != 0)
            breach(state, "refused, but an image was written", offset, bit, rc);
    }
}

static void flip_range(const struct state *state, const char *what, uint64_t offset, uint64_t bytes, int wanted)
{
    for (uint64_t i = 0; i < bytes; i++) {
        for (unsigned bit = 0; bit < 8; bit++)
            flip(state, what, offset + i, bit, wanted, wanted);
    }
}

static void damage(const struct state *state)
{
    const struct cc_control *control = (const void *)state->control;
    uint64_t word = control->commit_word, named = offsetof(struct cc_control, records) + (word & 1) * sizeof(struct cc_record);
    uint64_t other = offsetof(struct cc_control, records) + (~word & 1) * sizeof(struct cc_record);
    const struct cc_record *record = &control->records[word & 1];
    const struct cc_block_entry *blocks = (const void *)(state->control + CC_TABLE_OFFSET);

    flip_range(state, "the record that is named", named, sizeof(struct cc_record), COLOCACHE_E_CORRUPT);
    for (unsigned bit = 0; bit < 64; bit++) { /* one less is what a death just before the word leaves: an honest older state */
        int or_else = (word ^ 1ull << bit) + 1 == word ? 0 : COLOCACHE_E_CORRUPT;
        flip(state, "the commit word", offsetof(struct cc_control, commit_word) + bit / 8, bit % 8, COLOCACHE_E_CORRUPT, or_else);
    }
    if (word > 2 && word & 1) /* with an even word a zero of the older record's generation is no news to anybody */
        flip_range(state, "the older record", other, sizeof(struct cc_record), 0);
    uint64_t device = CC_DEVICES_OFFSET + record->device_area * control->device_area_bytes;
    flip_range(state, "the device state", device, 32, COLOCACHE_E_CORRUPT);
    for (uint64_t at = 97; at < record->device_bytes; at += 97)
        flip(state, "the device state", device + at, at % 8, COLOCACHE_E_CORRUPT, COLOCACHE_E_CORRUPT);
    flip_range(state, "the end of the device state", device + record->device_bytes - 8, 8, COLOCACHE_E_CORRUPT);
    for (unsigned block = 0; block < 2; block++) {
        uint64_t words = blocks[block].bitmap_offset;
        for (uint64_t kind = 0; kind < CC_BITMAPS; kind++) {
            for (unsigned bit = block ? PAGES_1 : PAGES_0; bit < 64; bit++)
                flip(state, "a bitmap's tail", words + kind * CC_PAGE + bit / 8, bit % 8, COLOCACHE_E_TAIL, COLOCACHE_E_TAIL);
        }
        for (unsigned bit = 0; !record->committed && bit < (block ? PAGES_1 : PAGES_0); bit++)
            flip(state, "the flush set of a sealed epoch", words + 2 * CC_PAGE, bit, COLOCACHE_E_CORRUPT, COLOCACHE_E_CORRUPT);
    }
}

int main(void)
{
    static struct state states[] = {{.name = "sealed", .kind = SEAL}, {.name = "committed", .kind = FLUSH}};
    static struct history history;
    memory_make(&memory);
    make_history(&history, 0x16, 0x0d);
    for (unsigned i = 0; i < 2; i++) {
        memory_reset(&memory);
        if (in_child(run_work, &history, 0) != 0) {
            fprintf(stderr, "the run without a death: %s\n", memory.progress->failed);
            return 1;
        }
        uint64_t last = 0;
        for (int step = 0; step < history.n_steps; step++) {
            if (history.steps[step].kind == states[i].kind && history.steps[step].epoch == 3)
                last = memory.progress->passed[step + 1];
        }
        memory_reset(&memory);
        if (in_child(run_work, &history, last) != 1)
            return 1;
        keep(&states[i]);
        damage(&states[i]);
    }
    printf("{\"flips\": %llu}\n", flips);
    return 0;
}
