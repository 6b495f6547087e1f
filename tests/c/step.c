/* SPDX-License-Identifier: Apache-2.0 */
/*
 * step.c -- die after every instruction of seal, flush, clear and attach, not only at crash points.
 *
 * A child runs a history (crash_world.h) with the library as it ships.  Its seals, flushes, marks and aborts are stepped one instruction at
 * a time, and each change to the control region or an image is written down.  Then every one of these moments is made again in
 * memory: a process that attaches there must find what the model says, and go on.  The same for attach itself, on each of the states
 * in its table.  Instructions that change no shared memory leave what the one before them left.
 *
 *     step [CASE...]     pairs of bitmaps, 0 to 255: the PVM's pages in the low four bits, the SVM's above
 *
 * Prints one line of JSON; exit 0 if the promise held everywhere, 1 with the first breach on stderr, 77 if tracing is not allowed here.
 */
#define _GNU_SOURCE
#include "step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fault.h"
#include "layout.h"

/* crash_run.c is made for a library with crash points; this one has none. */
uint64_t colocache_fault_crash_at, colocache_fault_passed;
void (*colocache_fault_seen)(const char *name);
void cc_fault_pass(const char *name)
{
    (void)name;
}

static struct memory memory;
static struct {
    unsigned long long cases, instructions, moments, attaches_stepped, recoveries;
} totals;

static void __attribute__((noreturn))
breach(const struct history *history, const struct change *change, const char *during, const char *what)
{
    static const char *const areas[] = {"the control region", "guest RAM", "the cache"};
    const struct step *step = &history->steps[memory.progress->step];
    fprintf(stderr, "PVM %02x SVM %02x, in %s of epoch %u", history->pvm, history->svm, kind_name(step->kind), step->epoch);
    if (change)
        fprintf(stderr, "%s, after %u bytes were stored at %u of %s by the instruction before %#llx", during, change->n_bytes,
                change->offset, areas[change->area], (unsigned long long)change->next_pc);
    fprintf(stderr, ": %s: %s\n", what, complaint[0] ? complaint : memory.progress->failed);
    exit(1);
}

/* ---- the child's part ----------------------------------------------------------------------------------------------------------- */

static bool is_stepped(enum kind kind)
{
    return kind == SEAL || kind == VETO || kind == FLUSH || kind == LOADED || kind == PREFLUSH || kind == SYNC || kind == LATE_MARK ||
           kind == ABORT;
}

static void run_history(void *context)
{
    const struct history *history = context;
    struct colocache *cc = NULL;
    struct model model;
    model_start(&model);
    for (int i = 0; i < history->n_steps; i++) {
        const struct step *step = &history->steps[i];
        bool stepped = is_stepped(step->kind);
        memory.progress->step = i;
        if (stepped)
            step_begin();
        run_step(&memory, history, step, &cc, &model);
        if (stepped)
            step_end();
        model_step(&model, history, step);
    }
}

static void attach_once(void *context)
{
    struct colocache *cc;
    (void)context;
    step_begin();
    int rc = memory_attach(&memory, NULL, &cc);
    step_end();
    if (rc != 0) {
        snprintf(memory.progress->failed, sizeof memory.progress->failed, "attach: %s", colocache_last_error());
        _exit(3);
    }
}

/* ---- a moment --------------------------------------------------------------------------------------------------------------------- */

/* Each byte of guest RAM is of one of the two that the model names: instructions tear pages where they like. */
static bool guest_is_mixed_of(const struct model *model)
{
    uint8_t one[PAGE], other[PAGE];
    for (unsigned page = 0; page < PAGES && !model->partial; page++) {
        const uint8_t *found = memory_page(&memory, page);
        fill_page(one, model->guest[page]);
        fill_page(other, model->or_else[page]);
        for (unsigned i = 0; i < PAGE; i++) {
            if (found[i] != one[i] && found[i] != other[i]) {
                complain("byte %u of page %u of guest RAM (%s) is of neither epoch", i, page, name_page(found));
                return false;
            }
        }
    }
    return true;
}

static uint64_t word_at(const struct picture *picture, size_t offset)
{
    uint64_t word;
    memcpy(&word, picture->control + offset, sizeof word);
    return word;
}

/* set_moment -- memory is this picture; which of the two words that decide have been stored since `before` */
static void set_moment(struct picture *now, const struct picture *before)
{
    const size_t commit = offsetof(struct cc_control, commit_word), receiving = offsetof(struct cc_control, receiving);
    now->progress.word_stored = word_at(now, commit) != word_at(before, commit);
    now->progress.receiving_stored = word_at(now, receiving) != word_at(before, receiving);
    picture_move(now, &memory, true);
    complaint[0] = 0;
}

static struct picture *copy_of(const struct picture *from)
{
    struct picture *made = memory_picture(&memory);
    uint8_t *control = made->control;
    *made = *from;
    made->control = control;
    memcpy(control, from->control, from->control_bytes);
    return made;
}

/* ---- attach, stepped ------------------------------------------------------------------------------------------------------------ */

/* step_attach -- on the memory there is now, of which the model says what it is */
static void step_attach(const struct history *history, const struct model *model)
{
    struct recording recording;
    if (step_child(&memory, attach_once, NULL, &recording) != 0)
        breach(history, NULL, "", "attach failed by itself");
    totals.attaches_stepped++;
    totals.instructions += recording.n_instructions;
    struct picture *before = recording.stretches[0].before, *now = copy_of(before);
    for (size_t i = 0; i < recording.n_changes; i++) {
        const struct change *change = &recording.changes[i];
        struct model after = *model;
        step_apply(&recording, change, now);
        set_moment(now, before);
        model_attach_death(&after, history, memory.progress);
        bool restarting = after.sealed && after.committed == after.sealed && after.receiving == after.sealed;
        if (!restarting && !guest_is_mixed_of(&after)) /* a restart copies over whatever the dead one left */
            breach(history, change, ", attaching", "guest RAM");
        totals.moments++;
        totals.recoveries++;
        if (!check_recovery(&memory, history, &after, false))
            breach(history, change, ", attaching", "recovery after an attach that was killed");
    }
    picture_free(now);
    step_free(&recording);
}

/* ---- a history, stepped ----------------------------------------------------------------------------------------------------------- */

/* is_chosen -- moments on which attach is stepped as well: of each row of its table the first, and a flush half done */
static bool is_chosen(const struct history *history, const struct model *model, const struct stretch *stretch, size_t nth, bool seen[4])
{
    enum { NOTHING, REPLAYED, RESTART, NO_RESTART } row;
    const struct step *step = &history->steps[stretch->before->progress.step];
    row = model->sealed == 0                  ? NOTHING
          : model->committed != model->sealed ? REPLAYED
          : model->receiving == model->sealed ? RESTART
                                              : NO_RESTART;
    bool first = !seen[row];
    seen[row] = true;
    return first || (step->kind == FLUSH && step->epoch == 3 && nth == stretch->n_changes / 2);
}

static void check_stretch(const struct history *history, const struct recording *recording, const struct stretch *stretch, bool seen[4])
{
    struct picture *now = copy_of(stretch->before);
    struct model before, model;
    const int at = stretch->before->progress.step;
    model_start(&before);
    for (int i = 0; i < at; i++)
        model_step(&before, history, &history->steps[i]);
    for (size_t nth = 0; nth < stretch->n_changes; nth++) {
        const struct change *change = &recording->changes[stretch->first_change + nth];
        step_apply(recording, change, now);
        set_moment(now, stretch->before);
        model = before;
        model_death(&model, history, memory.progress);
        if (!guest_is_mixed_of(&model))
            breach(history, change, "", "guest RAM");
        if (is_chosen(history, &model, stretch, nth, seen)) {
            step_attach(history, &model);
            set_moment(now, stretch->before);
        }
        totals.moments++;
        totals.recoveries++;
        if (!check_recovery(&memory, history, &model, nth % 16 == 0))
            breach(history, change, "", "recovery");
    }
    picture_free(now);
}

static void run_case(unsigned number)
{
    struct history history;
    struct recording recording;
    make_history(&history, (number & 15) | (number & 1) << 4, number >> 4 | (number >> 1 & 1) << 4);
    memory_reset(&memory);
    int rc = step_child(&memory, run_history, &history, &recording);
    if (rc == -2) {
        fprintf(stderr, "this machine allows no ptrace\n");
        exit(77);
    }
    if (rc != 0)
        breach(&history, NULL, "", "the run without a death");
    totals.cases++;
    totals.instructions += recording.n_instructions;
    bool seen[4] = {false};
    for (unsigned i = 0; i < recording.n_stretches; i++)
        check_stretch(&history, &recording, &recording.stretches[i], seen);
    step_free(&recording);
}

int main(int argc, char **argv)
{
    memory_make(&memory);
    for (int i = 1; i < argc; i++) {
        char *end;
        unsigned long number = strtoul(argv[i], &end, 10);
        if (*end || end == argv[i] || number >= CASES) {
            fprintf(stderr, "usage: step [CASE...], each 0 to %d\n", CASES - 1);
            return 2;
        }
        run_case((unsigned)number);
    }
    printf("{\"cases\": %llu, \"instructions\": %llu, \"moments\": %llu, \"attaches_stepped\": %llu, \"recoveries\": %llu}\n", totals.cases,
           totals.instructions, totals.moments, totals.attaches_stepped, totals.recoveries);
    return 0;
}
