/* SPDX-License-Identifier: Apache-2.0 */
/* crash_world.c -- contents of pages, histories, and the model: plain integers, no library. */
#include "crash_world.h"

#include <stdio.h>
#include <string.h>

bool bounded, spill, sparse;

/* ---- contents ------------------------------------------------------------------------------------------------ */

uint64_t tag_of(unsigned epoch, unsigned writer, unsigned page)
{
    return (uint64_t)epoch << 16 | writer << 8 | (page + 1);
}

static uint64_t word_of(uint64_t tag, unsigned i)
{
    uint64_t x = (tag * 512 + i) * 0x9E3779B97F4A7C15ull; /* so that almost every byte of two pages differs */
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    return x ^ x >> 27;
}

void fill_page(void *page, uint64_t tag)
{
    uint64_t *words = page;
    for (unsigned i = 0; i < PAGE / 8; i++)
        words[i] = tag ? word_of(tag, i) : 0;
}

static bool half_is(const uint64_t *words, unsigned half, uint64_t tag)
{
    for (unsigned i = half * PAGE / 16; i < (half + 1) * PAGE / 16; i++) {
        if (words[i] != (tag ? word_of(tag, i) : 0))
            return false;
    }
    return true;
}

bool page_is(const void *page, uint64_t tag)
{
    return half_is(page, 0, tag) && half_is(page, 1, tag);
}

bool page_is_either(const void *page, uint64_t tag, uint64_t other)
{
    for (unsigned half = 0; half < 2; half++) {
        if (!half_is(page, half, tag) && !half_is(page, half, other))
            return false;
    }
    return true;
}

static void name_half(const uint64_t *words, unsigned half, char *out, size_t room)
{
    static const char *const writers[] = {"?", "PVM", "SVM", "load", "recovered"};
    for (unsigned epoch = 0; epoch < EPOCHS_MAX; epoch++) {
        for (unsigned writer = 1; writer < 5; writer++) {
            for (unsigned page = 0; page < PAGES; page++) {
                if (half_is(words, half, tag_of(epoch, writer, page))) {
                    snprintf(out, room, "epoch %u by %s, page %u", epoch, writers[writer], page);
                    return;
                }
            }
        }
    }
    snprintf(out, room, half_is(words, half, 0) ? "zeros" : "a mix");
}

const char *name_page(const void *page)
{
    static char text[160];
    char halves[2][64];
    name_half(page, 0, halves[0], sizeof halves[0]);
    name_half(page, 1, halves[1], sizeof halves[1]);
    snprintf(text, sizeof text, strcmp(halves[0], halves[1]) ? "%s | %s" : "%s", halves[0], halves[1]);
    return text;
}

unsigned char state_byte(unsigned epoch, uint64_t i)
{
    return (unsigned char)(word_of(epoch * 77u + 5, (unsigned)(i / 8)) >> (i % 8 * 8));
}

/* ---- histories ------------------------------------------------------------------------------------------------- */

const char *kind_name(enum kind kind)
{
    static const char *const names[] = {"create",      "add_block",    "receive_page", "receive_zero",    "receive_stream", "torn packet",
                                        "preflush",    "guest writes", "sync",         "late mark_dirty", "device state",   "seal",
                                        "vetoed seal", "flush",        "loaded",       "abort",           "give_back",      "end"};
    return names[kind];
}

static void add(struct history *history, struct step step)
{
    history->steps[history->n_steps++] = step;
}

/* each page of a set, one step a page */
static void add_each(struct history *history, enum kind kind, unsigned epoch, unsigned set, unsigned writer)
{
    for (unsigned page = 0; page < PAGES; page++) {
        if (set >> page & 1)
            add(history, (struct step){kind, epoch, page, tag_of(epoch, writer, page), 0});
    }
}

static void pvm_writes(struct history *history, unsigned epoch, unsigned set)
{
    for (unsigned page = 0; page < PAGES; page++) {
        if (set >> page & 1)
            history->pvm_at[epoch][page] = tag_of(epoch, 1, page);
    }
}

/* each page of a set that the SVM gives back; only sparse blocks take it */
static void add_give_back(struct history *history, unsigned epoch, unsigned set)
{
    if (sparse)
        add_each(history, GIVE_BACK, epoch, set, 2);
}

static void begin_epoch(struct history *history, unsigned epoch)
{
    if (epoch > 1)
        memcpy(history->pvm_at[epoch], history->pvm_at[epoch - 1], sizeof history->pvm_at[epoch]);
}

static void add_state(struct history *history, unsigned epoch, uint64_t len)
{
    history->state_len[epoch] = len;
    add(history, (struct step){STATE, epoch, 0, 0, len});
}

static void add_commit(struct history *history, unsigned epoch, unsigned late)
{
    add(history, (struct step){SEAL, epoch, 0, 0, 0});
    if (late < PAGES)
        add(history, (struct step){LATE_MARK, epoch, late, 0, 0});
    add(history, (struct step){FLUSH, epoch, 0, 0, 0});
    add(history, (struct step){LOADED, epoch, 0, 0, 0});
}

static unsigned rotate(unsigned set)
{
    return (set << 2 | set >> (PAGES - 2)) & ALL;
}

/*
 * make_history -- epochs 1 (initial copy), 2 (aborted in a torn packet), 3 (the case's bitmaps), 4 (vetoed), 5 (other
 * bitmaps, by stream), 6 (first page only).  The sealed ones are 1, 3, 5: all odd, so that nothing may go by parity.
 */
void make_history(struct history *history, unsigned pvm, unsigned svm)
{
    memset(history, 0, sizeof *history);
    history->pvm = pvm;
    history->svm = svm;
    unsigned pvm2 = ALL & ~rotate(pvm), svm2 = rotate(svm);

    add(history, (struct step){CREATE, 0, 0, 0, 0});
    add(history, (struct step){ADD_BLOCK, 0, 0, 0, 0});
    add(history, (struct step){ADD_BLOCK, 0, 1, 0, 0});

    begin_epoch(history, 1);
    pvm_writes(history, 1, ALL & ~4u); /* page 2 is zeros */
    add_each(history, RECEIVE, 1, 3, 1);
    add(history, (struct step){PREFLUSH, 1, 0, 0, 0});
    add(history, (struct step){ZERO, 1, 2, 0, 0});
    add_each(history, RECEIVE, 1, 0x19, 1); /* page 0 comes twice, page 1 was copied before the seal */
    add_state(history, 1, 0);
    add_commit(history, 1, PAGES);

    begin_epoch(history, 2);
    pvm_writes(history, 2, pvm);
    add_each(history, WRITE, 2, svm & 5, 2);
    add(history, (struct step){TORN, 2, pvm, 0, 0});
    add(history, (struct step){SYNC, 2, svm & 5, 0, 0}); /* a pause that came to nothing */
    add(history, (struct step){ABORT, 2, 0, 0, 0});

    begin_epoch(history, 3);
    pvm_writes(history, 3, pvm & 0x15); /* the others are sent again as they were: unacked */
    add_each(history, WRITE, 3, svm & ~4u, 2);
    for (unsigned page = 0; page < PAGES; page++) {
        if (pvm >> page & 1)
            add(history, (struct step){RECEIVE, 3, page, history->pvm_at[3][page], 0});
    }
    if (pvm & 2) { /* it came, and then it came as zeros */
        history->pvm_at[3][1] = 0;
        add(history, (struct step){ZERO, 3, 1, 0, 0});
    }
    add_give_back(history, 3, rotate(svm) & 0x1a);
    add_state(history, 3, STATE_MAX);
    add(history, (struct step){SYNC, 3, svm, 0, 0});
    add_commit(history, 3, (pvm + svm) % (PAGES + 1));

    begin_epoch(history, 4);
    pvm_writes(history, 4, pvm2 & 6);
    add_each(history, WRITE, 4, svm2 & 0x19, 3); /* device load, then the SVM */
    add_each(history, RECEIVE, 4, pvm2 & 6, 1);
    add_state(history, 4, 100);
    add(history, (struct step){SYNC, 4, svm2 & 0x19, 0, 0});
    add(history, (struct step){VETO, 4, 0, 0, 0});

    begin_epoch(history, 5);
    pvm_writes(history, 5, pvm2 & ~2u);
    if (pvm2 & 8)
        history->pvm_at[5][3] = 0; /* zeros in a stream */
    add_each(history, WRITE, 5, svm2 & 6, 2);
    add(history, (struct step){STREAM, 5, pvm2, 0, 0});
    add_give_back(history, 5, rotate(svm2) & 5);
    add_state(history, 5, 4097);
    add(history, (struct step){SYNC, 5, svm2, 0, 0});
    add_commit(history, 5, PAGES);

    begin_epoch(history, 6);
    pvm_writes(history, 6, 1);
    add_each(history, WRITE, 6, svm, 2);
    add_each(history, RECEIVE, 6, 1, 1);
    add_give_back(history, 6, ALL & ~svm);
    add(history, (struct step){END, 6, 0, 0, 0});
    memcpy(history->pvm_at[7], history->pvm_at[6], sizeof history->pvm_at[7]);
}

/* ---- the model ---------------------------------------------------------------------------------------------------- */

void model_start(struct model *model)
{
    memset(model, 0, sizeof *model);
    model->partial = true;
}

static void guest_is(struct model *model, const uint64_t tags[PAGES])
{
    memcpy(model->guest, tags, sizeof model->guest);
    memcpy(model->or_else, tags, sizeof model->or_else);
}

static void is_sealed(struct model *model, unsigned epoch)
{
    model->sealed = epoch;
    model->flush_bits = model->pvm_bits | model->svm_bits;
    model->pvm_bits = model->svm_bits = 0;
}

static void is_committed(struct model *model, const struct history *history)
{
    model->committed = model->sealed;
    model->partial = false;
    guest_is(model, history->pvm_at[model->sealed]);
}

/* is_received -- whole pages of an epoch */
static void is_received(struct model *model, unsigned epoch, unsigned pages)
{
    model->receiving = epoch;
    if (!bounded || model->sealed) /* else they went straight to guest RAM */
        model->pvm_bits |= pages;
}

void model_step(struct model *model, const struct history *history, const struct step *step)
{
    switch (step->kind) {
    case CREATE:
        model->created = true;
        break;
    case ADD_BLOCK:
        model->blocks = step->page == 1;
        break;
    case RECEIVE:
    case ZERO:
        is_received(model, step->epoch, 1u << step->page);
        break;
    case STREAM:
        if (step->page)
            is_received(model, step->epoch, step->page);
        break;
    case TORN:
        if (step->page) /* a packet a block, the last of them torn; what is staged of that is no page */
            is_received(model, step->epoch, !bounded ? step->page : step->page >> PAGES_0 ? step->page & (ALL >> PAGES_1) : 0);
        break;
    case PREFLUSH:
        model->pvm_bits = 0;
        break;
    case WRITE:
        if (!bounded)
            model->guest[step->page] = model->or_else[step->page] = step->tag;
        break;
    case GIVE_BACK:
        model->guest[step->page] = model->or_else[step->page] = 0;
        model->svm_bits |= 1u << step->page;
        break;
    case SYNC:
        model->svm_bits |= bounded ? 0 : step->page;
        break;
    case LATE_MARK:
        model->svm_bits |= bounded ? 0 : 1u << step->page;
        break;
    case STATE:
        model->receiving = step->epoch;
        break;
    case SEAL:
        is_sealed(model, step->epoch);
        break;
    case FLUSH:
        is_committed(model, history);
        break;
    case VETO:
    case ABORT:
        if (bounded)
            model->pvm_bits = 0;
        break;
    case LOADED:
    case END:
        break;
    }
}

/* model_death -- the step the child died in, by what had been stored */
void model_death(struct model *model, const struct history *history, const struct progress *progress)
{
    const struct step *step = &history->steps[progress->step];
    if (progress->receiving_stored)
        model->receiving = step->epoch;
    switch (step->kind) {
    case WRITE:
        if (!bounded)
            model->or_else[step->page] = step->tag;
        break;
    case GIVE_BACK:
        model->or_else[step->page] = 0;
        break;
    case SEAL:
        if (progress->word_stored)
            is_sealed(model, step->epoch);
        break;
    case PREFLUSH:
        model->pvm_bits = 0; /* some of them were taken */
        break;
    case FLUSH:
        if (progress->word_stored)
            is_committed(model, history);
        else
            memcpy(model->or_else, history->pvm_at[model->sealed], sizeof model->or_else);
        break;
    default:
        break;
    }
}

/* model_attach_death -- after an attach that was killed: it may have finished a flush, or be in the middle of a copy */
void model_attach_death(struct model *model, const struct history *history, const struct progress *progress)
{
    if (model->sealed == 0 || !model->blocks)
        return;
    bool replaying = model->committed != model->sealed;
    if (replaying && progress->word_stored) {
        is_committed(model, history);
    } else if (replaying || (!bounded && model->receiving == model->sealed)) {
        for (unsigned page = 0; page < PAGES; page++) { /* a page torn before may stay so until it is copied */
            if (model->guest[page] == model->or_else[page])
                model->or_else[page] = history->pvm_at[model->sealed][page];
        }
    }
}
