/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h -- the handle, and who writes what.  For the .c files here only; included first.
 *
 *   what                              its only writer        readers
 *   cache bytes, PVM bits             receive.c (stream.c through it)   flush, validate
 *   SVM bits                          dirty_log.c            flush_set.c
 *   flush set                         flush_set.c            flush_copy.c, recover.c
 *   guest RAM                         flush_copy.c           the VM
 *   commit word, records              commit.c               everybody
 *   `receiving`, open epoch           receive.c              checkpoint.c, recover.c
 *   phase, taken_over                 checkpoint.c           everybody
 *   clearing of PVM and SVM bits      checkpoint.c (preflush included)
 *
 * Locks: none in shared memory but the owner's.  In the process: `opening` (first page of an epoch), two gates.
 * Order of the gates: receiving before marking; never both waited for by somebody inside one of them.
 */
#ifndef CC_INTERNAL_H
#define CC_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* OFD locks, fallocate, sched_getaffinity */
#endif

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "atomics.h"
#include "bitmap.h"
#include "colocache.h"
#include "gate.h"
#include "layout.h"
#include "page_copy.h"
#include "pool.h"

struct cc_image {
    uint8_t *addr;
    uint64_t map_bytes; /* 0: the mapping is the caller's */
    int fd;             /* own duplicate, or -1 */
    uint64_t offset;
    uint64_t granule;   /* allocation unit of the file, bytes */
};

struct cc_block {
    char name[COLOCACHE_NAME_BYTES];
    uint64_t len_bytes, n_pages;
    uint32_t page_size, page_shift;
    bool sparse;
    struct cc_image guest, cache;
    struct cc_bitmap bitmaps[CC_BITMAPS]; /* enum colocache_bitmap_kind */
    void *bitmap_map;
    uint64_t bitmap_map_bytes;
    uint64_t *allocated;                  /* sparse: pages whose both images are allocated (this process's knowledge) */
};

/* The device state being written for an epoch that is not sealed. */
struct cc_device_staging {
    uint64_t epoch; /* 0 = none */
    uint64_t len_bytes;
    uint32_t area;
};

#define CC_PHASE_MASK 0xffu
#define CC_PHASE_PENDING 0x100u   /* failover was asked for while sealing */
#define CC_PHASE_WAS_EMPTY 0x200u /* sealing, and before it there was nothing to take over from */

/* What stats.c keeps.  `open_sync_ns` and `received_before` count towards what is not sealed or not open yet. */
struct cc_stats {
    uint64_t sealed_epochs, aborted_epochs, flushed_pages, flushed_bytes, flush_total_ns;
    uint64_t epoch, sync_ns, seal_ns, flush_ns, load_ns; /* of the newest sealed epoch */
    uint64_t open_sync_ns, received_before, flushed_at_ns;
};

struct colocache {
    int control_fd; /* own open file description: carries the lock */
    struct cc_control *control;
    struct cc_block_entry *table;
    uint8_t *devices;
    uint64_t head_bytes; /* mapped from offset 0: head, table, device areas */

    uint32_t n_blocks;
    struct cc_block *blocks; /* COLOCACHE_BLOCKS_MAX, so that their addresses stay */

    struct cc_pool *pool;
    struct cc_copy copy;
    void (*log)(void *log_context, int level, const char *sentence);
    void *log_context;

    struct cc_device_staging staging;
    pthread_mutex_t opening;

    _Alignas(64) uint32_t phase; /* enum colocache_phase | CC_PHASE_* */
    _Alignas(64) struct cc_gate receive_gate;
    _Alignas(64) struct cc_gate mark_gate;
    _Alignas(64) uint64_t open_epoch; /* 0 = none */
    uint64_t received_pages;          /* of the open epoch */
    struct cc_stats stats;
};

/* error.c */
int cc_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
int cc_fail_errno(const char *what); /* -errno, with `what` failed */
void cc_log(const struct colocache *cc, int level, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* control.c: the only caller of mmap and munmap */
int cc_map_file(int fd, uint64_t offset, uint64_t n_bytes, bool writable, void **out);
void cc_unmap(void *addr, uint64_t n_bytes);
int cc_reserve(int fd, uint64_t offset, uint64_t n_bytes, const char *what); /* posix_fallocate with our errors */
int cc_control_open(int control_fd, bool create, const struct colocache_options *options, struct colocache **out);
void cc_control_free(struct colocache *cc);
int cc_control_check(const struct cc_control *control, uint64_t file_bytes); /* magic, version, stamp, sizes, reserved */
void cc_control_new_history(struct cc_control *control);

/* image.c */
int cc_image_identify(const char *name, int fd, uint64_t offset, uint64_t len_bytes, struct cc_image_identity *identity,
                      uint64_t *granule);
int cc_image_open(struct cc_image *image, int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, void *addr);
void cc_image_close(struct cc_image *image);
int cc_image_reserve(int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, const char *name);
int cc_block_check_shared(const struct cc_block *block, const struct colocache_images *images);
int cc_block_allocate(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);      /* sparse: both images */
int cc_block_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes);

/* block.c */
int cc_block_add(struct colocache *cc, const struct colocache_images *images);
int cc_block_reattach(struct colocache *cc, uint32_t index, const struct colocache_images *images);
void cc_block_release(struct cc_block *block);
int cc_block_check_entry(const struct cc_block_entry *entry, uint64_t file_bytes);
void cc_block_bind_bitmaps(struct cc_bitmap bitmaps[CC_BITMAPS], void *map, uint64_t n_pages);
int cc_block_get(struct colocache *cc, uint32_t index, struct cc_block **out);            /* E_BLOCK */
int cc_block_range(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);   /* E_RANGE */

static inline uint8_t *cc_guest_page(const struct cc_block *block, uint64_t pfn)
{
    return block->guest.addr + (pfn << block->page_shift);
}

static inline uint8_t *cc_cache_page(const struct cc_block *block, uint64_t pfn)
{
    return block->cache.addr + (pfn << block->page_shift);
}

/* receive.c: through the gate and into an open epoch; `leave` after every successful enter */
int cc_receive_enter(struct colocache *cc, uint64_t epoch);
void cc_receive_leave(struct colocache *cc);
void cc_receive_done(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages); /* bits, count */

/* flush_set.c */
int cc_flush_set_unite(struct colocache *cc, struct colocache_seal_result *out, uint64_t *checksum_out);
uint64_t cc_flush_set_checksum(struct colocache *cc);
int cc_flush_set_allocate(struct colocache *cc);

/* commit.c */
int cc_commit_read(const struct cc_control *control, struct cc_record *out); /* 1 there is one, 0 none yet, E_CORRUPT */
void cc_commit_publish(struct cc_control *control, struct cc_record *record);
int cc_commit_check_device_state(struct colocache *cc, const struct cc_record *record);
uint8_t *cc_device_area(struct colocache *cc, uint32_t area);

/* flush_copy.c: the only writer of guest RAM */
void cc_flush_copy(struct colocache *cc, struct colocache_flush_result *out);          /* the flush set */
uint64_t cc_flush_copy_word(struct colocache *cc, struct cc_block *block, uint64_t word, uint64_t bits); /* preflush */
int cc_flush_copy_all(struct colocache *cc, uint64_t *n_pages_out);                     /* the whole cache */

/* checkpoint.c */
int cc_finish_flush(struct colocache *cc, struct cc_record *record, struct colocache_flush_result *out);

/* stats.c */
void cc_stats_opened(struct colocache *cc);
void cc_stats_synced(struct colocache *cc, uint64_t begin_ns);
void cc_stats_sealed(struct colocache *cc, const struct colocache_seal_result *result);
void cc_stats_flushed(struct colocache *cc, const struct colocache_flush_result *result);
void cc_stats_loaded(struct colocache *cc);
void cc_stats_aborted(struct colocache *cc);

/* validate.c */
int cc_validate_bitmaps(struct colocache *cc, bool with_summaries);

/* transfer of a source's bits: dirty_log.c, dirty_kvm.c, dirty_ring.c, dirty_uffd.c, sender.c */
struct colocache_source {
    /* Get what was written since the last clear and hand it on; then clear.  `take` may be called several times a block.  If it fails
     * the bits are still in the log, or kept for the next sync; where a get has cleared them already, E_LOG_LOST. */
    int (*sync)(struct colocache_source *source,
                int (*take)(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words),
                void *context);
    void (*close)(struct colocache_source *source);
};

/* dirty_log.c: would `take` have these pages?  Asked for all parts of a log before the first is got: a part that fits no block
 * is then found while nothing is lost.  And what a source says when the answer was yes and it fails all the same. */
int cc_source_ask(int (*take)(void *, uint32_t, uint64_t, uint64_t, const uint64_t *), void *context, uint32_t block,
                  uint64_t first_pfn, uint64_t n_pages);
int cc_source_not_taken(const char *log);

static inline uint64_t cc_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Copy a caller's struct of `given` bytes into ours of `ours`: a shorter one is an older caller's, the rest stays zero;
 * of a longer one only what we know is read.  0 or E_ARGUMENT when it hasn't even got its first fields. */
int cc_take_struct(void *ours, uint64_t our_bytes, const void *given, uint64_t least_bytes, const char *what);
/* Give a result out: as many bytes as the caller's struct_size says it has room for. */
int cc_give_struct(void *given, const void *ours, uint64_t our_bytes, const char *what);

#endif
