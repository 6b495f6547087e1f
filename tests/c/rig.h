/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rig.h -- a secondary in memfds for the tests of the rooms above single files, with an oracle of plain arrays: what guest RAM
 * and cache must hold, and one byte per page for each bitmap.  The images are mapped a second time here, so that the
 * test looks at (and writes) what the library's own mappings only share.
 */
#ifndef RIG_H
#define RIG_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "layout.h"
#include "word.h"

#define RIG_BLOCKS_MAX 4u

struct rig_block {
    const char *name;
    uint64_t n_pages;
    uint32_t page_size;
    bool sparse;
    bool leaving, gone; /* removed; and an epoch without it is sealed */
    int guest_fd, cache_fd;
    uint8_t *guest, *cache;               /* second mappings */
    uint8_t *guest_oracle, *cache_oracle; /* what they must hold */
    uint8_t *pvm, *svm, *flush;           /* one byte per page */
};

struct rig {
    int control_fd;
    uint32_t n_blocks;
    struct rig_block blocks[RIG_BLOCKS_MAX];
    struct colocache *cc;
    struct cc_control *control; /* the test's own mapping of the whole region */
    uint64_t control_bytes;
    struct colocache_recovery report;
    uint32_t flush_threads; /* of the last flush */
};

static inline int rig_memfd(const char *name, uint64_t n_bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0);
    return fd;
}

static inline void *rig_map(int fd, uint64_t n_bytes)
{
    void *addr = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(addr != MAP_FAILED);
    return addr;
}

static inline uint64_t rig_len(const struct rig_block *block)
{
    return block->n_pages * block->page_size;
}

static inline void rig_block_init(struct rig_block *block, const char *name, uint64_t n_pages, uint32_t page_size, bool sparse)
{
    *block = (struct rig_block){.name = name, .n_pages = n_pages, .page_size = page_size, .sparse = sparse};
    uint64_t len = rig_len(block);
    block->guest_fd = rig_memfd("guest", len);
    block->cache_fd = rig_memfd("cache", len);
    if (!sparse)
        REQUIRE(posix_fallocate(block->guest_fd, 0, (off_t)len) == 0 && posix_fallocate(block->cache_fd, 0, (off_t)len) == 0);
    block->guest = rig_map(block->guest_fd, len);
    block->cache = rig_map(block->cache_fd, len);
    block->guest_oracle = calloc(2, len);
    block->cache_oracle = block->guest_oracle + len;
    block->pvm = calloc(3, n_pages);
    REQUIRE(block->guest_oracle && block->pvm);
    block->svm = block->pvm + n_pages;
    block->flush = block->svm + n_pages;
}

static inline struct colocache_images rig_images(const struct rig_block *block)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = block->name,
                                     .len_bytes = rig_len(block),
                                     .page_size = block->page_size,
                                     .sparse = block->sparse,
                                     .guest_fd = block->guest_fd,
                                     .cache_fd = block->cache_fd};
}

static inline struct colocache_options rig_options(void)
{
    return (struct colocache_options){.struct_size = sizeof(struct colocache_options), .n_threads = 2, .device_state_max_bytes = 10000};
}

/* rig_view -- the test's own mapping of the control region, which may have grown */
static inline void rig_view(struct rig *rig)
{
    struct stat st;
    if (rig->control)
        munmap(rig->control, rig->control_bytes);
    REQUIRE(fstat(rig->control_fd, &st) == 0);
    rig->control_bytes = (uint64_t)st.st_size;
    rig->control = rig_map(rig->control_fd, rig->control_bytes);
}

/* rig_open -- blocks of odd lengths: 1 page, 100, 4097 or whatever is given; n_blocks of them */
static inline void rig_open(struct rig *rig, uint32_t n_blocks, const uint64_t *n_pages, uint32_t page_size, bool sparse)
{
    static const char *const names[RIG_BLOCKS_MAX] = {"pc.ram", "boot", "vga.vram", "0000:00:03.0/rom"};
    struct colocache_options options = rig_options();
    memset(rig, 0, sizeof *rig);
    rig->control_fd = rig_memfd("control", 0);
    rig->n_blocks = n_blocks;
    REQUIRE(colocache_create(rig->control_fd, &options, &rig->cc) == 0);
    for (uint32_t b = 0; b < n_blocks; b++) {
        rig_block_init(&rig->blocks[b], names[b], n_pages[b], page_size, sparse);
        struct colocache_images images = rig_images(&rig->blocks[b]);
        uint32_t index = 99;
        REQUIRE(colocache_add_block(rig->cc, &images, &index) == 0);
        CHECK_EQ(b, index);
    }
    rig_view(rig);
}

/* rig_die -- what a death leaves: the handle's memory, threads and lock go, nothing is finished */
static inline void rig_die(struct rig *rig)
{
    colocache_close(rig->cc);
    rig->cc = NULL;
}

static inline int rig_attach(struct rig *rig)
{
    struct colocache_options options = rig_options();
    struct colocache_images images[RIG_BLOCKS_MAX];
    uint32_t n = 0;
    for (uint32_t b = rig->n_blocks; b-- > 0;) { /* in another order than they were added */
        if (!rig->blocks[b].gone)
            images[n++] = rig_images(&rig->blocks[b]);
    }
    return colocache_attach(rig->control_fd, &options, images, n, &rig->report, &rig->cc);
}

static inline void rig_close(struct rig *rig)
{
    colocache_close(rig->cc);
    for (uint32_t b = 0; b < rig->n_blocks; b++) {
        struct rig_block *block = &rig->blocks[b];
        munmap(block->guest, rig_len(block));
        munmap(block->cache, rig_len(block));
        close(block->guest_fd);
        close(block->cache_fd);
        free(block->guest_oracle);
        free(block->pvm);
    }
    munmap(rig->control, rig->control_bytes);
    close(rig->control_fd);
    memset(rig, 0, sizeof *rig);
}

/* ---- what happens, to the library and to the oracle ---------------------------------------------------------------- */

/* A page's content tells its epoch, block and number in every 64-bit word. */
static inline void rig_fill(uint8_t *page, uint32_t page_size, uint64_t salt, uint32_t block, uint64_t pfn)
{
    uint64_t mark = (salt * 0x9E3779B97F4A7C15ull) ^ ((uint64_t)block << 56) ^ (pfn << 8) ^ 0xa5;
    for (uint32_t i = 0; i < page_size; i += 8) {
        uint64_t word = mark + i;
        memcpy(page + i, &word, 8);
    }
}

static inline void rig_receive(struct rig *rig, uint64_t epoch, uint32_t b, uint64_t pfn, uint64_t salt)
{
    struct rig_block *block = &rig->blocks[b];
    uint8_t *expected = block->cache_oracle + pfn * block->page_size;
    rig_fill(expected, block->page_size, salt, b, pfn);
    CHECK_RC(0, colocache_receive_page(rig->cc, epoch, b, pfn, expected, block->page_size));
    block->pvm[pfn] = 1;
}

static inline void rig_receive_zero(struct rig *rig, uint64_t epoch, uint32_t b, uint64_t pfn, uint64_t n)
{
    struct rig_block *block = &rig->blocks[b];
    memset(block->cache_oracle + pfn * block->page_size, 0, n * block->page_size);
    CHECK_RC(0, colocache_receive_zero(rig->cc, epoch, b, pfn, n));
    memset(block->pvm + pfn, 1, n);
}

/* rig_guest_write -- the SVM writes a page and user space says so */
static inline void rig_guest_write(struct rig *rig, uint32_t b, uint64_t pfn, uint64_t salt)
{
    struct rig_block *block = &rig->blocks[b];
    rig_fill(block->guest + pfn * block->page_size, block->page_size, salt, b, pfn);
    rig_fill(block->guest_oracle + pfn * block->page_size, block->page_size, salt, b, pfn);
    CHECK_RC(0, colocache_mark_dirty(rig->cc, b, pfn, 1));
    block->svm[pfn] = 1;
}

static inline void rig_device_state(struct rig *rig, uint64_t epoch, uint64_t n_bytes)
{
    void *addr = NULL;
    CHECK_RC(0, colocache_device_state_begin(rig->cc, epoch, n_bytes, &addr));
    if (addr)
        memset(addr, (int)(epoch & 0xff), n_bytes);
}

static inline void rig_check_device_state(struct rig *rig, uint64_t epoch, uint64_t n_bytes)
{
    const void *addr = NULL;
    uint64_t found = 0;
    CHECK_RC(0, colocache_device_state(rig->cc, &addr, &found));
    CHECK_EQ(n_bytes, found);
    for (uint64_t i = 0; addr && i < found; i++) {
        if (((const uint8_t *)addr)[i] != (epoch & 0xff)) {
            CHECK_SAY("byte %llu of the device state is not epoch %llu's", (unsigned long long)i, (unsigned long long)epoch);
            return;
        }
    }
}

static inline struct colocache_seal_args rig_seal_args(uint64_t epoch)
{
    return (struct colocache_seal_args){.struct_size = sizeof(struct colocache_seal_args), .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT};
}

static inline int rig_try_seal(struct rig *rig, uint64_t epoch)
{
    struct colocache_seal_args args = rig_seal_args(epoch);
    return colocache_seal(rig->cc, &args, NULL);
}

/* rig_seal -- with its counts held against the oracle */
static inline void rig_seal(struct rig *rig, uint64_t epoch)
{
    struct colocache_seal_args args = rig_seal_args(epoch);
    struct colocache_seal_result found = {.struct_size = sizeof found}, expected = {0};
    CHECK_RC(0, colocache_seal(rig->cc, &args, &found));
    for (uint32_t b = 0; b < rig->n_blocks; b++) {
        struct rig_block *block = &rig->blocks[b];
        block->gone |= block->leaving;
        for (uint64_t pfn = 0; pfn < block->n_pages && !block->gone; pfn++) {
            block->flush[pfn] = block->pvm[pfn] | block->svm[pfn];
            expected.pvm_pages += block->pvm[pfn] && !block->svm[pfn];
            expected.svm_pages += block->svm[pfn] && !block->pvm[pfn];
            expected.both_pages += block->svm[pfn] && block->pvm[pfn];
            expected.flush_pages += block->flush[pfn];
            block->pvm[pfn] = block->svm[pfn] = 0;
        }
    }
    CHECK_EQ(epoch, found.epoch);
    CHECK_EQ(expected.pvm_pages, found.pvm_pages);
    CHECK_EQ(expected.svm_pages, found.svm_pages);
    CHECK_EQ(expected.both_pages, found.both_pages);
    CHECK_EQ(expected.flush_pages, found.flush_pages);
}

/* rig_flushed -- guest RAM must be the cache now, on the pages of the flush set */
static inline void rig_flushed(struct rig *rig)
{
    for (uint32_t b = 0; b < rig->n_blocks; b++) {
        struct rig_block *block = &rig->blocks[b];
        for (uint64_t pfn = 0; pfn < block->n_pages && !block->gone; pfn++) {
            if (block->flush[pfn])
                memcpy(block->guest_oracle + pfn * block->page_size, block->cache_oracle + pfn * block->page_size, block->page_size);
        }
    }
}

static inline void rig_flush(struct rig *rig)
{
    struct colocache_flush_result found = {.struct_size = sizeof found};
    uint64_t n_pages = 0, n_bytes = 0, n_runs = 0;
    for (uint32_t b = 0; b < rig->n_blocks; b++) {
        struct rig_block *block = &rig->blocks[b];
        for (uint64_t pfn = 0; pfn < block->n_pages && !block->gone; pfn++) {
            n_pages += block->flush[pfn];
            n_bytes += block->flush[pfn] * (uint64_t)block->page_size;
            n_runs += block->flush[pfn] && (pfn == 0 || !block->flush[pfn - 1]);
        }
    }
    CHECK_RC(0, colocache_flush(rig->cc, &found));
    CHECK_EQ(n_pages, found.n_pages);
    CHECK_EQ(n_bytes, found.n_bytes);
    CHECK_EQ(n_runs, found.n_runs);
    rig->flush_threads = found.n_threads;
    rig_flushed(rig);
}

static inline void rig_checkpoint(struct rig *rig, uint64_t epoch, uint64_t device_bytes)
{
    rig_device_state(rig, epoch, device_bytes);
    rig_seal(rig, epoch);
    rig_flush(rig);
    CHECK_RC(0, colocache_loaded(rig->cc, 1));
}

/* ---- comparing ------------------------------------------------------------------------------------------------------------ */

static inline void rig_check_bitmap(struct rig *rig, uint32_t b, int kind, const uint8_t *oracle)
{
    struct rig_block *block = &rig->blocks[b];
    uint64_t n_words = (block->n_pages + 63) / 64;
    uint64_t *words = calloc(n_words, 8);
    CHECK_RC(0, colocache_get_bitmap(rig->cc, b, kind, words, n_words));
    for (uint64_t i = 0; i < n_words * 64; i++) {
        unsigned expected = i < block->n_pages ? oracle[i] : 0;
        if ((words[i / 64] >> (i % 64) & 1) != expected) {
            CHECK_SAY("block %u, bitmap %d: bit %llu is not %u", b, kind, (unsigned long long)i, expected);
            break;
        }
    }
    free(words);
}

/* rig_check -- both images, all bitmaps, and every invariant; `stopped` also page by page */
static inline void rig_check(struct rig *rig, bool stopped)
{
    for (uint32_t b = 0; b < rig->n_blocks; b++) {
        struct rig_block *block = &rig->blocks[b];
        for (uint64_t pfn = 0; pfn < block->n_pages; pfn++) {
            uint64_t at = pfn * block->page_size;
            if (memcmp(block->guest + at, block->guest_oracle + at, block->page_size) != 0) {
                CHECK_SAY("block %u: page %llu of guest RAM is wrong", b, (unsigned long long)pfn);
                break;
            }
            if (memcmp(block->cache + at, block->cache_oracle + at, block->page_size) != 0) {
                CHECK_SAY("block %u: page %llu of the cache is wrong", b, (unsigned long long)pfn);
                break;
            }
        }
        if (rig->cc && !block->gone) {
            rig_check_bitmap(rig, b, COLOCACHE_BITMAP_PVM, block->pvm);
            rig_check_bitmap(rig, b, COLOCACHE_BITMAP_SVM, block->svm);
        }
    }
    if (rig->cc)
        CHECK_RC(0, colocache_validate(rig->cc, stopped));
}

static inline uint32_t rig_phase(struct rig *rig)
{
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(rig->cc, &status));
    return status.phase;
}

#endif
