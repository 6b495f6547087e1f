/* SPDX-License-Identifier: Apache-2.0 */
/* block_change_rig.h -- a secondary of two blocks to which others come and from which some go, and threads that work meanwhile. */
#ifndef BLOCK_CHANGE_RIG_H
#define BLOCK_CHANGE_RIG_H

#include "rig.h"

#include <pthread.h>

static struct rig rig;
static const uint64_t n_pages[] = {100, 7, 130, 65};

/* add -- the next block of the rig, with the oracle's expectation of a block that comes late: all of it counts as written */
static void add(const char *name, bool sparse)
{
    const uint32_t b = rig.n_blocks++;
    struct rig_block *block = &rig.blocks[b];
    uint32_t index = 99;
    rig_block_init(block, name, n_pages[b], 4096, sparse);
    struct colocache_images images = rig_images(block);
    CHECK_RC(0, colocache_add_block(rig.cc, &images, &index));
    CHECK_EQ(b, index);
    if (!sparse)
        memset(block->svm, 1, block->n_pages);
    rig_view(&rig);
}

/* begin -- two blocks, and epoch 1 committed */
static void begin(void)
{
    rig_open(&rig, 2, n_pages, 4096, false);
    rig_receive(&rig, 1, 0, 5, 1);
    rig_receive(&rig, 1, 1, 6, 1);
    rig_checkpoint(&rig, 1, 10);
}

static bool said(const char *words)
{
    if (strstr(colocache_last_error(), words))
        return true;
    printf("    said: %s\n", colocache_last_error());
    return false;
}

/* One thread marks, the other receives; both look at the status. */
static struct other {
    pthread_t thread;
    bool receives, may_go;
    uint32_t n_of_last; /* calls that named the last block to come and were answered with 0 */
    uint32_t stop;
} others[2];

static void *work(void *context)
{
    struct other *mine = context;
    const uint8_t page[4096] = {1};
    for (uint32_t b = 0; !__atomic_load_n(&mine->stop, __ATOMIC_ACQUIRE); b = (b + 1) % 4) {
        struct colocache_status status = {.struct_size = sizeof status};
        int rc = mine->receives ? colocache_receive_page(rig.cc, 2, b, 1, page, 4096) : colocache_mark_dirty(rig.cc, b, 0, 1);
        bool fine =
            rc == 0 || (rc == COLOCACHE_E_BLOCK && b >= 2) || (mine->may_go && (rc == COLOCACHE_E_SEALED || rc == COLOCACHE_E_EPOCH));
        if (!fine)
            CHECK_SAY("block %u gave %d (%s)", b, rc, colocache_last_error());
        CHECK_RC(0, colocache_get_status(rig.cc, &status));
        if (rc == 0 && b == 3)
            __atomic_fetch_add(&mine->n_of_last, 1, __ATOMIC_RELEASE);
    }
    return NULL;
}

#endif
