/* SPDX-License-Identifier: Apache-2.0 */
/* crash_check.c -- what must be found after a death, and that the pair can go on from there. */
#define _GNU_SOURCE
#include "crash_world.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

char complaint[1000];

void complain(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(complaint, sizeof complaint, format, args);
    va_end(args);
}

static bool guest_is(const struct memory *memory, const uint64_t tags[PAGES], const uint64_t or_else[PAGES], const char *when)
{
    for (unsigned page = 0; page < PAGES; page++) {
        if (!page_is_either(memory_page(memory, page), tags[page], or_else[page])) {
            uint8_t wanted[PAGE];
            fill_page(wanted, tags[page]);
            char found[160], text[160];
            snprintf(found, sizeof found, "%s", name_page(memory_page(memory, page)));
            snprintf(text, sizeof text, "%s", name_page(wanted));
            complain("%s: page %u of guest RAM holds %s; must be %s", when, page, found, text);
            return false;
        }
    }
    return true;
}

/* check_dead -- guest RAM as the dead process left it: no byte of an epoch that is not sealed */
bool check_dead(const struct memory *memory, const struct model *model)
{
    return model->partial || guest_is(memory, model->guest, model->or_else, "after the death");
}

static bool is(const char *what, long long found, long long wanted)
{
    if (found != wanted)
        complain("%s is %lld (%s), must be %lld", what, found, colocache_last_error(), wanted);
    return found == wanted;
}

static bool state_is(struct colocache *cc, unsigned epoch, uint64_t len)
{
    const void *at;
    uint64_t found;
    if (!is("device_state", colocache_device_state(cc, &at, &found), 0) ||
        !is("length of the device state", (long long)found, (long long)len))
        return false;
    for (uint64_t i = 0; i < len; i++) {
        if (((const unsigned char *)at)[i] != state_byte(epoch, i)) {
            complain("byte %llu of the device state is not epoch %u's", (unsigned long long)i, epoch);
            return false;
        }
    }
    return true;
}

static unsigned bits_of(struct colocache *cc, int kind)
{
    uint64_t words[2] = {0, 0};
    for (unsigned block = 0; block < 2; block++)
        colocache_get_bitmap(cc, block, kind, &words[block], 1);
    return (unsigned)(words[0] | words[1] << PAGES_0);
}

static bool receive(struct colocache *cc, unsigned epoch, unsigned page, uint64_t tag)
{
    uint8_t content[PAGE];
    unsigned block = page >= PAGES_0, pfn = block ? page - PAGES_0 : page;
    fill_page(content, tag);
    return is("receive",
              tag ? colocache_receive_page(cc, epoch, block, pfn, content, PAGE) : colocache_receive_zero(cc, epoch, block, pfn, 1), 0);
}

static bool vm_sees(struct colocache *cc, const uint64_t tags[PAGES])
{
    for (unsigned page = 0; page < PAGES; page++) {
        if (!page_is(vm_page(cc, page), tags[page])) {
            complain("the VM sees another page %u than is in guest RAM: %s", page, name_page(vm_page(cc, page)));
            return false;
        }
    }
    return true;
}

/* attachment_is -- the record carries what `epoch` was sealed with, and no other's */
static bool attachment_is(struct colocache *cc, unsigned epoch)
{
    struct colocache_status status = {.struct_size = sizeof status};
    return is("get_status", colocache_get_status(cc, &status), 0) && is("epoch of the record", (long long)status.sealed_epoch, epoch) &&
           is("bytes of the attachment", (long long)status.attachment_bytes, (long long)attachment_bytes(epoch)) &&
           is("its checksum", (long long)status.attachment_checksum, epoch ? (long long)~attachment_bytes(epoch) : 0) &&
           is("its slot", status.attachment_slot, attachment_slot(epoch));
}

/* go_on -- a further epoch: the PVM sends only what the secondary can't have (all of it before the first seal); the SVM, if
 * it runs, has written too.  Afterwards the secondary is whole. */
static bool go_on(const struct memory *memory, struct colocache *cc, const struct history *history, const struct model *model,
                  unsigned at_epoch, bool svm_runs)
{
    unsigned epoch = model->receiving + 1, n = 0;
    uint64_t now[PAGES];
    memcpy(now, history->pvm_at[at_epoch], sizeof now);
    unsigned writes = (history->pvm ^ history->svm << 1 ^ epoch) & ALL, svm_writes = (history->svm >> 1 ^ epoch << 2) & ALL;
    for (unsigned page = 0; page < PAGES; page++) {
        if (writes >> page & 1)
            now[page] = tag_of(epoch + 8, 1, page);
    }
    for (unsigned page = 0; svm_runs && page < PAGES; page++) {
        if (svm_writes >> page & 1) {
            fill_page(vm_page(cc, page), tag_of(epoch, 4, page));
            colocache_mark_dirty(cc, page >= PAGES_0, page < PAGES_0 ? page : page - PAGES_0, 1);
        }
    }
    for (unsigned page = 0; page < PAGES; page++) {
        if (model->sealed == 0 || now[page] != history->pvm_at[model->sealed][page]) {
            n++;
            if (!receive(cc, epoch, page, now[page]))
                return false;
        }
    }
    uint64_t len = epoch * 1361 % (STATE_MAX + 1);
    void *state;
    if (!is("device_state_begin", colocache_device_state_begin(cc, epoch, len, &state), 0))
        return false;
    for (uint64_t i = 0; i < len; i++)
        ((unsigned char *)state)[i] = state_byte(epoch, i);
    struct colocache_seal_args args = {.struct_size = sizeof args,
                                       .epoch = epoch,
                                       .n_pages = n,
                                       .attachment_bytes = attachment_bytes(epoch),
                                       .attachment_checksum = ~attachment_bytes(epoch),
                                       .attachment_slot = attachment_slot(epoch)};
    struct colocache_status status = {.struct_size = sizeof status};
    bool ok = is("seal of the next epoch", colocache_seal(cc, &args, NULL), 0) &&
              is("flush of the next epoch", colocache_flush(cc, NULL), 0) && guest_is(memory, now, now, "after the next epoch") &&
              vm_sees(cc, now) && attachment_is(cc, epoch) && state_is(cc, epoch, len) && is("loaded", colocache_loaded(cc, 1), 0) &&
              is("validate", colocache_validate(cc, 1), 0) && is("get_status", colocache_get_status(cc, &status), 0) &&
              is("committed epoch", (long long)status.committed_epoch, epoch) && is("phase", status.phase, COLOCACHE_PHASE_LIVE);
    if (ok && bounded)
        ok = is("free_staged", colocache_free_staged(cc), 0) && is("nothing staged", cache_is_empty(memory), 1);
    return ok;
}

/* begin_again -- no region to attach to: it is emptied and made anew, and the initial copy runs */
static bool begin_again(const struct memory *memory, const struct history *history, const struct model *model, int refused)
{
    struct colocache *cc;
    struct colocache_images images[2];
    const struct colocache_options options = memory_options(memory);
    if (refused != COLOCACHE_E_BLOCK && (model->created || refused != COLOCACHE_E_NOT_COLOCACHE)) {
        complain("attach to a half-made region gave %d (%s)", refused, colocache_last_error());
        return false;
    }
    memory_images(memory, images);
    if (ftruncate(memory->control, 0) != 0 || !is("create", colocache_create(memory->control, &options, &cc), 0))
        return false;
    bool ok = is("add_block", colocache_add_block(cc, &images[0], NULL), 0) &&
              is("add_block", colocache_add_block(cc, &images[1], NULL), 0) && go_on(memory, cc, history, model, 1, false);
    colocache_close(cc);
    return ok;
}

static bool check_report(const struct model *model, const struct colocache_recovery *report, uint32_t action)
{
    static const char *const names[] = {"NOTHING", "REPLAYED", "RESTART", "NO_RESTART"};
    if (report->action != action) {
        complain("attach says %s (%s), must say %s", names[report->action], report->sentence, names[action]);
        return false;
    }
    bool whole = action == COLOCACHE_RECOVERED_REPLAYED || action == COLOCACHE_RECOVERED_RESTART;
    if (!is("epoch of the recovery", (long long)report->epoch, whole ? model->sealed : 0) ||
        !is("newest epoch in the cache", (long long)report->receiving_epoch, model->receiving))
        return false;
    uint64_t pages = action == COLOCACHE_RECOVERED_RESTART    ? (bounded ? 0 : PAGES)
                     : action == COLOCACHE_RECOVERED_REPLAYED ? (uint64_t)__builtin_popcount(model->flush_bits)
                                                              : 0;
    if (sparse && action == COLOCACHE_RECOVERED_RESTART && report->n_pages < pages)
        pages = report->n_pages; /* holes are not copied */
    return is("pages copied by attach", (long long)report->n_pages, (long long)pages) &&
           is("a sentence for people", report->sentence[0] != 0, 1);
}

static bool check_attached(const struct memory *memory, const struct history *history, const struct model *model,
                           const struct colocache_recovery *report, struct colocache *cc, const uint8_t before[PAGES][PAGE])
{
    uint32_t action = model->sealed == 0                             ? COLOCACHE_RECOVERED_NOTHING
                      : model->committed != model->sealed            ? COLOCACHE_RECOVERED_REPLAYED
                      : model->receiving == model->sealed || bounded ? COLOCACHE_RECOVERED_RESTART
                                                                     : COLOCACHE_RECOVERED_NO_RESTART;
    bool whole = action == COLOCACHE_RECOVERED_REPLAYED || action == COLOCACHE_RECOVERED_RESTART;
    if (!check_report(model, report, action))
        return false;
    if (whole && !guest_is(memory, history->pvm_at[model->sealed], history->pvm_at[model->sealed], "after attach"))
        return false;
    for (unsigned page = 0; action == COLOCACHE_RECOVERED_NO_RESTART && page < PAGES; page++) {
        if (memcmp(before[page], memory_page(memory, page), PAGE) != 0) {
            complain("attach says NO_RESTART but changed page %u", page);
            return false;
        }
    }
    if (action != COLOCACHE_RECOVERED_NOTHING) {
        unsigned pvm = bits_of(cc, COLOCACHE_BITMAP_PVM), svm = bits_of(cc, COLOCACHE_BITMAP_SVM);
        unsigned must = whole ? model->svm_bits : ALL;
        for (unsigned page = 0; sparse && page < PAGES; page++) { /* what is a hole in both images is equal without a bit */
            if (page_is(before[page], 0) && !(model->svm_bits >> page & 1))
                must &= ~(1u << page);
        }
        bool lost = bounded ? pvm || svm : model->pvm_bits & ~pvm || must & ~svm; /* bounded: a bit left would be a page of zeros */
        if (lost) {
            complain("attach left wrong bits: PVM %02x of %02x, SVM %02x of %02x", pvm, model->pvm_bits, svm, must);
            return false;
        }
        if (!state_is(cc, model->sealed, history->state_len[model->sealed]) || !attachment_is(cc, model->sealed))
            return false;
    }
    if (bounded && !is("the cache takes no memory after attach", cache_is_empty(memory), 1))
        return false;
    if (bounded && whole && !vm_sees(cc, history->pvm_at[model->sealed]))
        return false;
    uint64_t epoch = 0;
    if (!whole && !is("failover without a state", colocache_failover(cc, &epoch), COLOCACHE_E_NO_STATE))
        return false;
    return is("validate after attach", colocache_validate(cc, action != COLOCACHE_RECOVERED_NOTHING), 0);
}

/* check_recovery -- attach, look at everything, go on with a further epoch; take_over: fail over in the end */
bool check_recovery(const struct memory *memory, const struct history *history, const struct model *model, bool take_over)
{
    static uint8_t before[PAGES][PAGE];
    struct colocache_recovery report;
    struct colocache *cc;
    for (unsigned page = 0; page < PAGES; page++)
        memcpy(before[page], memory_page(memory, page), PAGE);
    int rc = memory_attach(memory, &report, &cc);
    if (!model->blocks && rc != 0)
        return begin_again(memory, history, model, rc);
    if (!is("attach", rc, 0))
        return false;
    unsigned at_epoch = history->steps[memory->progress->step].epoch;
    bool ok = check_attached(memory, history, model, &report, cc, before);
    bool svm_runs = report.action == COLOCACHE_RECOVERED_REPLAYED || report.action == COLOCACHE_RECOVERED_RESTART;
    if (ok)
        ok = go_on(memory, cc, history, model, at_epoch ? at_epoch : 1, svm_runs);
    uint64_t epoch;
    if (ok && take_over)
        ok = is("failover", colocache_failover(cc, &epoch), 0) && is("epoch of the failover", (long long)epoch, model->receiving + 1);
    colocache_close(cc);
    return ok && (!take_over || is("attach after failover", memory_attach(memory, &report, &cc), COLOCACHE_E_FAILED_OVER));
}
