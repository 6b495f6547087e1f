/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_region.c -- any damage to a control region: colocache_inspect and colocache_attach, and what comes after an attach that was
 * let in.
 *
 * An input chooses a state that a process may leave behind and then changes bytes, words, the file's size, holes; and makes the records'
 * checksums right again if it likes, which a fuzzer never guesses.  Whatever it did
 *   - inspect writes nothing;
 *   - an attach that is refused has written nothing: no image, and of the region only who tried;
 *   - one that is let in finds a region that is whole and no epoch that never was, and the handle works or refuses;
 *   - no descriptor stays open.
 * A state that nothing was done to must be recovered exactly.
 */
#include "fuzz_world.h"

#include <fcntl.h>
#include <stddef.h>

#include "layout.h"

enum { REGION_MAX = 512 << 10 }; /* a hole that is read costs memory: damage may make the file longer, but not endless */

enum state { NOTHING, FIRST_SEALED, RESTARTS, NO_RESTART, SEALED_AGAIN, TOOK_OVER, STATES };

struct picture {
    uint8_t *control;
    size_t control_bytes;
    uint8_t guest[BLOCKS][PAGES_MAX * PAGE], cache[BLOCKS][PAGES_MAX * PAGE];
};

static struct world world;
static struct picture states[STATES], before;

static void take_picture(struct picture *picture)
{
    off_t size = lseek(world.control, 0, SEEK_END);
    picture->control = realloc(picture->control, (size_t)size + 1);
    picture->control_bytes = (size_t)size;
    PROMISE(picture->control && pread(world.control, picture->control, (size_t)size, 0) == size, "the region can't be read");
    for (unsigned b = 0; b < BLOCKS; b++) {
        memcpy(picture->guest[b], world.guest_at[b], block_pages[b] * PAGE);
        memcpy(picture->cache[b], world.cache_at[b], block_pages[b] * PAGE);
    }
}

static void put_back(const struct picture *picture)
{
    PROMISE(ftruncate(world.control, 0) == 0, "ftruncate");
    for (size_t at = 0; at < picture->control_bytes; at += PAGE) { /* the device states are sparse: stay so */
        static const uint8_t zeros[PAGE];
        if (memcmp(picture->control + at, zeros, PAGE) != 0)
            PROMISE(pwrite(world.control, picture->control + at, PAGE, (off_t)at) == PAGE, "pwrite");
    }
    PROMISE(ftruncate(world.control, (off_t)picture->control_bytes) == 0, "ftruncate");
    for (unsigned b = 0; b < BLOCKS; b++) {
        memcpy(world.guest_at[b], picture->guest[b], block_pages[b] * PAGE);
        memcpy(world.cache_at[b], picture->cache[b], block_pages[b] * PAGE);
    }
}

static void make_states(void)
{
    world_make(&world);
    for (enum state state = 0; state < STATES; state++) {
        world_create(&world);
        world_receive(&world, 1, state == NOTHING ? 2 : 1);
        if (state == FIRST_SEALED)
            world_seal(&world, 1);
        else if (state != NOTHING)
            world_commit(&world, 1);
        if (state == NO_RESTART || state == SEALED_AGAIN) {
            PROMISE(colocache_mark_dirty(world.cc, 0, 60, 7) == 0, "mark_dirty");
            world_fill(world.guest_at[0] + 60 * PAGE, 77, 0, 60);
            world_receive(&world, 3, 3);
        }
        if (state == SEALED_AGAIN)
            world_seal(&world, 3);
        uint64_t epoch;
        if (state == TOOK_OVER)
            PROMISE(colocache_failover(world.cc, &epoch) == 0, "failover");
        world_close(&world);
        take_picture(&states[state]);
    }
}

/* ---- damage ----------------------------------------------------------------------------------------------------------------- */

/* take_offset -- in the head, in the entries of the blocks, near the end (bitmaps), or anywhere */
static off_t take_offset(struct input *input, off_t size)
{
    uint64_t offset;
    switch (take(input, 1) % 4) {
    case 0:
        return (off_t)(take(input, 2) % sizeof(struct cc_control));
    case 1:
        return (off_t)(CC_TABLE_OFFSET + take(input, 2) % (BLOCKS * sizeof(struct cc_block_entry)));
    case 2:
        offset = take(input, 2);
        return offset < (uint64_t)size ? size - 1 - (off_t)offset : 0;
    default:
        return (off_t)(take(input, 4) % REGION_MAX);
    }
}

static void write_at(off_t at, const void *from, size_t n_bytes)
{
    if (at >= 0 && at + (off_t)n_bytes <= REGION_MAX)
        PROMISE(pwrite(world.control, from, n_bytes, at) == (ssize_t)n_bytes, "pwrite");
}

static void sum_records(void)
{
    for (unsigned i = 0; i < 2; i++) {
        struct cc_record record;
        off_t at = (off_t)(offsetof(struct cc_control, records) + i * sizeof record);
        if (pread(world.control, &record, sizeof record, at) == sizeof record) {
            record.checksum = colocache_checksum(&record, offsetof(struct cc_record, checksum));
            write_at(at, &record, sizeof record);
        }
    }
}

/* damage -- what was done, in the end */
enum damage { NONE, DAMAGED, DAMAGED_AND_SUMMED };

static enum damage damage(struct input *input)
{
    enum damage done = NONE;
    for (unsigned n = 0; input->left && n < 32; n++) {
        off_t size = lseek(world.control, 0, SEEK_END), at, to;
        uint64_t word;
        uint8_t bytes[64] = {0};
        done = done == NONE ? DAMAGED : done;
        switch (take(input, 1) % 6) {
        case 0: /* bits of a byte */
            at = take_offset(input, size);
            if (pread(world.control, bytes, 1, at) == 1) {
                bytes[0] ^= (uint8_t)take(input, 1);
                write_at(at, bytes, 1);
            }
            break;
        case 1: /* a word */
            at = take_offset(input, size) & ~(off_t)7;
            word = take_small(input, 8);
            write_at(at, &word, sizeof word);
            break;
        case 2:
            PROMISE(ftruncate(world.control, (off_t)(take(input, 4) % (REGION_MAX + 1))) == 0, "ftruncate");
            break;
        case 3:
            at = take_offset(input, size) & ~(off_t)(PAGE - 1);
            fallocate(world.control, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, PAGE);
            break;
        case 4: /* what stands somewhere else */
            at = take_offset(input, size) & ~(off_t)63;
            to = take_offset(input, size) & ~(off_t)63;
            if (pread(world.control, bytes, sizeof bytes, at) == sizeof bytes)
                write_at(to, bytes, sizeof bytes);
            break;
        case 5:
            sum_records();
            done = DAMAGED_AND_SUMMED;
            break;
        }
    }
    return done;
}

/* ---- what must hold ----------------------------------------------------------------------------------------------------------- */

static void check_images(const char *after)
{
    for (unsigned b = 0; b < BLOCKS; b++) {
        PROMISE(memcmp(before.guest[b], world.guest_at[b], block_pages[b] * PAGE) == 0, "guest RAM of block %u changed after %s", b, after);
        PROMISE(memcmp(before.cache[b], world.cache_at[b], block_pages[b] * PAGE) == 0, "the cache of block %u changed after %s", b, after);
    }
}

static void check_region(const char *after, bool owner_too)
{
    off_t size = lseek(world.control, 0, SEEK_END);
    PROMISE((size_t)size == before.control_bytes, "the region has %lld bytes after %s", (long long)size, after);
    static uint8_t *now;
    now = realloc(now, (size_t)size + 1);
    PROMISE(now && pread(world.control, now, (size_t)size, 0) == size, "the region can't be read");
    const size_t owner = offsetof(struct cc_control, owner_pid);
    if (!owner_too && (size_t)size >= owner + 8)
        memcpy(now + owner, before.control + owner, 8);
    if (memcmp(now, before.control, (size_t)size) != 0) {
        off_t at = 0;
        while (now[at] == before.control[at])
            at++;
        PROMISE(false, "byte %lld of the region was written by %s", (long long)at, after);
    }
}

/* inspect -- and of the images those that it names, in `images`: a damaged record may say that a block was removed */
static uint32_t inspect(struct colocache_images images[BLOCKS])
{
    static struct colocache_block_info blocks[COLOCACHE_BLOCKS_MAX];
    struct colocache_status status = {.struct_size = sizeof status};
    uint32_t n_blocks = COLOCACHE_BLOCKS_MAX;
    int rc = colocache_inspect(world.control, &status, blocks, &n_blocks);
    PROMISE(rc <= 0, "inspect gave %d", rc);
    check_region("inspect", true);
    world_images(&world, images);
    if (rc)
        return BLOCKS;
    PROMISE(n_blocks <= COLOCACHE_BLOCKS_MAX && n_blocks == status.n_blocks, "%u blocks", n_blocks);
    uint32_t n = 0;
    for (unsigned b = 0; b < BLOCKS; b++) {
        bool named = false;
        for (uint32_t i = 0; i < n_blocks && !named; i++)
            named = strcmp(blocks[i].name, block_names[b]) == 0;
        if (named)
            images[n++] = images[b];
    }
    return n;
}

/* check_recovered -- after a death without damage */
static void check_recovered(enum state state, int rc, const struct colocache_recovery *report)
{
    static const uint32_t actions[STATES] = {COLOCACHE_RECOVERED_NOTHING,    COLOCACHE_RECOVERED_REPLAYED, COLOCACHE_RECOVERED_RESTART,
                                             COLOCACHE_RECOVERED_NO_RESTART, COLOCACHE_RECOVERED_REPLAYED, 0};
    PROMISE(rc == (state == TOOK_OVER ? COLOCACHE_E_FAILED_OVER : 0), "attach to an undamaged region in state %d gave %d", state, rc);
    if (rc)
        return;
    PROMISE(report->action == actions[state], "state %d was recovered by %u", state, report->action);
    if (report->action == COLOCACHE_RECOVERED_REPLAYED || report->action == COLOCACHE_RECOVERED_RESTART) {
        for (unsigned b = 0; b < BLOCKS; b++)
            PROMISE(memcmp(world.guest_at[b], world.cache_at[b], block_pages[b] * PAGE) == 0, "guest RAM of block %u is not the epoch", b);
    }
}

/* go_on -- a further epoch on a handle that was let in; anything may be refused, nothing may break */
static void go_on(void)
{
    static const uint8_t page[PAGE] = {1};
    struct colocache_status status = {.struct_size = sizeof status};
    void *at;
    PROMISE(colocache_get_status(world.cc, &status) == 0, "get_status");
    uint64_t epoch = status.receiving_epoch + 1;
    bool ok = colocache_receive_page(world.cc, epoch, 0, block_pages[0] - 1, page, PAGE) == 0 &&
              colocache_device_state_begin(world.cc, epoch, STATE_MAX, &at) == 0;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = 1};
    if (ok && colocache_seal(world.cc, &args, NULL) == 0) {
        PROMISE(colocache_flush(world.cc, NULL) == 0 && colocache_loaded(world.cc, 1) == 0, "flush and loaded");
        PROMISE(world.guest_at[0][(block_pages[0] - 1) * PAGE] == 1, "the page is not in guest RAM");
        PROMISE(colocache_validate(world.cc, 0) == 0, "validate");
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct colocache_images images[BLOCKS];
    struct colocache_recovery report;
    if (!states[0].control)
        make_states();
    int descriptor = dup(world.control);
    close(descriptor);

    enum state state = (enum state)(take(&input, 1) % STATES);
    put_back(&states[state]);
    enum damage damaged = damage(&input);
    take_picture(&before);
    const uint32_t n_images = inspect(images);
    int rc = colocache_attach(world.control, &world_options, images, n_images, &report, &world.cc);
    PROMISE(rc <= 0, "attach gave %d", rc);
    if (damaged == NONE)
        check_recovered(state, rc, &report);
    if (rc) {
        PROMISE(!world.cc, "attach gave %d and a handle", rc);
        check_images("an attach that was refused");
        check_region("an attach that was refused", false);
    } else {
        PROMISE(report.action <= COLOCACHE_RECOVERED_NO_RESTART && report.sentence[0], "action %u", report.action);
        struct colocache_status status = {.struct_size = sizeof status};
        PROMISE(colocache_get_status(world.cc, &status) == 0, "get_status");
        PROMISE(damaged == DAMAGED_AND_SUMMED || status.sealed_epoch == 0 || status.sealed_epoch == 1 || status.sealed_epoch == 3,
                "epoch %llu was never sealed", (unsigned long long)status.sealed_epoch);
        PROMISE(colocache_validate(world.cc, 0) == 0, "validate after an attach");
        go_on();
        world_close(&world);
    }
    int again = dup(world.control);
    close(again);
    PROMISE(again == descriptor, "descriptors stay open: the next is %d, was %d", again, descriptor);
    return 0;
}
