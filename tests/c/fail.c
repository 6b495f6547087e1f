/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fail.c -- every call that the library makes, made to fail once at each index with each plausible error.
 *
 * A history of epochs on a dense and a sparse block, three dirty logs, a stream and three attaches runs once to count its calls; then it
 * runs for each (call, index, error) twice: the failing step is tried again and the history goes on to its end; or the process
 * counts as dead there and a fresh attach must find the promise kept.  Each time: no crash, an error with code and sentence, no
 * descriptor, mapping, thread or (under LeakSanitizer) byte left.  Prints one line of JSON.
 *
 *     fail mirror|bounded|spill [FUNCTION]     all functions, or one
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fail_calls.h"
#include "fail_world.h"

int __lsan_do_recoverable_leak_check(void) __attribute__((weak));

static bool give_up, spills;
bool bounded;

void breach(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "memory mode %s, %s number %lu fails with %s, then %s: ",
            spills    ? "spill"
            : bounded ? "bounded"
                      : "mirror",
            call_names[failure.call], failure.index, error_name(failure.error), give_up ? "the process is gone" : "it goes on");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static unsigned entries(const char *directory)
{
    unsigned n = 0;
    DIR *dir = opendir(directory);
    while (dir && readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static unsigned test_mappings(void)
{
    char line[512];
    unsigned n = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps))
        n += strstr(line, "memfd:") != NULL;
    fclose(maps);
    return n;
}

/* run -- the history once, with `failure` as it is set */
static void run(bool uffd)
{
    static struct world world;
    world = (struct world){.give_up = give_up, .bounded = bounded, .spills = spills, .uffd = uffd};
    memset(call_counts, 0, sizeof call_counts);
    call_moves = 0;
    failure_happened = false;
    unsigned fds = entries("/proc/self/fd"), threads = entries("/proc/self/task");
    world_open(&world);
    if (world_history(&world) != 0)
        world_recover(&world);
    world_close(&world);
    bool absorbed = failure.index && is_absorbed(failure.call, failure.error);
    if (failure.index && !failure_happened)
        breach("it was never called that often");
    if (failure.index && absorbed != (world.n_failures == 0))
        breach(absorbed ? "an error came out (%u)" : "no error came out (%u)", world.n_failures);
    if (entries("/proc/self/fd") != fds)
        breach("%d descriptors are left open", (int)entries("/proc/self/fd") - (int)fds);
    if (test_mappings())
        breach("%u mappings are left", test_mappings());
    if (entries("/proc/self/task") != threads)
        breach("%u threads are left", entries("/proc/self/task") - threads);
    if (__lsan_do_recoverable_leak_check && __lsan_do_recoverable_leak_check())
        breach("memory is left");
}

/* fail_each -- every call of a history of this memory mode; how often each was called is added to `counts` */
static unsigned long long fail_each(bool uffd, const char *only, unsigned long long counts[N_CALLS])
{
    unsigned long long runs = 0;
    unsigned long mine[N_CALLS];
    failure = (struct failure){0};
    give_up = false;
    run(uffd);
    memcpy(mine, call_counts, sizeof mine);
    for (unsigned call = 0; call < N_CALLS; call++) {
        counts[call] += mine[call];
        if (only && strcmp(only, call_names[call]) != 0)
            continue;
        for (unsigned long index = 1; index <= mine[call]; index++) {
            for (const int *error = errors_of((enum call)call); *error; error++) {
                for (int way = 0; way < 2; way++) {
                    failure = (struct failure){(enum call)call, index, *error};
                    give_up = way;
                    run(uffd);
                    runs++;
                }
            }
        }
    }
    return runs;
}

/* fail mirror|bounded|spill [CALL] -- every call, or one, of the histories of this memory mode */
int main(int argc, char **argv)
{
    unsigned long long counts[N_CALLS] = {0};
    struct colocache_source *probe = NULL;
    static uint8_t page[4096] __attribute__((aligned(4096)));
    struct colocache_uffd_range range = {.n_pages = 1, .addr = page};
    spills = argc > 1 && strcmp(argv[1], "spill") == 0;
    bounded = argc > 1 && (spills || strcmp(argv[1], "bounded") == 0);
    if (argc < 2 || (!bounded && strcmp(argv[1], "mirror") != 0)) {
        fprintf(stderr, "usage: fail mirror|bounded|spill [CALL]\n");
        return 2;
    }
    bool uffd = colocache_source_uffd(&range, 1, &probe) == 0;
    colocache_source_close(probe);
    const unsigned long long runs = fail_each(uffd, argc > 2 ? argv[2] : NULL, counts);
    printf("{\"failures\": %llu, \"uffd\": %s, \"calls\": {", runs, uffd ? "true" : "false");
    for (unsigned call = 0; call < (spills ? N_CALLS : SYNC_FILE_RANGE); call++) /* without a spill file nobody calls the last */
        printf("%s\"%s\": %llu", call ? ", " : "", call_names[call], counts[call]);
    printf("}}\n");
    return 0;
}
