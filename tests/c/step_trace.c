/* SPDX-License-Identifier: Apache-2.0 */
/* step_trace.c -- ptrace: a child's instructions one by one, and what each did to shared memory. */
#define _GNU_SOURCE
#include "step.h"

#include <elf.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

void step_begin(void)
{
    raise(SIGUSR1);
}

void step_end(void)
{
    raise(SIGUSR2);
}

static void must(bool ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(2);
    }
}

static uint64_t next_pc(pid_t child)
{
    struct user_regs_struct registers;
    struct iovec iov = {.iov_base = &registers, .iov_len = sizeof registers};
    if (ptrace(PTRACE_GETREGSET, child, (void *)NT_PRSTATUS, &iov) != 0)
        return 0;
#if defined(__x86_64__)
    return registers.rip;
#else
    return registers.pc;
#endif
}

/* ---- comparing ----------------------------------------------------------------------------------------------------------------- */

static void *room_for(void *array, size_t n, size_t *room, size_t size)
{
    if (n <= *room)
        return array;
    *room = n * 2;
    array = realloc(array, *room * size);
    must(array != NULL, "realloc");
    return array;
}

/* compare -- one area with what it was; a difference is recorded, from its first byte to its last */
static void compare(struct recording *out, enum area area, uint8_t *was, const uint8_t *is, size_t n_bytes, size_t offset, pid_t child)
{
    if (memcmp(was, is, n_bytes) == 0)
        return;
    size_t first = 0, end = n_bytes;
    while (was[first] == is[first])
        first++;
    while (was[end - 1] == is[end - 1])
        end--;
    size_t n = end - first;
    out->bytes = room_for(out->bytes, out->n_bytes + n, &out->bytes_room, 1);
    memcpy(out->bytes + out->n_bytes, is + first, n);
    memcpy(was + first, is + first, n);
    out->changes = room_for(out->changes, out->n_changes + 1, &out->changes_room, sizeof *out->changes);
    out->changes[out->n_changes++] = (struct change){area, (uint32_t)(offset + first), (uint32_t)n, out->n_bytes, next_pc(child)};
    out->n_bytes += n;
}

static void compare_all(struct recording *out, const struct memory *memory, struct picture *was, pid_t child)
{
    static const size_t bytes[] = {PAGES_0 * PAGE, PAGES_1 * PAGE};
    compare(out, CONTROL, was->control, memory->control_at, was->control_bytes, 0, child);
    for (unsigned block = 0; block < 2; block++) {
        size_t offset = block * bytes[0];
        compare(out, GUEST, was->guest + offset, memory->guest_at[block], bytes[block], offset, child);
        compare(out, CACHE, was->cache + offset, memory->cache_at[block], bytes[block], offset, child);
    }
}

void step_apply(const struct recording *recording, const struct change *change, struct picture *picture)
{
    uint8_t *area = change->area == CONTROL ? picture->control : change->area == GUEST ? picture->guest : picture->cache;
    memcpy(area + change->offset, recording->bytes + change->bytes_at, change->n_bytes);
}

void step_free(struct recording *recording)
{
    for (unsigned i = 0; i < recording->n_stretches; i++)
        picture_free(recording->stretches[i].before);
    free(recording->changes);
    free(recording->bytes);
    memset(recording, 0, sizeof *recording);
}

/* ---- stepping ------------------------------------------------------------------------------------------------------------------- */

/* step_stretch -- from one SIGUSR1 to the SIGUSR2 after it; the status that ended it */
static int step_stretch(const struct memory *memory, pid_t child, struct recording *out)
{
    must(out->n_stretches < STRETCHES_MAX, "too many stretches");
    struct stretch *stretch = &out->stretches[out->n_stretches++];
    struct picture *was = memory_picture(memory);
    picture_move(was, memory, false);
    stretch->before = memory_picture(memory);
    picture_move(stretch->before, memory, false);
    stretch->first_change = out->n_changes;
    int status;
    for (;;) {
        must(ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) == 0 && waitpid(child, &status, 0) == child, "a single step");
        if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP)
            break;
        out->n_instructions++;
        compare_all(out, memory, was, child);
    }
    stretch->n_changes = out->n_changes - stretch->first_change;
    picture_free(was);
    return status;
}

int step_child(const struct memory *memory, void (*work)(void *context), void *context, struct recording *out)
{
    int status;
    memset(out, 0, sizeof *out);
    pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(77);
        work(context);
        _exit(0);
    }
    must(child > 0 && waitpid(child, &status, 0) == child, "fork");
    while (WIFSTOPPED(status)) {
        if (WSTOPSIG(status) == SIGUSR1)
            status = step_stretch(memory, child, out);
        if (!WIFSTOPPED(status))
            break;
        int pass_on = WSTOPSIG(status) == SIGUSR1 || WSTOPSIG(status) == SIGUSR2 || WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
        must(ptrace(PTRACE_CONT, child, NULL, (void *)(intptr_t)pass_on) == 0 && waitpid(child, &status, 0) == child, "going on");
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        return -2;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -1;
}
