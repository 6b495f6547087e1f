/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash_damage.c -- a control region with bits turned over is refused and nothing is written, or they meant nothing: then attach does
 * what it does without them, to the byte.
 *
 * A process death can't tear an aligned word, so a record, device state or flush set that does not fit its checksum is damage: attach says
 * so and never falls back to the older record, whose epoch the cache no longer holds.
 *
 * Every bit of head, records and used entries by itself; every two bits of a word together where the word means something, of the
 * others some; the bitmaps bit by bit where they have pages, by sample elsewhere.  crash_damage N [bounded] takes the state number N
 * only, in that memory mode, crash_damage all every pair of every word in every state (some minutes).
 */
#define _GNU_SOURCE
#include "crash_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "layout.h"
#include "word.h"

#define OWNER_PID offsetof(struct cc_control, owner_pid)

static struct memory memory;
static unsigned long long flips, refusals, harmless;

struct state {
    const char *name;
    enum kind kind;
    bool took_over, receiving;       /* what is done after that step */
    bool thorough;                   /* in pairs wherever a word means something */
    struct picture *was;             /* memory before the damage */
    const uint8_t *control;          /* of that */
    uint8_t recovered[PAGES * PAGE]; /* guest RAM after an attach without damage */
    struct colocache_recovery report;
    int rc;
};

static void run_work(void *history)
{
    run_steps(&memory, history, false);
}

static void keep(struct state *state)
{
    state->was = memory_picture(&memory);
    picture_move(state->was, &memory, false);
    state->control = state->was->control;
}

static void restore(const struct state *state)
{
    picture_move(state->was, &memory, true);
}

/* copy_guest -- both blocks, one after the other */
static void copy_guest(uint8_t *to)
{
    memcpy(to, memory.guest_at[0], PAGES_0 * PAGE);
    memcpy(to + PAGES_0 * PAGE, memory.guest_at[1], PAGES_1 * PAGE);
}

static void __attribute__((noreturn)) breach(const struct state *state, const char *what, uint64_t offset, uint64_t bits, int rc)
{
    fprintf(stderr, "%s, bits %llx of the word at byte %llu (%s) turned over: attach gave %d (%s)\n", state->name, (unsigned long long)bits,
            (unsigned long long)offset, what, rc, rc ? colocache_last_error() : "no error");
    exit(1);
}

static void turn_over(uint64_t offset, uint64_t bits)
{
    uint64_t word;
    memcpy(&word, memory.control_at + offset, 8);
    word ^= bits;
    memcpy(memory.control_at + offset, &word, 8);
}

static void check_untouched(const struct state *state, uint64_t offset, uint64_t bits, int rc)
{
    const struct cc_block_entry *blocks = (const void *)(state->control + CC_TABLE_OFFSET);
    const uint64_t summaries = CC_BITMAPS * CC_PAGE; /* of each block, after its words: made anew, which changes nothing they say */
    turn_over(offset, bits);
    memcpy(memory.control_at + OWNER_PID, state->control + OWNER_PID, 8);
    for (unsigned block = 0; block < 2; block++)
        memcpy(memory.control_at + blocks[block].bitmap_offset + summaries, state->control + blocks[block].bitmap_offset + summaries,
               summaries);
    static struct picture *now;
    if (!now)
        now = memory_picture(&memory);
    picture_move(now, &memory, false); /* holes stay holes: they are looked for, and not through a mapping */
    if (now->control_bytes != state->was->control_bytes || memcmp(now->control, state->control, now->control_bytes) != 0)
        breach(state, "refused, but the region was written", offset, bits, rc);
    if (memcmp(now->guest, state->was->guest, sizeof now->guest) != 0 || memcmp(now->staged, state->was->staged, sizeof now->staged) != 0)
        breach(state, "refused, but an image was written", offset, bits, rc);
    for (unsigned page = 0; page < PAGES; page++) {
        if ((!bounded || now->staged[page]) && memcmp(now->cache + page * PAGE, state->was->cache + page * PAGE, PAGE) != 0)
            breach(state, "refused, but an image was written", offset, bits, rc);
    }
}

static void check_harmless(const struct state *state, const char *what, uint64_t offset, uint64_t bits,
                           const struct colocache_recovery *report)
{
    static uint8_t now[PAGES * PAGE];
    copy_guest(now);
    if (report->action != state->report.action || report->epoch != state->report.epoch ||
        report->receiving_epoch != state->report.receiving_epoch || memcmp(now, state->recovered, sizeof now) != 0)
        breach(state, what, offset, bits, 0);
}

enum expected { REFUSED, HARMLESS, EITHER };

/* flip -- bits of the word at `offset`.  Only a region that had taken over may be refused as such. */
static void flip(const struct state *state, const char *what, uint64_t offset, uint64_t bits, enum expected expected)
{
    struct colocache *cc;
    struct colocache_recovery report = {0};
    turn_over(offset, bits);
    flips++;
    int rc = memory_attach(&memory, &report, &cc);
    bool took_over = rc == COLOCACHE_E_FAILED_OVER;
    if (rc > 0 || (rc == 0 && expected == REFUSED && !state->took_over) || (rc && !took_over && expected == HARMLESS) ||
        took_over > state->took_over || (rc == 0 && state->took_over))
        breach(state, what, offset, bits, rc);
    if (rc) {
        refusals++;
        check_untouched(state, offset, bits, rc);
        return;
    }
    harmless++;
    colocache_close(cc);
    check_harmless(state, what, offset, bits, &report);
    restore(state);
}

enum pairs { SINGLE = 0, SAMPLED, IN_PAIRS, ALWAYS };
static bool every_pair;

static unsigned one_in(const struct state *state, enum pairs pairs)
{
    return every_pair || pairs == ALWAYS || (pairs == IN_PAIRS && state->thorough) ? 1 : 16;
}

static void flip_words(const struct state *state, const char *what, uint64_t offset, uint64_t bytes, enum expected expected,
                       enum pairs pairs)
{
    unsigned n = 0;
    for (uint64_t at = offset; at < offset + bytes; at += 8) {
        for (unsigned a = 0; a < 64; a++) {
            flip(state, what, at, 1ull << a, expected);
            for (unsigned b = a + 1; pairs && b < 64; b++) {
                if (n++ % one_in(state, pairs) == 0)
                    flip(state, what, at, 1ull << a | 1ull << b, expected);
            }
        }
    }
}

#define HEAD(field) offsetof(struct cc_control, field), sizeof(((struct cc_control *)0)->field)
#define ENTRY(field) CC_TABLE_OFFSET + block * sizeof(struct cc_block_entry) + offsetof(struct cc_block_entry, field)

static void damage_head(const struct state *state)
{
    const struct cc_control *control = (const void *)state->control;
    const uint64_t named = (control->commit_word & 1) * sizeof(struct cc_record), records = offsetof(struct cc_control, records);
    const enum expected history = control->commit_word ? REFUSED : HARMLESS; /* before a seal it is made anew */
    flip_words(state, "magic, version, stamp", 0, offsetof(struct cc_control, history_id), REFUSED, IN_PAIRS);
    flip_words(state, "history id", HEAD(history_id), history, IN_PAIRS);
    flip_words(state, "check of the history id", HEAD(history_check), history, IN_PAIRS);
    flip_words(state, "device-state bound", HEAD(device_state_max_bytes), REFUSED, ALWAYS);
    flip_words(state, "process id of the owner", HEAD(owner_pid), HARMLESS, SAMPLED);
    flip_words(state, "number of blocks", HEAD(n_blocks), REFUSED, ALWAYS);
    flip_words(state, "reserved 1", HEAD(reserved1), REFUSED, SAMPLED);
    flip_words(state, "receiving", HEAD(receiving), REFUSED, ALWAYS);
    flip_words(state, "taken over", HEAD(taken_over), REFUSED, ALWAYS);
    flip_words(state, "reserved 2", HEAD(reserved2), REFUSED, SAMPLED);
    flip_words(state, "commit word", HEAD(commit_word), REFUSED, ALWAYS);
    flip_words(state, "reserved 3", HEAD(reserved3), REFUSED, SAMPLED);
    if (control->commit_word)
        flip_words(state, "the record that is named", records + named, sizeof(struct cc_record), REFUSED, IN_PAIRS);
    /* The other one is read by nobody; before the first seal, its generation tells that a word of 0 was not always 0. */
    flip_words(state, "the other record", records + sizeof(struct cc_record) - named, sizeof(struct cc_record),
               control->commit_word ? HARMLESS : EITHER, SAMPLED);
    flip_words(state, "the rest of the head's page", sizeof(struct cc_control), 64, HARMLESS, SINGLE);
}

static void damage_table(const struct state *state)
{
    struct dice dice = {16};
    for (unsigned block = 0; block < 2; block++) {
        flip_words(state, "an entry's name", ENTRY(name), COLOCACHE_NAME_BYTES, REFUSED, SINGLE);
        flip_words(state, "an entry", ENTRY(len_bytes),
                   offsetof(struct cc_block_entry, reserved) - offsetof(struct cc_block_entry, len_bytes), REFUSED, IN_PAIRS);
        flip_words(state, "reserved bytes of an entry", ENTRY(reserved), sizeof(((struct cc_block_entry *)0)->reserved), REFUSED, SINGLE);
        flip_words(state, "an entry's checksum", ENTRY(checksum), 8, REFUSED, IN_PAIRS);
        for (unsigned i = 0; i < 2000; i++) /* pairs where there are too many for all */
            flip(state, "an entry", ENTRY(name) + 8 * below(&dice, sizeof(struct cc_block_entry) / 8),
                 1ull << below(&dice, 32) | 1ull << (32 + below(&dice, 32)), REFUSED);
    }
    flip_words(state, "an entry that is not used", CC_TABLE_OFFSET + 2 * sizeof(struct cc_block_entry), sizeof(struct cc_block_entry),
               HARMLESS, SINGLE);
}

static void damage_rest(const struct state *state)
{
    const struct cc_control *control = (const void *)state->control;
    const struct cc_record *record = &control->records[control->commit_word & 1];
    const struct cc_block_entry *blocks = (const void *)(state->control + CC_TABLE_OFFSET);
    struct dice dice = {17};
    if (control->commit_word) {
        const uint64_t device = CC_DEVICES_OFFSET + record->device_area * cc_round_to_page(STATE_MAX);
        flip_words(state, "the device state", device, 32, REFUSED, SINGLE);
        for (uint64_t at = 104; at + 8 <= record->device_bytes; at += 104)
            flip(state, "the device state", device + at, 1ull << at % 64, REFUSED);
        flip_words(state, "the end of the device state", device + record->device_bytes / 8 * 8 - 8, 8, REFUSED, SINGLE);
    }
    for (unsigned block = 0; block < 2; block++) {
        const unsigned pages = block ? PAGES_1 : PAGES_0;
        for (uint64_t kind = 0; kind < CC_BITMAPS; kind++) {
            const uint64_t words = blocks[block].bitmap_offset + kind * CC_PAGE;
            const bool sealed = control->commit_word && !record->committed && kind == COLOCACHE_BITMAP_FLUSH_SET;
            for (unsigned bit = 0; bit < 64; bit++) /* what is not sealed begins anew, or its dead VM's log counts as all ones */
                flip(state, bit < pages ? "a bit of a page" : "a bitmap's tail", words, 1ull << bit,
                     bit >= pages && control->commit_word ? REFUSED
                     : sealed                             ? REFUSED
                                                          : HARMLESS);
            for (unsigned i = 0; i < 200; i++) /* behind its words, and summaries, which attach makes anew */
                flip(state, "what lies behind a bitmap, or a summary", words + 8 + 8 * below(&dice, CC_PAGE / 8 - 1),
                     1ull << below(&dice, 64), HARMLESS);
            flip_words(state, "a summary", words + CC_BITMAPS * CC_PAGE, 8, HARMLESS, SINGLE);
        }
    }
}

/* make_state -- a history that dies right after its step, and what an attach without damage makes of that */
static int make_state(struct state *state, const struct history *history)
{
    struct colocache *cc;
    memory_reset(&memory);
    if (in_child(run_work, (void *)(uintptr_t)history, 0) != 0) {
        fprintf(stderr, "the run without a death: %s\n", memory.progress->failed);
        return 1;
    }
    uint64_t last = 0;
    for (int step = 0; step < history->n_steps; step++) {
        if (history->steps[step].kind == state->kind && (state->kind == ADD_BLOCK || history->steps[step].epoch == 3))
            last = memory.progress->passed[step + 1];
    }
    memory_reset(&memory);
    if (in_child(run_work, (void *)(uintptr_t)history, last) != 1)
        return 1;
    struct cc_control *control = (struct cc_control *)(void *)memory.control_at;
    if (state->receiving)
        control->receiving = cc_word_make((control->receiving & COLOCACHE_EPOCH_MAX) + 1);
    if (state->took_over)
        control->taken_over = cc_word_make(1);
    keep(state);
    state->rc = memory_attach(&memory, &state->report, &cc);
    if (state->rc != (state->took_over ? COLOCACHE_E_FAILED_OVER : 0))
        return 1;
    if (state->rc == 0)
        colocache_close(cc);
    copy_guest(state->recovered);
    restore(state);
    return 0;
}

int main(int argc, char **argv)
{
    static struct state states[] = {
        {.name = "nothing sealed", .kind = ADD_BLOCK},           {.name = "sealed", .kind = SEAL, .thorough = true},
        {.name = "committed", .kind = FLUSH, .thorough = true},  {.name = "receiving again", .kind = FLUSH, .receiving = true},
        {.name = "took over", .kind = FLUSH, .took_over = true},
    };
    static struct history history;
    every_pair = argc > 1 && strcmp(argv[1], "all") == 0;
    bounded = argc > 2 && strcmp(argv[2], "bounded") == 0;
    memory_make(&memory);
    make_history(&history, 0x16, 0x0d);
    for (unsigned i = 0; i < sizeof states / sizeof *states; i++) {
        if (argc > 1 && !every_pair && atoi(argv[1]) != (int)i)
            continue;
        if (make_state(&states[i], &history) != 0) {
            fprintf(stderr, "%s: %s\n", states[i].name, colocache_last_error());
            return 1;
        }
        damage_head(&states[i]);
        damage_table(&states[i]);
        damage_rest(&states[i]);
    }
    printf("{\"flips\": %llu, \"refused\": %llu, \"harmless\": %llu}\n", flips, refusals, harmless);
    return 0;
}
