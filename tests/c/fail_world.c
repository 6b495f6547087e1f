/* SPDX-License-Identifier: Apache-2.0 */
/* fail_world.c -- the steps, and what must hold when one of them fails. */
#define _GNU_SOURCE
#include "fail_world.h"
#include "forget.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fail_calls.h"

static const uint64_t n_pages[2] = {DENSE, SPARSE};

/* inside -- a call of the library, with its system calls counted */
#define INSIDE(expression) (counting = true, inside = (expression), counting = false, inside)
static int inside;

/* failed -- a step returned an error: it must be the injected one's doing, with a code and a sentence */
static void failed(struct world *world, const char *step, int rc)
{
    if (!failure_happened || world->n_failures)
        breach("%s failed by itself with %d: %s", step, rc, colocache_last_error());
    if (strcmp(colocache_strerror(rc), "unknown error code") == 0 || strlen(colocache_last_error()) < 15)
        breach("%s failed with %d, which has no sentence: '%s'", step, rc, colocache_last_error());
    world->n_failures++;
    world->last_error = rc;
}

/* A step after whose failure the object is as before: the same call again must do. */
#define STEP(name, expression) \
    do { \
        if (INSIDE(expression) < 0) { \
            failed(world, name, inside); \
            if (world->give_up) \
                return -1; \
            if (INSIDE(expression) < 0) \
                breach("%s, tried again, gave %d: %s", name, inside, colocache_last_error()); \
        } \
    } while (0)

static void must(bool ok, const char *what)
{
    if (!ok)
        breach("%s: %s, %s", what, strerror(errno), colocache_last_error());
}

/* ---- memory -------------------------------------------------------------------------------------------------- */

static int image(uint64_t bytes, bool reserve)
{
    int fd = memfd_create("colocache test", MFD_CLOEXEC);
    must(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd_create");
    must(!reserve || fallocate(fd, 0, 0, (off_t)bytes) == 0, "fallocate");
    return fd;
}

void world_open(struct world *world)
{
    for (int block = 0; block < 2; block++) {
        uint64_t bytes = n_pages[block] * PAGE;
        world->guest[block] = image(bytes, block == 0);
        world->cache[block] = image(bytes, block == 0 && !world->bounded);
        world->ram[block] = aligned_alloc(PAGE, bytes);
        world->sealed_ram[block] = aligned_alloc(PAGE, bytes);
        must(world->ram[block] && world->sealed_ram[block], "malloc");
        memset(world->ram[block], 0, bytes);
    }
    for (int i = 0; i < 2; i++)
        world->late[i] = image(PAGE, i == 0 || !world->bounded);
    world->given = mmap(NULL, DENSE * PAGE, PROT_READ | PROT_WRITE, world->bounded ? MAP_PRIVATE : MAP_SHARED, world->guest[0], 0);
    must(world->given != MAP_FAILED, "mmap");
    world->control = image(0, false);
    world->spill = image(0, false);
    world->vm = eventfd(0, EFD_CLOEXEC);
    memset(kvm_ring, 0, 256 * sizeof kvm_ring[0]);
    kvm_log_words = 0;
}

static void drop_handles(struct world *world)
{
    attaching = false;
    for (int i = 0; i < SOURCES; i++) {
        (void)INSIDE(colocache_source_close(world->sources[i]));
        world->sources[i] = NULL;
    }
    (void)INSIDE(colocache_close(world->cc));
    world->cc = NULL;
}

void world_close(struct world *world)
{
    drop_handles(world);
    colocache_sender_close(world->sender);
    for (int block = 0; block < 2; block++) {
        close(world->guest[block]);
        close(world->cache[block]);
        free(world->ram[block]);
        free(world->sealed_ram[block]);
    }
    for (int i = 0; i < 2; i++)
        close(world->late[i]);
    munmap(world->given, DENSE * PAGE);
    close(world->control);
    close(world->spill);
    close(world->vm);
}

static void images_of(const struct world *world, struct colocache_images images[2])
{
    static const char *const names[] = {"dense", "sparse"};
    for (int block = 0; block < 2; block++)
        images[block] = (struct colocache_images){.struct_size = sizeof images[0],
                                                  .name = names[block],
                                                  .len_bytes = n_pages[block] * PAGE,
                                                  .page_size = PAGE,
                                                  .sparse = block == 1,
                                                  .guest_fd = world->guest[block],
                                                  .cache_fd = world->cache[block]};
    images[0].guest_addr = world->given;
}

/* A block that comes and goes: all zeros, the PVM never writes it. */
static struct colocache_images late_images(const struct world *world)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = "late",
                                     .len_bytes = PAGE,
                                     .page_size = PAGE,
                                     .guest_fd = world->late[0],
                                     .cache_fd = world->late[1]};
}

/* has_late -- is it one of the region's?  A process may have died while it came or went. */
static bool has_late(const struct world *world)
{
    struct colocache_status status = {.struct_size = sizeof status};
    static struct colocache_block_info blocks[COLOCACHE_BLOCKS_MAX];
    uint32_t n = COLOCACHE_BLOCKS_MAX;
    must(colocache_inspect(world->control, &status, blocks, &n) == 0, "inspect");
    return n > 2 && strcmp(blocks[2].name, "late") == 0;
}

static struct colocache_options with_threads(const struct world *world, uint32_t n_threads)
{
    return (struct colocache_options){.struct_size = sizeof(struct colocache_options),
                                      .n_threads = n_threads,
                                      .device_state_max_bytes = STATE_MAX,
                                      .memory_mode = world->bounded ? COLOCACHE_MEMORY_BOUNDED : COLOCACHE_MEMORY_MIRROR,
                                      .spill_fd = world->spills ? world->spill : 0};
}

static void find_guest(struct world *world)
{
    for (uint32_t block = 0; block < 2; block++) {
        struct colocache_block_info info;
        must(colocache_get_block(world->cc, block, &info) == 0, "get_block");
        world->svm[block] = info.guest_addr;
    }
}

/* open_logs -- block 0: the kernel's log; block 1: pages 0 to 3 KVM's log, pages 4 to 7 KVM's ring */
static int open_logs(struct world *world)
{
    struct colocache_uffd_range range = {.block = 0, .n_pages = DENSE, .addr = world->svm[0]};
    struct colocache_kvm_slot slots[2] = {{.slot = 1, .block = 1, .first_pfn = 0, .n_pages = 4},
                                          {.slot = 2, .block = 1, .first_pfn = 4, .n_pages = 4}};
    struct colocache_kvm_ring ring = {.vcpu_fd = -1, .addr = kvm_ring};
    if (world->bounded)
        return 0; /* nobody asks what the VM wrote */
    world->ring_next = 0;
    memset(kvm_ring, 0, 256 * sizeof kvm_ring[0]);
    if (world->uffd)
        STEP("source_uffd", colocache_source_uffd(&range, 1, &world->sources[0]));
    STEP("source_kvm", colocache_source_kvm(world->vm, &slots[0], 1, 1, &world->sources[1]));
    STEP("source_kvm_ring", colocache_source_kvm_ring(world->vm, &slots[1], 1, &ring, 1, 4096, &world->sources[2]));
    return 0;
}

/* keep_limit -- most of what is staged goes into the spill file */
static void keep_limit(struct world *world)
{
    must(!world->spills || colocache_limit_staged(world->cc, PAGE) == 0, "limit_staged");
}

static int start(struct world *world)
{
    struct colocache_images images[2];
    const struct colocache_options two_threads = with_threads(world, 2);
    images_of(world, images);
    STEP("create", colocache_create(world->control, &two_threads, &world->cc));
    keep_limit(world);
    for (world->n_blocks = 0; world->n_blocks < 2; world->n_blocks++)
        STEP("add_block", colocache_add_block(world->cc, &images[world->n_blocks], NULL));
    find_guest(world);
    if (open_logs(world) != 0)
        return -1;
    STEP("sender_create", colocache_sender_create(&world->sender));
    for (int block = 0; block < 2; block++)
        STEP("sender_add_block",
             colocache_sender_add_block(world->sender, images[block].name, world->ram[block], images[block].len_bytes, PAGE, NULL));
    must(colocache_sender_mark_all(world->sender) == 0, "mark_all");
    return 0;
}

/* ---- an epoch -------------------------------------------------------------------------------------------------- */

static void pvm_writes(struct world *world)
{
    for (uint32_t block = 0; block < 2; block++) {
        for (uint64_t pfn = 0; pfn < n_pages[block]; pfn++) {
            if ((world->epoch * 7 + pfn * 3 + block) % 4 == 0) {
                memset(world->ram[block] + pfn * PAGE, (int)(world->epoch * 16 + pfn), PAGE);
                must(colocache_sender_mark_dirty(world->sender, block, pfn, 1) == 0, "sender_mark_dirty");
            }
        }
    }
}

static void svm_writes(struct world *world)
{
    for (uint32_t block = 0; block < 2; block++) {
        for (uint64_t pfn = 0; pfn < n_pages[block]; pfn++) {
            if ((world->epoch * 5 + pfn + block) % 3 != 0)
                continue;
            memset(world->svm[block] + pfn * PAGE, 0xE0 + (int)pfn, PAGE);
            if (block == 1 && pfn < 4)
                kvm_log_words |= 1ull << pfn;
            else if (block == 1)
                kvm_ring[world->ring_next++ % 256] = (struct kvm_ring_entry){.flags = 1, .slot = 2, .page = pfn - 4};
            else if (!world->uffd)
                must(colocache_mark_dirty(world->cc, 0, pfn, 1) == 0, "mark_dirty");
        }
    }
}

/* stream -- what is pending, over a socket pair, then a message; the first error of either side */
static int stream(struct world *world)
{
    int pair[2];
    uint8_t header[COLOCACHE_HEADER_BYTES];
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
    int rc = INSIDE(colocache_sender_send(world->sender, pair[0], 50, world->epoch, 0, 1, 0, NULL));
    if (rc == 0) {
        colocache_message_header(header, 1, world->epoch, 0, 0, 0);
        must(send(pair[0], header, sizeof header, 0) == sizeof header, "send");
        rc = INSIDE(colocache_receive_stream(world->cc, pair[1], 50, world->epoch, header, NULL));
    }
    close(pair[0]);
    close(pair[1]);
    return rc;
}

static int sync_logs(struct world *world)
{
    for (int i = 0; i < SOURCES; i++) {
        if (!world->sources[i] || INSIDE(colocache_sync_dirty_log(world->cc, world->sources[i])) == 0)
            continue;
        if (inside != COLOCACHE_E_LOG_LOST)
            breach("sync_dirty_log gave %d instead of LOG_LOST: %s", inside, colocache_last_error());
        failed(world, "sync_dirty_log", inside);
        if (world->give_up)
            return -1;
        must(colocache_dirty_log_lost(world->cc) == 0, "dirty_log_lost");
    }
    return 0;
}

static unsigned char state_byte(uint64_t epoch, uint64_t i)
{
    return (unsigned char)(epoch * 31 + i * 7);
}

/* seal_epoch -- all that comes before the commit point; 1: sealed, 0: this epoch was aborted, -1: gave up */
static int seal_epoch(struct world *world, bool svm_runs)
{
    world->epoch++;
    pvm_writes(world);
    if (svm_runs)
        svm_writes(world);
    if (stream(world) != 0) {
        failed(world, "the stream", inside);
        if (world->give_up)
            return -1;
        int rc = INSIDE(colocache_abort(world->cc, world->epoch, "the stream broke"));
        must(rc == 0 || rc == COLOCACHE_E_EPOCH, "abort"); /* no page had come: no epoch was opened */
        must(colocache_sender_resend(world->sender) == 0, "resend");
        return 0;
    }
    const uint64_t first[2] = {0, 5};
    for (uint32_t block = 0; block < 2; block++) /* the same bytes again, by the other way */
        STEP("receive_page",
             colocache_receive_page(world->cc, world->epoch, block, first[block], world->ram[block] + first[block] * PAGE, PAGE));
    void *state;
    uint64_t len = world->epoch * 1500 % STATE_MAX;
    STEP("device_state_begin", colocache_device_state_begin(world->cc, world->epoch, len, &state));
    for (uint64_t i = 0; i < len; i++)
        ((unsigned char *)state)[i] = state_byte(world->epoch, i);
    if (sync_logs(world) != 0)
        return -1;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = world->epoch, .n_pages = COLOCACHE_ANY_COUNT};
    if (INSIDE(colocache_seal(world->cc, &args, NULL)) != 0) {
        failed(world, "seal", inside);
        if (world->give_up)
            return -1;
        must(colocache_sender_resend(world->sender) == 0, "resend");
        return 0;
    }
    world->sealed = world->epoch;
    for (int block = 0; block < 2; block++)
        memcpy(world->sealed_ram[block], world->ram[block], n_pages[block] * PAGE);
    must(colocache_sender_received(world->sender) == 0, "received");
    return 1;
}

static void check_whole(struct world *world, const char *when)
{
    const void *state;
    uint64_t len;
    for (int block = 0; block < 2; block++) {
        for (uint64_t pfn = 0; pfn < n_pages[block]; pfn++) {
            if (memcmp(world->svm[block] + pfn * PAGE, world->sealed_ram[block] + pfn * PAGE, PAGE) != 0)
                breach("%s: page %llu of block %d is not epoch %llu's", when, (unsigned long long)pfn, block,
                       (unsigned long long)world->sealed);
        }
    }
    must(colocache_device_state(world->cc, &state, &len) == 0 && len == world->sealed * 1500 % STATE_MAX, "device_state");
    for (uint64_t i = 0; i < len; i++)
        must(((const unsigned char *)state)[i] == state_byte(world->sealed, i), "a byte of the device state");
}

static int flush_epoch(struct world *world)
{
    STEP("flush", colocache_flush(world->cc, NULL));
    check_whole(world, "after the flush");
    STEP("loaded", colocache_loaded(world->cc, 1));
    world->committed = world->sealed;
    tidying = true;
    STEP("free_staged", colocache_free_staged(world->cc));
    tidying = false;
    STEP("validate", colocache_validate(world->cc, 1));
    return 0;
}

static int whole_epoch(struct world *world, bool svm_runs)
{
    int rc;
    while ((rc = seal_epoch(world, svm_runs)) == 0)
        ; /* at most one failure: at most twice */
    return rc < 0 ? -1 : flush_epoch(world);
}

static int attach_again(struct world *world, uint32_t action)
{
    struct colocache_images images[3];
    const struct colocache_options any_threads = with_threads(world, 0);
    struct colocache_recovery report;
    images_of(world, images);
    images[2] = late_images(world);
    drop_handles(world);
    const uint32_t n_images = has_late(world) ? 3 : 2;
    attaching = true;
    STEP("attach", colocache_attach(world->control, &any_threads, images, n_images, &report, &world->cc));
    attaching = false;
    keep_limit(world);
    if (report.action != action)
        breach("attach says %s, expected action %u", report.sentence, action);
    find_guest(world);
    if (action != COLOCACHE_RECOVERED_NOTHING && action != COLOCACHE_RECOVERED_NO_RESTART) {
        check_whole(world, "after attach");
        world->committed = world->sealed;
    }
    return open_logs(world);
}

/* ---- the history, and what follows when it was given up -------------------------------------------------------------- */

/* private_pages -- a mapping as a VM over bounded memory has it: how much of it is private, and that forgotten */
static int private_pages(struct world *world)
{
    uint64_t n_bytes = 0;
    uint8_t *at = mmap(NULL, DENSE * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, world->guest[0], 0);
    must(at != MAP_FAILED, "mmap");
    for (int rc = -1; rc < 0;) {
        at[0] = at[3 * PAGE] = 1;
        rc = INSIDE(colocache_private_bytes(0, at, DENSE * PAGE, &n_bytes));
        if (rc == 0)
            rc = INSIDE(colocache_private_forget(at, DENSE * PAGE));
        if (rc == 0 && (n_bytes != 2 * PAGE || at[3 * PAGE] != 0))
            breach("%llu bytes were private", (unsigned long long)n_bytes);
        struct cc_forget aside = {.whole = true};
        at[0] = at[3 * PAGE] = 2;
        if (rc == 0)
            rc = INSIDE(cc_forget(&aside, at, DENSE * PAGE)); /* as a flush does, with more pages than this world has */
        if (rc == 0 && at[3 * PAGE] != 0)
            breach("a page that was put aside is still there");
        tidying = true;
        (void)INSIDE((cc_forget_rest(&aside), 0));
        tidying = false;
        if (rc < 0)
            failed(world, "private pages", rc);
        if (rc < 0 && world->give_up)
            break;
    }
    munmap(at, DENSE * PAGE);
    return world->give_up && world->n_failures ? -1 : 0;
}

int world_history(struct world *world)
{
    struct colocache_images images[2];
    const struct colocache_options any_threads = with_threads(world, 0);
    struct colocache_status status = {.struct_size = sizeof status};
    struct colocache *second;
    uint64_t epoch;
    int rc;
    if (private_pages(world) != 0 || start(world) != 0 || whole_epoch(world, false) != 0)
        return -1;
    const struct colocache_images late = late_images(world);
    STEP("add_block", colocache_add_block(world->cc, &late, NULL));
    if (whole_epoch(world, true) != 0)
        return -1;
    STEP("remove_block", colocache_remove_block(world->cc, 2));
    if (whole_epoch(world, true) != 0)
        return -1;
    images_of(world, images);
    rc = INSIDE(colocache_attach(world->control, &any_threads, images, 2, NULL, &second));
    if (rc == 0)
        breach("a second owner was let in");
    if (rc != COLOCACHE_E_BUSY)
        failed(world, "attach of a second owner", rc);
    if (attach_again(world, COLOCACHE_RECOVERED_RESTART) != 0)
        return -1;
    while ((rc = seal_epoch(world, true)) == 0)
        ;
    if (rc < 0 || attach_again(world, COLOCACHE_RECOVERED_REPLAYED) != 0 || whole_epoch(world, true) != 0)
        return -1;
    world->epoch++;
    memset(world->ram[1] + 7 * PAGE, (int)world->epoch, PAGE);
    must(colocache_sender_mark_dirty(world->sender, 1, 7, 1) == 0, "sender_mark_dirty");
    STEP("receive_page", colocache_receive_page(world->cc, world->epoch, 1, 7, world->ram[1] + 7 * PAGE, PAGE));
    if (attach_again(world, world->bounded ? COLOCACHE_RECOVERED_RESTART : COLOCACHE_RECOVERED_NO_RESTART) != 0)
        return -1;
    STEP("receive_zero", colocache_receive_zero(world->cc, world->epoch + 1, 1, 6, 1));
    memset(world->ram[1] + 6 * PAGE, 0, PAGE);
    must(colocache_sender_mark_dirty(world->sender, 1, 6, 1) == 0, "sender_mark_dirty"); /* if its epoch is given up */
    if (whole_epoch(world, false) != 0)
        return -1;
    STEP("inspect", colocache_inspect(world->control, &status, NULL, NULL));
    STEP("failover", colocache_failover(world->cc, &epoch));
    return 0;
}

/* world_recover -- the process that gave up is gone: a new one attaches and goes on */
void world_recover(struct world *world)
{
    struct colocache_status status = {.struct_size = sizeof status};
    bool region = colocache_inspect(world->control, &status, NULL, NULL) == 0;
    drop_handles(world);
    colocache_sender_close(world->sender);
    world->sender = NULL;
    kvm_log_words = 0;
    world->give_up = false;
    if (!region || world->n_blocks < 2) { /* nothing to attach to yet: a file that is empty, or is emptied */
        must(ftruncate(world->control, 0) == 0, "ftruncate");
        must(start(world) == 0, "start");
    } else {
        uint32_t action = world->sealed == 0                                          ? COLOCACHE_RECOVERED_NOTHING
                          : world->committed != world->sealed                         ? COLOCACHE_RECOVERED_REPLAYED
                          : status.receiving_epoch == world->sealed || world->bounded ? COLOCACHE_RECOVERED_RESTART
                                                                                      : COLOCACHE_RECOVERED_NO_RESTART;
        must(attach_again(world, action) == 0, "attach");
        must(colocache_sender_create(&world->sender) == 0, "sender_create"); /* the peer's memory lives on; it sends all of it */
        must(colocache_sender_add_block(world->sender, "dense", world->ram[0], DENSE * PAGE, PAGE, NULL) == 0, "add_block");
        must(colocache_sender_add_block(world->sender, "sparse", world->ram[1], SPARSE * PAGE, PAGE, NULL) == 0, "add_block");
        must(colocache_sender_mark_all(world->sender) == 0, "mark_all");
        if (world->epoch < status.receiving_epoch)
            world->epoch = status.receiving_epoch;
    }
    must(whole_epoch(world, false) == 0, "a further epoch");
}
