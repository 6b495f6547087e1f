/* SPDX-License-Identifier: Apache-2.0 */
/*
 * layout.h -- the bytes of the control region.  Declares, asserts, touches nothing.
 *
 *     0        struct cc_control         one page: who, what, the commit word and the two records
 *     4096     struct cc_block_entry     COLOCACHE_BLOCKS_MAX of them
 *     devices  two device-state areas    room for device_state_max_bytes each (sparse; allocated as states come)
 *     bitmaps  per block, in the order of add_block, from its entry's bitmap_offset, each part beginning on a page:
 *                  PVM words | SVM words | flush-set words | PVM summary | SVM summary | flush-set summary
 *
 * Who writes what: internal.h.  Reserved bytes are zero and attach checks it.
 */
#ifndef CC_LAYOUT_H
#define CC_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "colocache.h"

#define CC_MAGIC 0x4548434143434f4cull /* bytes "LOCCACHE" */
#define CC_LAYOUT_VERSION 5u
#define CC_PAGE 4096u
#define CC_BITMAPS 3u /* indexed by enum colocache_bitmap_kind */

#define CC_DEVICE_STATE_DEFAULT (64ull << 20)
#define CC_DEVICE_STATE_LIMIT \
    (1ull << 40) /* with COLOCACHE_BLOCKS_MAX blocks of COLOCACHE_BLOCK_BYTES_MAX: every sum of offsets stays below 2^63 */

static inline uint64_t cc_round_to_page(uint64_t n)
{
    return (n + CC_PAGE - 1) / CC_PAGE * CC_PAGE;
}

/* What the commit word names: an epoch that is sealed, and whether its flush is complete. */
struct cc_record {
    uint64_t generation; /* the commit word that names this record */
    uint64_t epoch;
    uint64_t committed;   /* 0 sealed, 1 guest RAM is the epoch */
    uint32_t strategy;    /* cc_strategy.number: how its flush is replayed */
    uint32_t device_area; /* 0 or 1 */
    uint64_t device_bytes;
    uint64_t device_checksum;
    uint64_t flush_checksum; /* over the flush sets of all blocks; 0 once committed */
    uint64_t flush_pages;
    uint64_t committed_before;                      /* the epoch that was committed when this one was sealed; 0 = none */
    uint64_t n_blocks;                              /* of the table when it was sealed */
    uint64_t blocks[COLOCACHE_BLOCKS_MAX / 64];     /* bit n: of these, block n is in this epoch; without it, it was removed, for good */
    uint64_t attachment_bytes, attachment_checksum; /* the caller's words about what of the epoch lies elsewhere: only carried */
    uint32_t attachment_slot;                       /* 0 or 1 */
    uint32_t reserved1;
    uint64_t spill_pages, spill_bytes; /* of the flush set, in a spill file; 0 pages = none, and then all five are 0 */
    uint64_t spill_checksum;           /* over the bitmaps of spilled pages */
    uint64_t spill_device, spill_inode;
    uint64_t reserved[9];
    uint64_t checksum; /* of everything before it */
};

/* Numbers far apart: no turned bit makes one of them the other. */
enum cc_memory_mode { CC_MEMORY_MIRROR = 0x5a0f1e33, CC_MEMORY_BOUNDED = 0x25f0e14c };

/* A word marked W is a value with its check (word.h). */
struct cc_control {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t memory_mode; /* enum cc_memory_mode */
    uint64_t stamp;       /* cc_layout_stamp(): sizes and offsets of these structs */
    uint8_t history_id[16];
    uint64_t history_check;          /* cc_checksum of the id; means nothing before the first seal: a death may have come between them */
    uint64_t device_state_max_bytes; /* W; each area has room for it, rounded up to a page */
    int64_t owner_pid;               /* whoever took the lock last; nothing depends on it */
    uint64_t n_blocks;               /* W; stored (release) after its entry is complete */
    uint64_t reserved1[6];

    _Alignas(64) uint64_t receiving; /* W; newest epoch whose pages may be in the cache; stored before its first byte */
    uint64_t taken_over;             /* W; 1: this secondary is the machine the world sees */
    uint64_t reserved2[6];

    _Alignas(64) uint64_t commit_word; /* W; generation; its lowest bit names the valid record; 0 = none yet */
    uint64_t reserved3[7];

    _Alignas(128) struct cc_record records[2];
};

struct cc_image_identity {
    uint64_t device, inode; /* 0, 0: a block by address alone */
    uint64_t size_bytes;    /* of the file */
    uint64_t offset;        /* of the block in it */
};

struct cc_block_entry {
    char name[COLOCACHE_NAME_BYTES];
    uint64_t len_bytes;
    uint32_t page_size;
    uint32_t sparse;
    struct cc_image_identity guest, cache;
    uint64_t bitmap_offset; /* recomputed and compared, as is the next */
    uint64_t bitmap_bytes;  /* of the six parts together */
    uint64_t reserved[19];
    uint64_t checksum; /* of everything before it */
};

#define CC_TABLE_OFFSET CC_PAGE
#define CC_DEVICES_OFFSET (CC_TABLE_OFFSET + COLOCACHE_BLOCKS_MAX * sizeof(struct cc_block_entry))

_Static_assert(sizeof(struct cc_record) == 256, "a record is four cache lines");
_Static_assert(sizeof(struct cc_control) <= CC_PAGE, "the head fits its page");
_Static_assert(sizeof(struct cc_block_entry) == 512, "entries don't straddle pages");
_Static_assert(CC_DEVICES_OFFSET % CC_PAGE == 0, "device areas begin on a page");
_Static_assert(offsetof(struct cc_control, commit_word) % 64 == 0, "the commit word has a cache line of its own");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bitmaps and records are little-endian");
_Static_assert(sizeof(void *) == 8, "64-bit only");

/* A number that differs between builds whose structs differ: FNV over what the compiler made of them. */
static inline uint64_t cc_layout_stamp(void)
{
    const uint64_t facts[] = {
        CC_LAYOUT_VERSION,
        sizeof(struct cc_control),
        sizeof(struct cc_record),
        sizeof(struct cc_block_entry),
        _Alignof(struct cc_control),
        _Alignof(struct cc_record),
        offsetof(struct cc_control, receiving),
        offsetof(struct cc_control, commit_word),
        offsetof(struct cc_control, records),
        offsetof(struct cc_block_entry, guest),
        offsetof(struct cc_block_entry, bitmap_offset),
        COLOCACHE_BLOCKS_MAX,
    };
    uint64_t stamp = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++)
        stamp = (stamp ^ facts[i]) * 0x100000001b3ull;
    return stamp;
}

#endif
