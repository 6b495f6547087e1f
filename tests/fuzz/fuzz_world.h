/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_world.h -- the small secondary that both fuzzers work on: two blocks, neither a multiple of 64 pages, and a reader that takes
 * an input apart.  A broken promise aborts, with a sentence: to the fuzzer that is a crash.
 */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "colocache.h"

enum { PAGE = 4096, BLOCKS = 2, PAGES_MAX = 70, STATE_MAX = 8192 };
static const uint64_t block_pages[BLOCKS] = {PAGES_MAX, 5};
static const char *const block_names[BLOCKS] = {"pc.ram", "boot"};

#define PROMISE(condition, ...) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__); \
            fprintf(stderr, "; last error: %s\n", colocache_last_error()); \
            abort(); \
        } \
    } while (0)

struct world {
    int control, guest[BLOCKS], cache[BLOCKS];
    uint8_t *guest_at[BLOCKS], *cache_at[BLOCKS]; /* the fuzzer's own mappings */
    struct colocache *cc;
};

static const struct colocache_options world_options = {
    .struct_size = sizeof world_options, .n_threads = 1, .device_state_max_bytes = STATE_MAX};

static inline int world_file(const char *name, uint64_t n_bytes, uint8_t **at)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    PROMISE(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0, "no memory for the world");
    if (at) {
        *at = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        PROMISE(*at != MAP_FAILED, "no memory for the world");
    }
    return fd;
}

static inline void world_make(struct world *world)
{
    world->control = world_file("control", 0, NULL);
    for (unsigned b = 0; b < BLOCKS; b++) {
        world->guest[b] = world_file("guest", block_pages[b] * PAGE, &world->guest_at[b]);
        world->cache[b] = world_file("cache", block_pages[b] * PAGE, &world->cache_at[b]);
    }
}

static inline void world_images(const struct world *world, struct colocache_images images[BLOCKS])
{
    for (unsigned b = 0; b < BLOCKS; b++)
        images[b] = (struct colocache_images){.struct_size = sizeof images[b],
                                              .name = block_names[b],
                                              .len_bytes = block_pages[b] * PAGE,
                                              .page_size = PAGE,
                                              .guest_fd = world->guest[b],
                                              .cache_fd = world->cache[b]};
}

/* world_create -- zeroed images and a fresh region */
static inline void world_create(struct world *world)
{
    struct colocache_images images[BLOCKS];
    PROMISE(ftruncate(world->control, 0) == 0, "ftruncate");
    world_images(world, images);
    int rc = colocache_create(world->control, &world_options, &world->cc);
    PROMISE(rc == 0, "create gave %d", rc);
    for (unsigned b = 0; b < BLOCKS; b++) {
        memset(world->guest_at[b], 0, block_pages[b] * PAGE);
        memset(world->cache_at[b], 0, block_pages[b] * PAGE);
        rc = colocache_add_block(world->cc, &images[b], NULL);
        PROMISE(rc == 0, "add_block gave %d", rc);
    }
}

/* world_fill -- what page pfn of a block holds when a writer (an epoch, a packet) has written it */
static inline void world_fill(uint8_t *page, uint64_t writer, uint64_t block, uint64_t pfn)
{
    uint64_t x = writer << 32 | block << 16 | pfn;
    for (unsigned i = 0; i < PAGE / 8; i++) {
        x = (x + 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
        memcpy(page + i * 8, &x, 8);
    }
}

/* world_receive -- every n-th page of each block, of an epoch */
static inline void world_receive(struct world *world, uint64_t epoch, uint64_t every)
{
    uint8_t page[PAGE];
    for (unsigned b = 0; b < BLOCKS; b++) {
        for (uint64_t pfn = 0; pfn < block_pages[b]; pfn += every) {
            world_fill(page, epoch, b, pfn);
            int rc = colocache_receive_page(world->cc, epoch, b, pfn, page, PAGE);
            PROMISE(rc == 0, "receive gave %d", rc);
        }
    }
}

static inline void world_seal(struct world *world, uint64_t epoch)
{
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT};
    void *state;
    int rc = colocache_device_state_begin(world->cc, epoch, 4, &state);
    PROMISE(rc == 0, "device_state_begin gave %d", rc);
    memcpy(state, "regs", 4);
    rc = colocache_seal(world->cc, &args, NULL);
    PROMISE(rc == 0, "seal gave %d", rc);
}

static inline void world_commit(struct world *world, uint64_t epoch)
{
    world_seal(world, epoch);
    PROMISE(colocache_flush(world->cc, NULL) == 0, "flush");
    PROMISE(colocache_loaded(world->cc, 1) == 0, "loaded");
}

static inline void world_close(struct world *world)
{
    colocache_close(world->cc);
    world->cc = NULL;
}

/* ---- taking an input apart; past its end everything is 0 --------------------------------------------------------------- */

struct input {
    const uint8_t *at;
    size_t left;
};

static inline uint64_t take(struct input *input, unsigned n_bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < n_bytes && input->left; i++, input->left--)
        value |= (uint64_t)*input->at++ << (8 * i);
    return value;
}

/* take_small -- one byte; if that is 255, n_bytes of any value instead */
static inline uint64_t take_small(struct input *input, unsigned n_bytes)
{
    uint64_t value = take(input, 1);
    return value == 255 ? take(input, n_bytes) : value;
}

#endif
