/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash.c -- die everywhere: for each of 256 pairs of bitmaps a child is killed at each crash point of a history, then a fresh
 * process attaches and everything is compared with the model; attach itself is killed at each of its points in turn.
 *
 *     crash [--memory mirror|sparse|bounded|spill] [--cases FIRST:STEP] [--attach-every N] [--early-every N] [--double-every N]
 *
 * Prints one line of JSON; exit 0 if the promise held everywhere, 1 with the first breach on stderr.
 */
#define _GNU_SOURCE
#include "crash_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct totals {
    unsigned long long cases, points, kills, attach_kills, recoveries;
};

static struct totals totals;
static struct memory memory;

static void __attribute__((noreturn)) breach(const struct history *history, const char *what, uint64_t point, uint64_t attach_point)
{
    const struct progress *progress = memory.progress;
    fprintf(stderr, "PVM %02x SVM %02x, killed at point %llu (%s, in %s of epoch %u), attach killed at %llu: %s: %s\n", history->pvm,
            history->svm, (unsigned long long)point, progress->where ? (const char *)progress->where : "none",
            kind_name(history->steps[progress->step].kind), history->steps[progress->step].epoch, (unsigned long long)attach_point, what,
            complaint[0] ? complaint : progress->failed);
    exit(1);
}

struct run {
    const struct history *history;
    bool check_bits;
};

static void run_work(void *context)
{
    const struct run *run = context;
    run_steps(&memory, run->history, run->check_bits);
}

static void attach_work(void *context)
{
    struct colocache *cc;
    (void)context;
    memory.progress->word_stored = 0;
    watch_points(memory.progress);
    if (memory_attach(&memory, NULL, &cc) != 0) {
        snprintf(memory.progress->failed, sizeof memory.progress->failed, "attach: %s", colocache_last_error());
        _exit(3);
    }
}

/* ---- attach, killed as well ----------------------------------------------------------------------------------------------- */

/* kill_attach -- attach killed at each of its points on the state there is now; if `depth` is 2 the attach after it as well */
static void kill_attach(const struct history *history, const struct model *model, uint64_t point, int depth)
{
    static struct picture *pictures[2];
    if (!pictures[depth - 1])
        pictures[depth - 1] = memory_picture(&memory);
    struct picture *picture = pictures[depth - 1];
    picture_move(picture, &memory, false);
    int killed;
    for (uint64_t at = 1;; at++) {
        killed = in_child(attach_work, NULL, at);
        if (killed < 0)
            breach(history, "attach failed by itself", point, at);
        totals.attach_kills += (unsigned)killed;
        struct model after = *model;
        model_attach_death(&after, history, memory.progress);
        bool restarting = !bounded && after.sealed && after.committed == after.sealed && after.receiving == after.sealed;
        if (!restarting && !check_dead(&memory, &after)) /* a restart copies over whatever the dead one left */
            breach(history, "guest RAM after a killed attach", point, at);
        if (killed && depth > 1) {
            kill_attach(history, &after, point, depth - 1);
        } else {
            totals.recoveries++;
            if (!check_recovery(&memory, history, &after, false))
                breach(history, "recovery after a killed attach", point, at);
        }
        if (!killed)
            break;
        picture_move(picture, &memory, true);
    }
}

/* ---- one case ---------------------------------------------------------------------------------------------------------------- */

struct plan {
    unsigned first, step, attach_every, early_every, double_every;
};

static int find_step(const struct history *history, enum kind kind, unsigned epoch)
{
    for (int i = 0; i < history->n_steps; i++) {
        if (history->steps[i].epoch == epoch && (history->steps[i].kind == kind || kind == END))
            return i;
    }
    return history->n_steps;
}

/* kill_at -- one death and what follows; attach_depth: how many attaches in a row are killed as well */
static void kill_at(const struct history *history, uint64_t point, int attach_depth)
{
    struct run run = {history, false};
    struct model model;
    memory_reset(&memory);
    if (in_child(run_work, &run, point) != 1)
        breach(history, "the child was not killed", point, 0);
    totals.kills++;
    model_start(&model);
    for (int i = 0; i < memory.progress->step; i++)
        model_step(&model, history, &history->steps[i]);
    model_death(&model, history, memory.progress);
    if (!check_dead(&memory, &model))
        breach(history, "guest RAM", point, 0);
    if (attach_depth && model.blocks) {
        struct picture *picture = memory_picture(&memory);
        picture_move(picture, &memory, false);
        kill_attach(history, &model, point, attach_depth);
        picture_move(picture, &memory, true);
        picture_free(picture);
    }
    totals.recoveries++;
    if (!check_recovery(&memory, history, &model, point % 16 == 0))
        breach(history, "recovery", point, 0);
}

static void run_case(unsigned number, const struct plan *plan)
{
    struct history history;
    unsigned more_pvm = (unsigned)__builtin_popcount(number) & 1, more_svm = (number >> 1 ^ number >> 5) & 1;
    make_history(&history, (number & 15) | more_pvm << 4, number >> 4 | more_svm << 4);
    struct run run = {&history, true};
    memory_reset(&memory);
    if (in_child(run_work, &run, 0) != 0)
        breach(&history, "the run without a death", 0, 0);
    uint64_t passed[STEPS_MAX + 1] = {0};
    for (int i = 0; i <= history.n_steps; i++)
        passed[i] = memory.progress->passed[i];
    totals.cases++;
    /* states that an attach is killed on, in every case: sealed, in mid-flush, committed, and receiving again */
    const uint64_t chosen[] = {
        passed[find_step(&history, SEAL, 3) + 1],
        (passed[find_step(&history, FLUSH, 3)] + passed[find_step(&history, FLUSH, 3) + 1]) / 2,
        passed[find_step(&history, LOADED, 3) + 1] + 1,
        passed[find_step(&history, VETO, 4)],
    };
    bool early = number % plan->early_every == 0, every_attach = number % plan->attach_every == 0;
    uint64_t total = passed[history.n_steps];
    /* epoch 1 is the same in all cases */
    for (uint64_t point = early ? 1 : passed[find_step(&history, END, 2)] + 1; point <= total; point++) {
        int depth = every_attach;
        for (unsigned i = 0; i < 4; i++) {
            if (point == chosen[i])
                depth = number % plan->double_every == 0 ? 2 : 1;
        }
        totals.points++;
        kill_at(&history, point, depth);
    }
}

int main(int argc, char **argv)
{
    struct plan plan = {0, 1, 64, 16, 32};
    for (int i = 1; i < argc; i++) {
        bool ok = false;
        if (strcmp(argv[i], "--memory") == 0 && i + 1 < argc)
            ok = (spill = strcmp(argv[++i], "spill") == 0) || (bounded = strcmp(argv[i], "bounded") == 0) ||
                 (sparse = strcmp(argv[i], "sparse") == 0) || strcmp(argv[i], "mirror") == 0;
        else if (strcmp(argv[i], "--cases") == 0 && i + 1 < argc)
            ok = sscanf(argv[++i], "%u:%u", &plan.first, &plan.step) == 2 && plan.step > 0;
        else if (strcmp(argv[i], "--attach-every") == 0 && i + 1 < argc)
            ok = (plan.attach_every = (unsigned)atoi(argv[++i])) > 0;
        else if (strcmp(argv[i], "--early-every") == 0 && i + 1 < argc)
            ok = (plan.early_every = (unsigned)atoi(argv[++i])) > 0;
        else if (strcmp(argv[i], "--double-every") == 0 && i + 1 < argc)
            ok = (plan.double_every = (unsigned)atoi(argv[++i])) > 0;
        if (!ok) {
            fprintf(stderr, "usage: crash [--memory mirror|sparse|bounded|spill] [--cases FIRST:STEP] [--attach-every N] "
                            "[--early-every N] [--double-every N]\n");
            return 2;
        }
    }
    bounded |= spill;
    memory_make(&memory);
    for (unsigned number = plan.first; number < CASES; number += plan.step)
        run_case(number, &plan);
    printf("{\"cases\": %llu, \"points\": %llu, \"kills\": %llu, \"attach_kills\": %llu, \"recoveries\": %llu}\n", totals.cases,
           totals.points, totals.kills, totals.attach_kills, totals.recoveries);
    return 0;
}
