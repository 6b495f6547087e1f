/* SPDX-License-Identifier: Apache-2.0 */
/* crash_run.c -- the child that runs a history's steps with the library, until it dies. */
#define _GNU_SOURCE
#include "crash_world.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fault.h"

/* in_child -- a process that is killed at its crash_at-th crash point: 1 killed at its crash point, 0 it came to the end, -1 anything else */
int in_child(void (*work)(void *context), void *context, uint64_t crash_at)
{
    pid_t pid = fork();
    if (pid == 0) {
        colocache_fault_passed = 0;
        colocache_fault_crash_at = crash_at;
        work(context);
        _exit(0);
    }
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        perror("fork or waitpid");
        exit(2);
    }
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return 1;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1;
}

static struct progress *watched;

static void see(const char *name)
{
    watched->where = name;
    if (strcmp(name, "commit: after the word") == 0)
        watched->word_stored = 1;
    else if (strcmp(name, "receive: after the receiving word") == 0)
        watched->receiving_stored = 1;
}

void watch_points(struct progress *progress)
{
    watched = progress;
    colocache_fault_seen = see;
}

static void __attribute__((noreturn, format(printf, 2, 3))) give_up(const struct memory *memory, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(memory->progress->failed, sizeof memory->progress->failed, format, args);
    va_end(args);
    _exit(3);
}

static void expect(const struct memory *memory, const struct step *step, int rc, int wanted)
{
    if (rc != wanted)
        give_up(memory, "%s of epoch %u gave %d (%s), expected %d", kind_name(step->kind), step->epoch, rc, colocache_last_error(), wanted);
}

static unsigned block_of(unsigned page)
{
    return page >= PAGES_0;
}

static unsigned pfn_of(unsigned page)
{
    return page < PAGES_0 ? page : page - PAGES_0;
}

/* guest_write -- what a vCPU does: bytes, half a page at a time; its dirty log is kept until SYNC */
static void guest_write(struct colocache *cc, unsigned page, uint64_t tag)
{
    uint8_t content[PAGE];
    fill_page(content, tag);
    memcpy(vm_page(cc, page), content, PAGE / 2);
    CC_CRASH_POINT("guest: half a write");
    memcpy(vm_page(cc, page), content, PAGE);
    CC_CRASH_POINT("guest: a write");
}

static int veto(void *context, const void *state, uint64_t len_bytes)
{
    (void)context, (void)state, (void)len_bytes;
    return 7;
}

/* stream_pages -- through a socket pair from a sender's memory; `torn`: the connection ends in the middle of the last page */
static void stream_pages(const struct memory *memory, struct colocache *cc, const struct history *history, const struct step *step,
                         bool torn)
{
    static uint8_t ram[PAGES][PAGE] __attribute__((aligned(PAGE)));
    static uint8_t wire[PAGES * PAGE + 8192];
    struct colocache_sender *sender;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t came;
    int pair[2];
    expect(memory, step, colocache_sender_create(&sender), 0);
    expect(memory, step, colocache_sender_add_block(sender, "pc.ram", ram[0], PAGES_0 * PAGE, PAGE, NULL), 0);
    expect(memory, step, colocache_sender_add_block(sender, "boot", ram[PAGES_0], PAGES_1 * PAGE, PAGE, NULL), 0);
    for (unsigned page = 0; page < PAGES; page++) {
        fill_page(ram[page], history->pvm_at[step->epoch][page]);
        if (step->page >> page & 1)
            expect(memory, step, colocache_sender_mark_dirty(sender, block_of(page), pfn_of(page), 1), 0);
    }
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0)
        give_up(memory, "no socket pair");
    expect(memory, step, colocache_sender_send(sender, pair[0], 1000, step->epoch, 0, 1, 0, NULL), 0);
    if (torn) { /* read it off again, and send all but its last half page */
        ssize_t n = recv(pair[1], wire, sizeof wire, MSG_DONTWAIT);
        if (n > 0 && send(pair[0], wire, (size_t)n - PAGE / 2, 0) != n - PAGE / 2)
            give_up(memory, "socket pair is too small");
        close(pair[0]);
        expect(memory, step, colocache_receive_stream(cc, pair[1], 1000, step->epoch, header, &came), COLOCACHE_E_PEER_LOST);
    } else {
        colocache_message_header(header, 1, step->epoch, 0, 0, 0);
        if (send(pair[0], header, sizeof header, 0) != sizeof header)
            give_up(memory, "socket pair is too small");
        close(pair[0]);
        expect(memory, step, colocache_receive_stream(cc, pair[1], 1000, step->epoch, header, &came), 0);
        expect(memory, step, (int)came, __builtin_popcount(step->page));
    }
    close(pair[1]);
    colocache_sender_close(sender);
}

static void put_state(const struct memory *memory, struct colocache *cc, const struct step *step)
{
    void *at;
    expect(memory, step, colocache_device_state_begin(cc, step->epoch, step->len, &at), 0);
    for (uint64_t i = 0; i < step->len; i++) {
        ((unsigned char *)at)[i] = state_byte(step->epoch, i);
        if (i == step->len / 2)
            CC_CRASH_POINT("device state: half of it");
    }
    CC_CRASH_POINT("device state: all of it");
}

static void seal(const struct memory *memory, struct colocache *cc, const struct step *step, const struct model *before)
{
    struct colocache_seal_args args = {.struct_size = sizeof args,
                                       .epoch = step->epoch,
                                       .n_pages = COLOCACHE_ANY_COUNT,
                                       .attachment_bytes = attachment_bytes(step->epoch),
                                       .attachment_checksum = ~attachment_bytes(step->epoch),
                                       .attachment_slot = attachment_slot(step->epoch)};
    struct colocache_seal_result result = {.struct_size = sizeof result};
    if (step->kind == VETO)
        args.check = veto;
    expect(memory, step, colocache_seal(cc, &args, &result), step->kind == VETO ? COLOCACHE_E_VETO : 0);
    if (step->kind == SEAL)
        expect(memory, step, (int)result.flush_pages, __builtin_popcount(before->pvm_bits | before->svm_bits));
}

/* check_bitmaps -- in the run without a death: exactly the model's bits */
static void check_bitmaps(const struct memory *memory, struct colocache *cc, const struct model *model, const struct step *step)
{
    const unsigned wanted[] = {model->pvm_bits, model->svm_bits};
    for (int kind = 0; kind < 2; kind++) {
        uint64_t words[2] = {0, 0};
        for (unsigned block = 0; block < 2; block++)
            expect(memory, step, colocache_get_bitmap(cc, block, kind, &words[block], 1), 0);
        unsigned found = (unsigned)(words[0] | words[1] << PAGES_0);
        if (found != wanted[kind])
            give_up(memory, "after %s of epoch %u the %s bitmap is %02x, must be %02x", kind_name(step->kind), step->epoch,
                    kind ? "SVM" : "PVM", found, wanted[kind]);
    }
    expect(memory, step, colocache_validate(cc, model->committed == model->sealed && step->kind == FLUSH), 0);
}

void run_step(const struct memory *memory, const struct history *history, const struct step *step, struct colocache **cc,
              const struct model *before)
{
    uint8_t content[PAGE];
    struct colocache_images images[2];
    switch (step->kind) {
    case CREATE: {
        const struct colocache_options options = memory_options(memory);
        expect(memory, step, colocache_create(memory->control, &options, cc), 0);
        if (spill)
            expect(memory, step, colocache_limit_staged(*cc, STAGED_MAX * PAGE), 0);
        break;
    }
    case ADD_BLOCK:
        memory_images(memory, images);
        expect(memory, step, colocache_add_block(*cc, &images[step->page], NULL), 0);
        break;
    case RECEIVE:
        fill_page(content, step->tag);
        expect(memory, step, colocache_receive_page(*cc, step->epoch, block_of(step->page), pfn_of(step->page), content, PAGE), 0);
        break;
    case ZERO:
        expect(memory, step, colocache_receive_zero(*cc, step->epoch, block_of(step->page), pfn_of(step->page), 1), 0);
        break;
    case STREAM:
    case TORN:
        if (step->page)
            stream_pages(memory, *cc, history, step, step->kind == TORN);
        break;
    case PREFLUSH:
        expect(memory, step, colocache_preflush(*cc, NULL), 0);
        break;
    case WRITE:
        guest_write(*cc, step->page, step->tag);
        break;
    case SYNC: {
        const uint64_t words[2] = {step->page & (ALL >> PAGES_1), step->page >> PAGES_0};
        expect(memory, step, colocache_sync_words(*cc, 0, 0, PAGES_0, &words[0]), 0);
        expect(memory, step, colocache_sync_words(*cc, 1, 0, PAGES_1, &words[1]), 0);
        break;
    }
    case GIVE_BACK:
        expect(memory, step, colocache_give_back(*cc, block_of(step->page), pfn_of(step->page), 1), 0);
        break;
    case LATE_MARK:
        expect(memory, step, colocache_mark_dirty(*cc, block_of(step->page), pfn_of(step->page), 1), 0);
        break;
    case STATE:
        put_state(memory, *cc, step);
        break;
    case SEAL:
    case VETO:
        seal(memory, *cc, step, before);
        break;
    case FLUSH:
        expect(memory, step, colocache_flush(*cc, NULL), 0);
        for (unsigned page = 0; page < PAGES; page++) {
            if (!page_is(sparse ? memory_page(memory, page) : vm_page(*cc, page), history->pvm_at[step->epoch][page]))
                give_up(memory, "after the flush of epoch %u the VM sees another page %u", step->epoch, page);
        }
        break;
    case LOADED:
        expect(memory, step, colocache_loaded(*cc, 1), 0);
        break;
    case ABORT:
        expect(memory, step, colocache_abort(*cc, step->epoch, "test"), before->receiving == step->epoch ? 0 : COLOCACHE_E_EPOCH);
        break;
    case END:
        CC_CRASH_POINT("end");
        break;
    }
}

/* run_steps -- all of them; check_bits: the run that nobody kills */
void run_steps(const struct memory *memory, const struct history *history, bool check_bits)
{
    struct colocache *cc = NULL;
    struct model model;
    struct progress *progress = memory->progress;
    model_start(&model);
    watch_points(progress);
    for (int i = 0; i < history->n_steps; i++) {
        const struct step *step = &history->steps[i];
        progress->word_stored = progress->receiving_stored = 0;
        progress->passed[i] = colocache_fault_passed;
        progress->step = i;
        run_step(memory, history, step, &cc, &model);
        model_step(&model, history, step);
        if (check_bits && model.blocks)
            check_bitmaps(memory, cc, &model, step);
    }
    progress->passed[history->n_steps] = colocache_fault_passed;
    _exit(0);
}
