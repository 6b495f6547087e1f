/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash_threads.c -- one secondary, killed again and again in flushes that several threads share; each time the next process attaches
 * and every page is compared.
 *
 *     crash_threads [KILLS] [SEED] [bounded]
 *
 * An epoch writes random runs on both sides; the child attaches, receives, seals and is killed at the n-th page (or half page) of the flush,
 * n going up from 1 in steps as far as there are any.  Which thread had got how far is up to the scheduler; the result must not be.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "colocache.h"
#include "fault.h"

enum { PAGE = 4096, N = 4800, THREADS = 3, STEP = 7 };

static int control_fd, guest_fd, cache_fd;
static uint64_t *guest;   /* the parent's mapping of guest RAM */
static uint64_t truth[N]; /* what each page must hold: one number, repeated */
static uint64_t seed = 1;
static volatile int *stored; /* shared: the commit word was stored, how often since the seal began */

static void must(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "seed %llu: %s: %s\n", (unsigned long long)seed, what, colocache_last_error());
        exit(1);
    }
}

static uint64_t next_random(uint64_t *state)
{
    uint64_t x = (*state += 0x9E3779B97F4A7C15ull);
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

static void fill(uint64_t *page, uint64_t value)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        page[i] = value;
}

static int holds(const uint64_t *page, uint64_t value)
{
    for (unsigned i = 0; i < PAGE / 8; i++) {
        if (page[i] != value)
            return 0;
    }
    return 1;
}

static struct colocache_options options = {.struct_size = sizeof options, .n_threads = THREADS, .device_state_max_bytes = PAGE};

static struct colocache_images images(void)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = "ram",
                                     .len_bytes = (uint64_t)N * PAGE,
                                     .page_size = PAGE,
                                     .guest_fd = guest_fd,
                                     .cache_fd = cache_fd};
}

static struct colocache *attach(struct colocache_recovery *report)
{
    struct colocache *cc = NULL;
    struct colocache_images both = images();
    must(colocache_attach(control_fd, &options, &both, 1, report, &cc) == 0, "attach");
    return cc;
}

static void see(const char *name)
{
    if (strcmp(name, "commit: after the word") == 0)
        __atomic_add_fetch(stored, 1, __ATOMIC_SEQ_CST);
}

static void seal(struct colocache *cc, uint64_t epoch)
{
    void *state;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT};
    must(colocache_device_state_begin(cc, epoch, 8, &state) == 0, "device_state_begin");
    memcpy(state, &epoch, 8);
    must(colocache_seal(cc, &args, NULL) == 0, "seal");
}

static void flush(struct colocache *cc)
{
    struct colocache_flush_result result = {.struct_size = sizeof result};
    must(colocache_flush(cc, &result) == 0, "flush");
    must(result.n_threads == THREADS || result.n_pages == 0, "the flush is too small for several threads");
}

/* epoch_pages -- the PVM's pages of an epoch: told by the seed, so that child and parent know the same */
static void write_pvm(uint64_t epoch, struct colocache *cc)
{
    uint64_t state = seed * 1000003 + epoch, page[PAGE / 8];
    for (int run = 0; run < 200; run++) { /* enough for all threads: flush() looks */
        uint64_t first = next_random(&state) % N, n = 1 + next_random(&state) % 11, value = next_random(&state);
        if (run % 16 == 15) /* bounded memory: holes of the cache, among pages that were staged */
            value = 0;
        for (uint64_t pfn = first; pfn < N && pfn < first + n; pfn++) {
            if (cc && value == 0) {
                must(colocache_receive_zero(cc, epoch, 0, pfn, 1) == 0, "receive_zero");
            } else if (cc) {
                fill(page, value);
                must(colocache_receive_page(cc, epoch, 0, pfn, page, PAGE) == 0, "receive");
            } else {
                truth[pfn] = value;
            }
        }
    }
}

static void child(uint64_t epoch, uint64_t crash_at)
{
    uint64_t state = seed * 77 + epoch;
    struct colocache *cc = attach(NULL);
    struct colocache_block_info ram;
    must(colocache_get_block(cc, 0, &ram) == 0, "get_block");
    uint64_t *vm = ram.guest_addr; /* guest RAM as the VM has it: a private mapping, in bounded memory */
    for (int i = 0; i < 80; i++) { /* the SVM runs */
        uint64_t pfn = next_random(&state) % N;
        fill(vm + pfn * PAGE / 8, next_random(&state));
        must(colocache_mark_dirty(cc, 0, pfn, 1) == 0, "mark_dirty");
    }
    write_pvm(epoch, cc);
    seal(cc, epoch);
    *stored = 0;
    colocache_fault_seen = see;
    colocache_fault_passed = 0;
    colocache_fault_crash_at = crash_at;
    flush(cc);
    _exit(0);
}

int main(int argc, char **argv)
{
    uint64_t kills = argc > 1 ? strtoull(argv[1], NULL, 10) : 300, done = 0, whole = 0, replays = 0, epoch = 1, pages = 0;
    seed = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    options.memory_mode = argc > 3 && strcmp(argv[3], "bounded") == 0 ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR;
    const uint64_t bytes = (uint64_t)N * PAGE;
    mallopt(M_MMAP_THRESHOLD, 128 << 10); /* fixed: else the second handle's table is cleared by hand and copied at each fork */
    int *const fds[] = {&control_fd, &guest_fd, &cache_fd};
    for (int i = 0; i < 3; i++) {
        *fds[i] = memfd_create("colocache test", MFD_CLOEXEC);
        must(*fds[i] >= 0 && (i == 0 || ftruncate(*fds[i], (off_t)bytes) == 0), "memfd_create");
    }
    guest = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, guest_fd, 0);
    stored = mmap(NULL, sizeof *stored, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(guest != MAP_FAILED && stored != MAP_FAILED, "mmap");

    struct colocache *cc;
    struct colocache_images both = images();
    must(colocache_create(control_fd, &options, &cc) == 0 && colocache_add_block(cc, &both, NULL) == 0, "create");
    must(colocache_receive_zero(cc, epoch, 0, 0, N) == 0, "receive_zero");
    seal(cc, epoch);
    flush(cc);
    must(colocache_loaded(cc, 1) == 0, "loaded");
    colocache_close(cc);

    for (uint64_t at = 1; done < kills || !whole; at += STEP) {
        epoch++;
        pid_t pid = fork();
        if (pid == 0)
            child(epoch, at);
        int status;
        must(pid > 0 && waitpid(pid, &status, 0) == pid, "waitpid");
        int killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
        must(killed || (WIFEXITED(status) && WEXITSTATUS(status) == 0), "the child failed");
        write_pvm(epoch, NULL);
        struct colocache_recovery report;
        cc = attach(&report);
        must(report.action == (*stored ? COLOCACHE_RECOVERED_RESTART : COLOCACHE_RECOVERED_REPLAYED) && report.epoch == epoch,
             "what attach says");
        for (uint64_t pfn = 0; pfn < N; pfn++) {
            if (!holds(guest + pfn * PAGE / 8, truth[pfn])) {
                fprintf(stderr, "seed %llu: killed at point %llu of the flush of epoch %llu: page %llu is not the epoch's\n",
                        (unsigned long long)seed, (unsigned long long)at, (unsigned long long)epoch, (unsigned long long)pfn);
                return 1;
            }
        }
        must(colocache_validate(cc, 1) == 0, "validate");
        colocache_close(cc);
        pages += N;
        done += (uint64_t)killed;
        replays += report.action == COLOCACHE_RECOVERED_REPLAYED;
        if (!killed) { /* all points of a flush have had their turn: from one beside the first again */
            whole++;
            at = whole % STEP + 1 - STEP;
        }
    }
    printf("{\"seed\": %llu, \"kills\": %llu, \"replays\": %llu, \"pages_checked\": %llu}\n", (unsigned long long)seed,
           (unsigned long long)done, (unsigned long long)replays, (unsigned long long)pages);
    return 0;
}
