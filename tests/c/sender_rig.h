/* SPDX-License-Identifier: Apache-2.0 */
/* sender_rig.h -- a primary's RAM and its sender, beside an oracle of one byte per page, and a secondary at a socket. */
#ifndef SENDER_RIG_H
#define SENDER_RIG_H

#include "rig.h"

#include <pthread.h>

static const uint64_t blocks[] = {300, 9000};
#define N_BLOCKS 2u

struct primary { /* the primary's RAM, and what its sender must hold: one byte per page */
    struct colocache_sender *sender;
    uint8_t *ram[N_BLOCKS];
    uint8_t *pending[N_BLOCKS], *unacked[N_BLOCKS];
};

static struct primary primary;
static struct rig rig;
static int pair[2];

static void begin(void)
{
    rig_open(&rig, N_BLOCKS, blocks, 4096, false);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    REQUIRE(colocache_sender_create(&primary.sender) == 0);
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        uint32_t index = 9;
        primary.ram[b] = aligned_alloc(4096, blocks[b] * 4096);
        primary.pending[b] = calloc(2, blocks[b]);
        REQUIRE(primary.ram[b] && primary.pending[b]);
        memset(primary.ram[b], 0, blocks[b] * 4096);
        primary.unacked[b] = primary.pending[b] + blocks[b];
        CHECK_RC(0, colocache_sender_add_block(primary.sender, b ? "boot" : "pc.ram", primary.ram[b], blocks[b] * 4096, 4096, &index));
        CHECK_EQ(b, index);
    }
}

static void end(void)
{
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        free(primary.ram[b]);
        free(primary.pending[b]);
    }
    colocache_sender_close(primary.sender);
    close(pair[0]);
    close(pair[1]);
    rig_close(&rig);
}

static void counts_are_the_oracles(void)
{
    uint64_t pending = 0, unacked = 0, found_pending, found_unacked;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn++) {
            pending += primary.pending[b][pfn];
            unacked += primary.unacked[b][pfn];
        }
    }
    CHECK_RC(0, colocache_sender_count(primary.sender, &found_pending, &found_unacked));
    CHECK_EQ(pending, found_pending);
    CHECK_EQ(unacked, found_unacked);
}

/* guest_writes -- the primary's guest writes pages (some of them with zeros) and its log, as words at some offset, tells */
static void guest_writes(struct dice *dice, uint64_t salt)
{
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        uint64_t first = below(dice, blocks[b] - 130), n = 1 + below(dice, 130), words[3] = {0};
        for (uint64_t i = 0; i < n; i++) {
            if (below(dice, 3))
                continue;
            uint8_t *page = primary.ram[b] + (first + i) * 4096;
            if (below(dice, 4) == 0)
                memset(page, 0, 4096);
            else
                rig_fill(page, 4096, salt, b, first + i);
            words[i / 64] |= 1ull << (i % 64);
            primary.pending[b][first + i] = primary.unacked[b][first + i] = 1;
        }
        CHECK_RC(0, colocache_sender_sync_words(primary.sender, b, first, n, words));
        uint64_t pfn = below(dice, blocks[b]);
        rig_fill(primary.ram[b] + pfn * 4096, 4096, salt + 1, b, pfn);
        CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, b, pfn, 1));
        primary.pending[b][pfn] = primary.unacked[b][pfn] = 1;
    }
    counts_are_the_oracles();
}

#endif
