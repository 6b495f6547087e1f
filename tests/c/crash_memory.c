/* SPDX-License-Identifier: Apache-2.0 */
/* crash_memory.c -- memory that outlives its processes, and a copy of all of it, to repeat an attach on the same state. */
#define _GNU_SOURCE
#include "crash_world.h"

#include <fcntl.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define CONTROL_ROOM (1u << 20)

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
