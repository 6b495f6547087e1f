/* SPDX-License-Identifier: Apache-2.0 */
/* dirty_log.c: words at any page, marks, a lost log; and a source of the test's own, to see what is asked of sources and in which order. */
#include "rig.h"

#define _GNU_SOURCE
#include "source.h"

static const uint64_t blocks[] = {200, 4097};

static void words_land_at_any_page(void)
{
    struct rig rig;
    struct dice dice = {61};
    rig_open(&rig, 2, blocks, 4096, false);
    for (int i = 0; i < 400; i++) {
        uint32_t b = (uint32_t)below(&dice, 2);
        uint64_t first = below(&dice, blocks[b]), room = blocks[b] - first, n = 1 + below(&dice, room < 500 ? room : 500);
        uint64_t words[8] = {0};
        for (uint64_t bit = 0; bit < n; bit++) {
            if (below(&dice, 20) == 0) {
                words[bit / 64] |= 1ull << (bit % 64);
                rig.blocks[b].svm[first + bit] = 1;
            }
        }
        CHECK_RC(0, colocache_sync_words(rig.cc, b, first, n, words));
        if (i % 50 == 0)
            rig_check(&rig, false);
    }
    rig_check(&rig, false);
    rig_close(&rig);
}

/* A block behind two KVM slots, split at a page that is no multiple of 64: the last word of each slot is only half its own. */
static void two_slots_split_at_an_odd_page(void)
{
    struct rig rig;
    rig_open(&rig, 1, blocks, 4096, false);
    const uint64_t low[] = {0x8000000000000001ull, 0b1}, high[] = {0b11, 0, 0b100}; /* pages 0, 63, 64 | 65, 66, 195 */
    CHECK_RC(0, colocache_sync_words(rig.cc, 0, 0, 65, low));
    CHECK_RC(0, colocache_sync_words(rig.cc, 0, 65, 135, high));
    const uint64_t expected[] = {0, 63, 64, 65, 66, 195};
    for (int i = 0; i < 6; i++)
        rig.blocks[0].svm[expected[i]] = 1;
    rig_check(&rig, false);
    rig_close(&rig);
}

static void marks_set_exactly_their_pages(void)
{
    struct rig rig;
    struct dice dice = {62};
    rig_open(&rig, 2, blocks, 4096, false);
    for (int i = 0; i < 100; i++) {
        uint32_t b = (uint32_t)below(&dice, 2);
        uint64_t first = below(&dice, blocks[b]), n = below(&dice, blocks[b] - first + 1) % 70;
        CHECK_RC(0, colocache_mark_dirty(rig.cc, b, first, n));
        memset(rig.blocks[b].svm + first, 1, n);
    }
    rig_check(&rig, false);
    rig_close(&rig);
}

static void wrong_words_and_marks_set_nothing(void)
{
    struct rig rig;
    rig_open(&rig, 2, blocks, 4096, false);
    const uint64_t words[4] = {~0ull, ~0ull, ~0ull, ~0ull}, tail[4] = {0, 0, 0, 1ull << 8}; /* page 200 of 200 */
    CHECK_RC(COLOCACHE_E_TAIL, colocache_sync_words(rig.cc, 0, 0, 200, tail));
    CHECK_RC(COLOCACHE_E_TAIL, colocache_sync_words(rig.cc, 0, 5, 63, words));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sync_words(rig.cc, 0, 137, 64, words));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sync_words(rig.cc, 0, 200, 0, words));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sync_words(rig.cc, 0, 1, ~0ull, words));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sync_words(rig.cc, 2, 0, 64, words));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sync_words(rig.cc, 0, 0, 64, NULL));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_mark_dirty(rig.cc, 0, 199, 2));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_mark_dirty(rig.cc, 0, ~0ull, 2));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_mark_dirty(rig.cc, 9, 0, 1));
    CHECK_RC(0, colocache_sync_words(rig.cc, 0, 136, 64, (const uint64_t[]){0})); /* no bits: nothing is set */
    rig_check(&rig, false);
    rig_close(&rig);
}

static void a_lost_log_counts_as_all_ones(void)
{
    struct rig rig;
    rig_open(&rig, 2, blocks, 4096, false);
    CHECK_RC(0, colocache_dirty_log_lost(rig.cc));
    for (uint32_t b = 0; b < 2; b++)
        memset(rig.blocks[b].svm, 1, blocks[b]);
    rig_check(&rig, false);
    rig_receive(&rig, 1, 0, 199, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

/* ---- a log of the test's own ------------------------------------------------------------------------------------ */

struct own_log {
    struct colocache_source base;
    uint64_t words[4];
    int fails_with, closed;
};

static int own_sync(struct colocache_source *source, cc_take_fn *take, void *context)
{
    struct own_log *log = (struct own_log *)source;
    if (log->fails_with)
        return log->fails_with;
    int rc = take(context, 0, 0, 200, log->words);
    if (rc == 0)
        memset(log->words, 0, sizeof log->words);
    return rc;
}

static void own_close(struct colocache_source *source)
{
    ((struct own_log *)source)->closed++;
}

static void a_source_is_synced_thrown_away_and_closed(void)
{
    struct rig rig;
    struct own_log log = {.base = {.sync = own_sync, .close = own_close}, .words = {0b1010, 0, 0, 1ull << 7}};
    rig_open(&rig, 2, blocks, 4096, false);
    CHECK_RC(0, colocache_source_discard(&log.base)); /* before the VM first runs */
    rig_check(&rig, false);
    CHECK_EQ(0, log.words[0] | log.words[3]);
    log.words[0] = 0b1010;
    log.words[3] = 1ull << 7;
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, &log.base));
    CHECK_EQ(0, log.words[0] | log.words[3]);
    rig.blocks[0].svm[1] = rig.blocks[0].svm[3] = rig.blocks[0].svm[199] = 1;
    rig_check(&rig, false);
    log.words[3] = 1ull << 8; /* page 200: refused, and the log is not cleared */
    CHECK_RC(COLOCACHE_E_TAIL, colocache_sync_dirty_log(rig.cc, &log.base));
    CHECK_EQ(1ull << 8, log.words[3]);
    log.fails_with = COLOCACHE_E_LOG_LOST;
    CHECK(colocache_sync_dirty_log(rig.cc, &log.base) == COLOCACHE_E_LOG_LOST);
    rig_check(&rig, false);
    CHECK_RC(0, colocache_source_close(&log.base));
    CHECK_EQ(1, log.closed);
    rig_close(&rig);
}

/* A log has a bit per 4096 bytes; in a block of larger pages bit n is not page n, and pages would stay wrong in silence. */
static void a_log_is_refused_by_a_block_of_larger_pages(void)
{
    struct rig rig;
    struct own_log log = {.base = {.sync = own_sync, .close = own_close}, .words = {0b1010}};
    rig_open(&rig, 2, blocks, 8192, false);
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_sync_dirty_log(rig.cc, &log.base));
    CHECK_EQ(0b1010, log.words[0]); /* still in the log */
    rig_check(&rig, false);
    const uint64_t own_words[4] = {0b100};
    CHECK_RC(0, colocache_sync_words(rig.cc, 0, 0, 200, own_words)); /* a caller's own, in the block's pages */
    rig.blocks[0].svm[2] = 1;
    rig_check(&rig, false);

    struct colocache_sender *sender;
    uint64_t pending = 99, unacked = 99;
    CHECK_RC(0, colocache_sender_create(&sender));
    CHECK_RC(0, colocache_sender_add_block(sender, "ram", rig.blocks[0].guest, 200 * 8192, 8192, NULL));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_sender_sync_dirty_log(sender, &log.base));
    CHECK_RC(0, colocache_sender_count(sender, &pending, &unacked));
    CHECK_EQ(0, pending + unacked);
    CHECK_RC(0, colocache_sender_close(sender));
    rig_close(&rig);
}

int main(void)
{
    RUN(words_land_at_any_page);
    RUN(two_slots_split_at_an_odd_page);
    RUN(marks_set_exactly_their_pages);
    RUN(wrong_words_and_marks_set_nothing);
    RUN(a_lost_log_counts_as_all_ones);
    RUN(a_source_is_synced_thrown_away_and_closed);
    RUN(a_log_is_refused_by_a_block_of_larger_pages);
    return DONE();
}
