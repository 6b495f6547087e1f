/* SPDX-License-Identifier: Apache-2.0 */
/*
 * crash_blocks.c -- die at every crash point of a history in which RAM blocks come and go, then attach as colocache.h says: with the blocks that
 * inspect names.  A third of the attaches is killed as well, at each of its points in turn.
 *
 *     crash_blocks mirror|bounded
 *
 * What must be found: the blocks and the epoch of before the step that was killed, or those of after it; each block of that epoch as the
 * primary had it, and one that came later all zeros; and from there the pair goes on, with the primary sending no more than what its bitmaps
 * would say.  Prints one line of JSON; exit 0 if the promise held everywhere.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "colocache.h"
#include "fault.h"

enum { PAGE = 4096, PAGES = 3, BLOCKS = 4, EPOCHS = 12, LEN = PAGES * PAGE };
enum kind { CREATE, ZERO_FILES, ADD, REMOVE, RECEIVE, SCRIBBLE, WRITE, ABORT, SEAL, FLUSH, LOADED };

/* Block 3 has the name and the files of block 0, which has gone by then. */
static const char *const names[BLOCKS] = {"pc.ram", "dimm 1", "dimm 2", "pc.ram"};
static const unsigned files_of[BLOCKS] = {0, 1, 2, 0};

struct step {
    enum kind kind;
    unsigned epoch, block, pages; /* pages: a set */
};

static const struct step steps[] = {
    {CREATE, 0, 0, 0},     {ADD, 0, 0, 0},     {RECEIVE, 1, 0, 7}, {SEAL, 1, 0, 0},     {FLUSH, 1, 0, 0},
    {LOADED, 1, 0, 0},     {RECEIVE, 2, 0, 1}, {ADD, 2, 1, 0},     {SCRIBBLE, 2, 1, 6},                     /* no log knows of it */
    {RECEIVE, 2, 1, 1},    {ABORT, 2, 0, 0},   {WRITE, 3, 0, 2},   {RECEIVE, 3, 0, 5},  {RECEIVE, 3, 1, 3}, /* page 2 of it is zeros */
    {SEAL, 3, 0, 0},       {FLUSH, 3, 0, 0},   {LOADED, 3, 0, 0},  {REMOVE, 4, 0, 0},   {WRITE, 4, 0, 1},
    {RECEIVE, 4, 0, 2},    {RECEIVE, 4, 1, 1}, {ABORT, 4, 0, 0},   {WRITE, 5, 1, 6},    {RECEIVE, 5, 0, 4}, /* was on its way */
    {RECEIVE, 5, 1, 3},    {SEAL, 5, 0, 0},    {FLUSH, 5, 0, 0},   {LOADED, 5, 0, 0},   {ADD, 6, 2, 0},
    {RECEIVE, 6, 2, 7},    {REMOVE, 6, 1, 0},  {SEAL, 6, 0, 0},    {FLUSH, 6, 0, 0},    {LOADED, 6, 0, 0},
    {ZERO_FILES, 7, 3, 0}, {ADD, 7, 3, 0},     {RECEIVE, 7, 3, 3}, {WRITE, 7, 2, 1},    {SEAL, 7, 0, 0},
    {FLUSH, 7, 0, 0},      {LOADED, 7, 0, 0},  {REMOVE, 8, 2, 0},  {RECEIVE, 8, 3, 4},
};
enum { STEPS = sizeof steps / sizeof *steps };

/* What the primary and the region are after a number of steps. */
struct state {
    uint64_t tags[BLOCKS][PAGES];
    unsigned sealed, blocks, leaving; /* sets of blocks */
    bool created;
};
static struct state after[STEPS + 1];
static uint64_t tags_at[EPOCHS][BLOCKS][PAGES]; /* of the sealed epochs */
static unsigned blocks_at[EPOCHS];

static bool bounded;
static int control, guest[3], cache[3];
static uint8_t *guest_at[3];
static struct {
    volatile int step;
    volatile uint64_t passed;
    volatile const char *where;
} * progress;

static void __attribute__((noreturn, format(printf, 1, 2))) breach(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s, killed in step %d at %s: ", bounded ? "bounded" : "mirror", progress->step,
            progress->where ? (const char *)progress->where : "no point");
    vfprintf(stderr, format, args);
    fprintf(stderr, " (%s)\n", colocache_last_error());
    exit(1);
}

#define MUST(condition) \
    do { \
        if (!(condition)) \
            breach("line %d: %s", __LINE__, #condition); \
    } while (0)

static void make_states(void)
{
    struct state now = {0};
    for (int i = 0; i < STEPS; i++) {
        const struct step *step = &steps[i];
        switch (step->kind) {
        case CREATE:
            now.created = true;
            break;
        case ADD:
            now.blocks |= 1u << step->block;
            break;
        case REMOVE:
            now.leaving |= 1u << step->block;
            break;
        case RECEIVE:
            for (unsigned page = 0; page < PAGES; page++) {
                if (step->pages >> page & 1)
                    now.tags[step->block][page] = step->epoch * 1000 + step->block * 10 + page + 1;
            }
            break;
        case SEAL:
            now.sealed = step->epoch;
            now.blocks &= ~now.leaving;
            memcpy(tags_at[step->epoch], now.tags, sizeof now.tags);
            blocks_at[step->epoch] = now.blocks;
            break;
        default:
            break;
        }
        after[i + 1] = now;
    }
}

/* ---- memory --------------------------------------------------------------------------------------------------------------- */

static void empty(unsigned files)
{
    MUST(ftruncate(guest[files], 0) == 0 && ftruncate(guest[files], LEN) == 0 && posix_fallocate(guest[files], 0, LEN) == 0);
    MUST(ftruncate(cache[files], 0) == 0 && ftruncate(cache[files], LEN) == 0);
    MUST(bounded || posix_fallocate(cache[files], 0, LEN) == 0);
}

static void make_memory(void)
{
    control = memfd_create("control", MFD_CLOEXEC);
    for (unsigned i = 0; i < 3; i++) {
        guest[i] = memfd_create("guest", MFD_CLOEXEC);
        cache[i] = memfd_create("cache", MFD_CLOEXEC);
        guest_at[i] = mmap(NULL, LEN, PROT_READ, MAP_SHARED, guest[i], 0);
        MUST(guest_at[i] != MAP_FAILED);
    }
    progress = mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

static struct colocache_images images_of(unsigned block)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = names[block],
                                     .len_bytes = LEN,
                                     .page_size = PAGE,
                                     .guest_fd = guest[files_of[block]],
                                     .cache_fd = cache[files_of[block]]};
}

static struct colocache_options options(void)
{
    return (struct colocache_options){.struct_size = sizeof(struct colocache_options),
                                      .n_threads = 1,
                                      .device_state_max_bytes = PAGE,
                                      .memory_mode = bounded ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR};
}

static void fill(void *page, uint64_t tag)
{
    for (unsigned i = 0; i < PAGE / 8; i++)
        ((uint64_t *)page)[i] = tag;
}

static bool is(const uint8_t *page, uint64_t tag)
{
    uint8_t expected[PAGE];
    fill(expected, tag);
    return memcmp(page, expected, PAGE) == 0;
}

/* ---- the child -------------------------------------------------------------------------------------------------------------- */

static void put(struct colocache *cc, unsigned block, unsigned page, uint64_t tag, bool mark)
{
    struct colocache_block_info info;
    MUST(colocache_get_block(cc, block, &info) == 0);
    fill((uint8_t *)info.guest_addr + page * PAGE, tag);
    MUST(!mark || colocache_mark_dirty(cc, block, page, 1) == 0);
}

static void send(struct colocache *cc, unsigned epoch, unsigned block, unsigned page, uint64_t tag)
{
    uint64_t content[PAGE / 8];
    fill(content, tag);
    MUST(colocache_receive_page(cc, epoch, block, page, content, PAGE) == 0);
}

static void seal(struct colocache *cc, unsigned epoch)
{
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT};
    void *state;
    MUST(colocache_device_state_begin(cc, epoch, 1, &state) == 0);
    *(uint8_t *)state = (uint8_t)epoch;
    MUST(colocache_seal(cc, &args, NULL) == 0);
}

static void run_step(const struct step *step, struct colocache **cc)
{
    const struct colocache_options given = options();
    struct colocache_images images = images_of(step->block);
    uint32_t index = 99;
    switch (step->kind) {
    case CREATE:
        MUST(colocache_create(control, &given, cc) == 0);
        break;
    case ZERO_FILES:
        empty(files_of[step->block]);
        break;
    case ADD:
        MUST(colocache_add_block(*cc, &images, &index) == 0 && index == step->block);
        break;
    case REMOVE:
        MUST(colocache_remove_block(*cc, step->block) == 0);
        break;
    case RECEIVE:
        for (unsigned page = 0; page < PAGES; page++) {
            if (step->pages >> page & 1)
                send(*cc, step->epoch, step->block, page, step->epoch * 1000 + step->block * 10 + page + 1);
        }
        break;
    case SCRIBBLE:
    case WRITE:
        for (unsigned page = 0; page < PAGES; page++) {
            if (step->pages >> page & 1)
                put(*cc, step->block, page, 500000 + step->epoch * 100 + page, step->kind == WRITE);
        }
        break;
    case ABORT:
        MUST(colocache_abort(*cc, step->epoch, "test") == 0);
        break;
    case SEAL:
        seal(*cc, step->epoch);
        break;
    case FLUSH:
        MUST(colocache_flush(*cc, NULL) == 0);
        break;
    case LOADED:
        MUST(colocache_loaded(*cc, 1) == 0);
        break;
    }
    CC_CRASH_POINT("between two steps");
}

static void see(const char *name)
{
    progress->where = name;
    progress->passed++;
}

static void run_history(void)
{
    struct colocache *cc = NULL;
    for (int i = 0; i < STEPS; i++) {
        progress->step = i;
        run_step(&steps[i], &cc);
    }
}

/* ---- attach, by what inspect says ------------------------------------------------------------------------------------------- */

/* look -- the blocks that the region has, as a set by index; false: there is no region yet */
static bool look(struct colocache_status *status, unsigned *blocks)
{
    static struct colocache_block_info infos[COLOCACHE_BLOCKS_MAX];
    uint32_t n = COLOCACHE_BLOCKS_MAX;
    *blocks = 0;
    *status = (struct colocache_status){.struct_size = sizeof *status};
    int rc = colocache_inspect(control, status, infos, &n);
    if (rc == COLOCACHE_E_NOT_COLOCACHE)
        return false;
    MUST(rc == 0 && n <= BLOCKS);
    for (uint32_t i = 0; i < n; i++) {
        MUST(!infos[i].name[0] || strcmp(infos[i].name, names[i]) == 0);
        *blocks |= (unsigned)(infos[i].name[0] != 0) << i;
    }
    return true;
}

static int attach(unsigned blocks, struct colocache_recovery *report, struct colocache **cc)
{
    struct colocache_images images[BLOCKS];
    const struct colocache_options given = options();
    uint32_t n = 0;
    for (unsigned block = 0; block < BLOCKS; block++) {
        if (blocks >> block & 1)
            images[n++] = images_of(block);
    }
    return colocache_attach(control, &given, images, n, report, cc);
}

static void attach_alone(void)
{
    struct colocache_status status;
    struct colocache_recovery report;
    struct colocache *cc;
    unsigned blocks;
    MUST(look(&status, &blocks) && attach(blocks, &report, &cc) == 0);
}

/* killed -- in a child, at its at-th crash point; false: it came to its end */
static bool killed(void (*work)(void), uint64_t at)
{
    pid_t pid = fork();
    if (pid == 0) {
        colocache_fault_passed = 0;
        colocache_fault_crash_at = at;
        colocache_fault_seen = work == run_history ? see : NULL;
        work();
        _exit(0);
    }
    int status;
    MUST(pid > 0 && waitpid(pid, &status, 0) == pid);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
        return true;
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        exit(1); /* the child has said why */
    return false;
}

/* one_epoch -- the primary sends what differs from `known`, the VM writes and says so; afterwards guest RAM is the primary's */
static void one_epoch(struct colocache *cc, unsigned epoch, unsigned blocks, unsigned leaving, uint64_t tags[BLOCKS][PAGES],
                      uint64_t known[BLOCKS][PAGES], unsigned whole, bool vm_runs)
{
    for (unsigned block = 0; block < BLOCKS; block++) {
        if (!(blocks >> block & 1))
            continue;
        tags[block][epoch % PAGES] = epoch * 1000 + 900 + block;
        if (vm_runs)
            put(cc, block, (epoch + 1) % PAGES, 77, true);
        for (unsigned page = 0; page < PAGES; page++) {
            if (whole >> block & 1 || tags[block][page] != known[block][page])
                send(cc, epoch, block, page, tags[block][page]);
            known[block][page] = tags[block][page];
        }
    }
    seal(cc, epoch);
    MUST(colocache_flush(cc, NULL) == 0);
    for (unsigned block = 0; block < BLOCKS; block++) {
        for (unsigned page = 0; page < PAGES && (blocks & ~leaving) >> block & 1; page++) {
            if (!is(guest_at[files_of[block]] + page * PAGE, tags[block][page]))
                breach("page %u of block %u after epoch %u", page, block, epoch);
        }
    }
    MUST(colocache_loaded(cc, 1) == 0 && colocache_validate(cc, 1) == 0);
}

static unsigned long long n_points, n_attach_kills;

static void check(void)
{
    const struct state *before = &after[progress->step], *then = &after[progress->step + 1];
    struct colocache_status status;
    struct colocache_recovery report;
    struct colocache *cc;
    unsigned blocks, found;
    if (!look(&status, &blocks)) {
        MUST(!before->created);
        return;
    }
    bool as_before = blocks == before->blocks && status.sealed_epoch == before->sealed;
    if (!as_before && (blocks != then->blocks || status.sealed_epoch != then->sealed))
        breach("blocks %x of epoch %llu", blocks, (unsigned long long)status.sealed_epoch);
    for (unsigned block = 0; block < BLOCKS && blocks; block++) { /* what is not as the region is, is refused */
        if (files_of[block] != block)
            continue;
        int rc = attach(blocks ^ 1u << block, &report, &cc);
        MUST(rc == COLOCACHE_E_BLOCK || (files_of[3] == block && blocks >> 3 & 1));
    }
    for (uint64_t at = 1; n_points % 3 == 0 && killed(attach_alone, at); at++)
        n_attach_kills++;
    const unsigned sealed = (unsigned)status.sealed_epoch;
    MUST(look(&status, &found) && found == blocks && status.sealed_epoch == sealed);
    MUST(attach(blocks, &report, &cc) == 0);
    const bool whole = report.action == COLOCACHE_RECOVERED_RESTART || report.action == COLOCACHE_RECOVERED_REPLAYED;
    MUST(whole == (sealed != 0 && (bounded || status.receiving_epoch == sealed)));
    uint64_t known[BLOCKS][PAGES] = {{0}}, tags[BLOCKS][PAGES];
    memcpy(tags, then->tags, sizeof tags); /* the primary has written what it was about to send */
    for (unsigned block = 0; block < BLOCKS; block++) {
        if (!(blocks >> block & 1))
            continue;
        const bool has = sealed && blocks_at[sealed] >> block & 1;
        MUST(colocache_block_sealed(cc, block) == has);
        if (has)
            memcpy(known[block], tags_at[sealed][block], sizeof known[block]);
        for (unsigned page = 0; whole && page < PAGES; page++) {
            if (!is(guest_at[files_of[block]] + page * PAGE, known[block][page]))
                breach("page %u of block %u of epoch %u after attach", page, block, sealed);
        }
    }
    if (blocks) {
        const unsigned next = (unsigned)status.receiving_epoch + 1, last = 31u - (unsigned)__builtin_clz(blocks);
        one_epoch(cc, next, blocks, 0, tags, known, sealed ? 0 : blocks, whole);
        MUST(colocache_remove_block(cc, last) == 0);
        one_epoch(cc, next + 1, blocks, 1u << last, tags, known, 0, true);
        colocache_close(cc);
        MUST(look(&status, &found) && found == (blocks & ~(1u << last)) && attach(found, &report, &cc) == 0);
        MUST(report.action == COLOCACHE_RECOVERED_RESTART && colocache_validate(cc, 1) == 0);
    }
    colocache_close(cc);
}

int main(int argc, char **argv)
{
    bounded = argc > 1 && strcmp(argv[1], "bounded") == 0;
    make_memory();
    make_states();
    for (uint64_t point = 1;; point++) {
        MUST(ftruncate(control, 0) == 0);
        for (unsigned files = 0; files < 3; files++)
            empty(files);
        memset(progress, 0, sizeof *progress);
        if (!killed(run_history, point))
            break;
        n_points++;
        check();
    }
    printf("{\"points\": %llu, \"attach_kills\": %llu}\n", n_points, n_attach_kills);
    return 0;
}
