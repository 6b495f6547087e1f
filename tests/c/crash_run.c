/* SPDX-License-Identifier: Apache-2.0 */
/* crash_run.c -- memory that outlives its processes, and the child that runs a history's steps with the library. */
#define _GNU_SOURCE
#include "crash_world.h"

#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fault.h"

#define CONTROL_ROOM (1u << 20)

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static void must(bool ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(2);
    }
}

static uint64_t block_bytes(unsigned block)
{
    return (block ? PAGES_1 : PAGES_0) * (uint64_t)PAGE;
}

static int image(const char *name, uint64_t bytes, bool reserve, uint8_t **at)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd_create");
    must(!reserve || posix_fallocate(fd, 0, (off_t)bytes) == 0, "posix_fallocate");
    void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(map != MAP_FAILED, "mmap");
    *at = map;
    return fd;
}

void memory_make(struct memory *memory)
{
    mallopt(M_MMAP_THRESHOLD, 128 << 10); /* fixed: else the second handle's table is cleared by hand and copied at each fork */
    for (unsigned block = 0; block < 2; block++) {
        memory->guest[block] = image("guest", block_bytes(block), !sparse, &memory->guest_at[block]);
        memory->cache[block] = image("cache", block_bytes(block), !bounded && !sparse, &memory->cache_at[block]);
    }
    memory->control = memfd_create("control", MFD_CLOEXEC);
    memory->spill = memfd_create("spill", MFD_CLOEXEC); /* a disk would do the same, and slower */
    must(memory->control >= 0 && memory->spill >= 0, "memfd_create");
    memory->control_bytes = CONTROL_ROOM;
    void *map = mmap(NULL, CONTROL_ROOM, PROT_READ | PROT_WRITE, MAP_SHARED, memory->control, 0); /* past its end for now */
    must(map != MAP_FAILED, "mmap");
    memory->control_at = map;
    map = mmap(NULL, sizeof *memory->progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(map != MAP_FAILED, "mmap");
    memory->progress = map;
}

static void empty(int fd, uint64_t bytes)
{
    must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes) == 0, "fallocate");
}

void memory_reset(struct memory *memory)
{
    for (unsigned block = 0; block < 2; block++) {
        if (sparse)
            empty(memory->guest[block], block_bytes(block));
        else
            memset(memory->guest_at[block], 0, block_bytes(block));
        if (bounded || sparse)
            empty(memory->cache[block], block_bytes(block));
        else
            memset(memory->cache_at[block], 0, block_bytes(block));
    }
    must(ftruncate(memory->control, 0) == 0 && ftruncate(memory->spill, 0) == 0, "ftruncate");
    memset(memory->progress, 0, sizeof *memory->progress);
}

uint8_t *memory_page(const struct memory *memory, unsigned page)
{
    static uint8_t looked_at[PAGES][PAGE];
    if (sparse) {
        const off_t at = (page < PAGES_0 ? page : page - PAGES_0) * (off_t)PAGE;
        must(pread(memory->guest[page >= PAGES_0], looked_at[page], PAGE, at) == PAGE, "pread");
        return looked_at[page];
    }
    return page < PAGES_0 ? memory->guest_at[0] + page * PAGE : memory->guest_at[1] + (page - PAGES_0) * PAGE;
}

uint8_t *vm_page(struct colocache *cc, unsigned page)
{
    struct colocache_block_info info;
    must(colocache_get_block(cc, page >= PAGES_0, &info) == 0, "get_block");
    return (uint8_t *)info.guest_addr + (page < PAGES_0 ? page : page - PAGES_0) * PAGE;
}

bool cache_is_empty(const struct memory *memory)
{
    struct stat st[2];
    must(fstat(memory->cache[0], &st[0]) == 0 && fstat(memory->cache[1], &st[1]) == 0, "fstat");
    return st[0].st_blocks == 0 && st[1].st_blocks == 0 && lseek(memory->spill, 0, SEEK_END) == 0;
}

void memory_images(const struct memory *memory, struct colocache_images images[2])
{
    static const char *const names[] = {"pc.ram", "boot"};
    for (unsigned block = 0; block < 2; block++)
        images[block] = (struct colocache_images){.struct_size = sizeof images[0],
                                                  .name = names[block],
                                                  .len_bytes = block_bytes(block),
                                                  .page_size = PAGE,
                                                  .sparse = sparse,
                                                  .guest_fd = memory->guest[block],
                                                  .cache_fd = memory->cache[block]};
}

/* ---- a copy of all memory, to repeat an attach on the same state ---------------------------------------------------------- */

struct picture *memory_picture(const struct memory *memory)
{
    struct picture *picture = calloc(1, sizeof *picture);
    must(picture && (picture->control = calloc(1, memory->control_bytes)), "no memory for a picture");
    return picture;
}

void picture_free(struct picture *picture)
{
    free(picture->control);
    free(picture);
}

static void move(void *picture, void *live, uint64_t bytes, bool back)
{
    memcpy(back ? live : picture, back ? picture : live, bytes);
}

/* move_sparse -- an image with holes by its descriptors: reading one through a mapping would fill it */
static void move_sparse(uint8_t *bytes, bool there[PAGES], const int fds[2], bool back)
{
    for (unsigned page = 0; page < PAGES; page++, bytes += PAGE) {
        const int fd = fds[page >= PAGES_0];
        const off_t at = (page < PAGES_0 ? page : page - PAGES_0) * (off_t)PAGE;
        if (!back)
            there[page] = lseek(fd, at, SEEK_DATA) == at;
        must(!back || fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, PAGE) == 0, "fallocate");
        must(!there[page] || (back ? pwrite(fd, bytes, PAGE, at) : pread(fd, bytes, PAGE, at)) == PAGE, "a page that is there");
    }
}

void picture_move(struct picture *picture, const struct memory *memory, bool back)
{
    if (back)
        must(ftruncate(memory->control, (off_t)picture->control_bytes) == 0, "ftruncate");
    else
        picture->control_bytes = (uint64_t)lseek(memory->control, 0, SEEK_END);
    move(picture->control, memory->control_at, picture->control_bytes, back);
    if (sparse) {
        move_sparse(picture->guest, picture->there, memory->guest, back);
    } else {
        move(picture->guest, memory->guest_at[0], PAGES_0 * PAGE, back);
        move(picture->guest + PAGES_0 * PAGE, memory->guest_at[1], PAGES_1 * PAGE, back);
    }
    if (bounded || sparse) {
        move_sparse(picture->cache, picture->staged, memory->cache, back);
    } else {
        move(picture->cache, memory->cache_at[0], PAGES_0 * PAGE, back);
        move(picture->cache + PAGES_0 * PAGE, memory->cache_at[1], PAGES_1 * PAGE, back);
    }
    if (!back)
        picture->spill_bytes = (uint64_t)lseek(memory->spill, 0, SEEK_END);
    must(picture->spill_bytes <= sizeof picture->spill, "the spill file is too long");
    const ssize_t n = (ssize_t)picture->spill_bytes;
    must(!back || ftruncate(memory->spill, n) == 0, "ftruncate");
    must((back ? pwrite(memory->spill, picture->spill, picture->spill_bytes, 0)
               : pread(memory->spill, picture->spill, picture->spill_bytes, 0)) == n,
         "the spill file");
    move(&picture->progress, memory->progress, sizeof picture->progress, back);
}

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

struct colocache_options memory_options(const struct memory *memory)
{
    return (struct colocache_options){.struct_size = sizeof(struct colocache_options),
                                      .n_threads = 1,
                                      .device_state_max_bytes = STATE_MAX,
                                      .memory_mode = bounded ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR,
                                      .spill_fd = spill ? memory->spill : 0};
}

int memory_attach(const struct memory *memory, struct colocache_recovery *report, struct colocache **out)
{
    struct colocache_images images[2];
    const struct colocache_options options = memory_options(memory);
    memory_images(memory, images);
    int rc = colocache_attach(memory->control, &options, images, 2, report, out);
    return rc == 0 && spill ? colocache_limit_staged(*out, STAGED_MAX * PAGE) : rc;
}

/* ---- the child ---------------------------------------------------------------------------------------------------- */

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
