/* SPDX-License-Identifier: Apache-2.0 */
/* sender.c: which pages it hands out, to a transport of the caller's own and as packets in memory, as blocks come and go. */
#include "sender_rig.h"

/* ---- marks while RECEIVED is handled: a page that is pending is unacked, always ------------------------------------- */

static uint32_t marker_stop;

static void *marker(void *arg)
{
    struct dice dice = {53};
    (void)arg;
    while (!__atomic_load_n(&marker_stop, __ATOMIC_ACQUIRE))
        CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, 0, below(&dice, 64), 1));
    return NULL;
}

static void marks_beside_received_lose_no_unacked_bit(void)
{
    pthread_t thread;
    begin();
    marker_stop = 0;
    REQUIRE(pthread_create(&thread, NULL, marker, NULL) == 0);
    for (int i = 0; i < 3000; i++) {
        struct colocache_run runs[64];
        uint32_t n_runs;
        CHECK_RC(0, colocache_sender_next(primary.sender, 0, 1, 0, runs, 64, &n_runs));
        CHECK_RC(0, colocache_sender_received(primary.sender));
        CHECK_RC(0, i % 100 ? 0 : colocache_sender_resend(primary.sender));
    }
    __atomic_store_n(&marker_stop, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    uint64_t pending = 0, unacked = 0, after = 0;
    CHECK_RC(0, colocache_sender_count(primary.sender, &pending, &unacked));
    CHECK(unacked >= pending);
    CHECK_RC(0, colocache_sender_received(primary.sender));
    CHECK_RC(0, colocache_sender_count(primary.sender, &pending, &after));
    CHECK_EQ(pending, after); /* exactly what was not sent stays */
    end();
}

/* ---- a transport of the caller's own ----------------------------------------------------------------------------------- */

/* take_runs -- pages that colocache_sender_next hands out, checked against the oracle and crossed off there; how many */
static uint64_t take_runs(uint32_t stripe, uint32_t n_stripes, uint64_t max_pages, uint32_t max_runs)
{
    struct colocache_run runs[16];
    uint32_t n_runs = 99;
    uint64_t n_pages = 0;
    CHECK_RC(0, colocache_sender_next(primary.sender, stripe, n_stripes, max_pages, runs, max_runs, &n_runs));
    REQUIRE(n_runs <= max_runs);
    for (uint32_t i = 0; i < n_runs; i++) {
        REQUIRE(runs[i].block < N_BLOCKS && runs[i].first_pfn + runs[i].n_pages <= blocks[runs[i].block]);
        CHECK(runs[i].addr == primary.ram[runs[i].block] + runs[i].first_pfn * 4096);
        for (uint64_t pfn = runs[i].first_pfn; pfn < runs[i].first_pfn + runs[i].n_pages; pfn++) {
            static const uint8_t zeros[4096];
            CHECK_EQ(1, primary.pending[runs[i].block][pfn]); /* pending, and handed out once */
            CHECK_EQ(pfn / 4096 % n_stripes, stripe);
            CHECK_EQ(memcmp(primary.ram[runs[i].block] + pfn * 4096, zeros, 4096) == 0, runs[i].zero);
            primary.pending[runs[i].block][pfn] = 0;
            n_pages++;
        }
    }
    CHECK(!max_pages || n_pages <= max_pages);
    return n_pages;
}

static void every_pending_page_is_handed_out_once(void)
{
    struct dice dice = {77};
    begin();
    for (uint64_t round = 0; round < 200; round++) {
        uint32_t n_stripes = 1 + (uint32_t)below(&dice, 3), done = 0;
        guest_writes(&dice, round);
        while (done != (1u << n_stripes) - 1) {
            uint32_t stripe = (uint32_t)below(&dice, n_stripes);
            uint64_t n_pages = take_runs(stripe, n_stripes, below(&dice, 2) ? 0 : 1 + below(&dice, 40), 1 + (uint32_t)below(&dice, 16));
            done |= n_pages ? 0 : 1u << stripe;
            counts_are_the_oracles();
        }
    }
    end();
}

static void a_run_that_was_not_delivered_is_pending_again(void)
{
    begin();
    struct colocache_run run;
    uint32_t n_runs;
    CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, 1, 500, 9));
    CHECK_RC(0, colocache_sender_next(primary.sender, 0, 1, 4, &run, 1, &n_runs));
    CHECK_EQ(1, n_runs);
    CHECK_EQ(4, run.n_pages);
    CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, run.block, run.first_pfn, run.n_pages));
    memset(primary.pending[1] + 500, 1, 9);
    memset(primary.unacked[1] + 500, 1, 9);
    counts_are_the_oracles();
    CHECK_EQ(9, take_runs(0, 1, 0, 16));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_next(primary.sender, 1, 1, 0, &run, 1, &n_runs));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_next(primary.sender, 0, 1, 0, &run, 0, &n_runs));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_next(primary.sender, 0, 1, 0, NULL, 1, &n_runs));
    end();
}

/* Rooms of every size, each exactly allocated: what is packed fits, arrives, and nothing is packed twice or left out. */
static void what_is_packed_into_memory_fits_and_arrives(void)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t total = 0, n_pages, used;
    struct colocache_send_result result = {.struct_size = sizeof result};
    begin();
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn++) {
            if (pfn % 3)
                rig_fill(primary.ram[b] + pfn * 4096, 4096, 3, b, pfn);
        }
    }
    CHECK_RC(0, colocache_sender_mark_all(primary.sender));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_sender_pack(primary.sender, header, sizeof header, 1, 0, 1, 0, &result));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_pack(primary.sender, NULL, 0, 1, 0, 1, 0, &result));
    for (uint64_t i = 0;; i++) {
        uint64_t n_bytes = 40 + 16 + 4096 + i * 977 % 100000;
        uint8_t *room = malloc(n_bytes);
        REQUIRE(room);
        CHECK_RC(0, colocache_sender_pack(primary.sender, room, n_bytes, 1, 0, 1, 0, &result));
        CHECK(result.n_bytes <= n_bytes);
        if (result.n_bytes == 0) {
            free(room);
            break;
        }
        CHECK_RC(COLOCACHE_READY_NOT, colocache_receive_packets(rig.cc, room, result.n_bytes, 1, header, &used, &n_pages));
        CHECK_EQ(result.n_bytes, used);
        CHECK_EQ(result.n_pages, n_pages);
        total += n_pages;
        free(room);
    }
    CHECK_EQ(blocks[0] + blocks[1], total);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        CHECK(memcmp(rig.blocks[b].cache, primary.ram[b], blocks[b] * 4096) == 0);
    end();
}

static void a_senders_arguments_are_checked(void)
{
    begin();
    uint64_t words[2] = {0, 1};
    uint32_t index = 9;
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_mark_dirty(primary.sender, 2, 0, 1));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sender_mark_dirty(primary.sender, 0, 300, 1));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sender_mark_dirty(primary.sender, 0, 299, ~0ull));
    CHECK_RC(COLOCACHE_E_TAIL, colocache_sender_sync_words(primary.sender, 0, 0, 63, (uint64_t[]){1ull << 63}));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sender_sync_words(primary.sender, 0, 200, 101, words));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_sync_words(primary.sender, 0, 0, 64, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_sync_dirty_log(primary.sender, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_mark_dirty(NULL, 0, 0, 1));
    CHECK(strstr(colocache_last_error(), "the sender is NULL"));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_send(primary.sender, pair[0], 0, 1, 0, 0, 0, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_send(primary.sender, pair[0], 0, 1, 3, 3, 0, NULL));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_sender_send(primary.sender, pair[0], 0, 0, 0, 1, 0, NULL));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_sender_send(primary.sender, pair[0], 0, COLOCACHE_EPOCH_MAX + 1, 0, 1, 0, NULL));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_add_block(primary.sender, "boot", primary.ram[0], 4096, 4096, &index));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_add_block(primary.sender, "", primary.ram[0], 4096, 4096, &index));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_add_block(primary.sender, "x", NULL, 4096, 4096, &index));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_sender_add_block(primary.sender, "x", primary.ram[0], 4095, 4096, &index));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_sender_add_block(primary.sender, "x", primary.ram[0], 0, 4096, &index));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_sender_add_block(primary.sender, "x", primary.ram[0], 4096, 1024, &index));
    CHECK_EQ(9, index);
    counts_are_the_oracles();
    CHECK_RC(0, colocache_sender_send(primary.sender, pair[0], 0, 1, 0, 1, 0, NULL)); /* nothing is pending */
    end();
}

/* Before the first page the caller says what is to be sent; later it is everything, as the peer has nothing of the block. */
static void all_of_a_block_that_comes_late_is_sent(void)
{
    static uint8_t late[3][4096] = {{1}, {0}, {3}};
    uint64_t pending, unacked;
    struct colocache_run runs[8];
    uint32_t n_runs, index = 9;
    begin();
    CHECK_RC(0, colocache_sender_add_block(primary.sender, "early", late, sizeof late, 4096, &index));
    CHECK_EQ(N_BLOCKS, index);
    counts_are_the_oracles();
    CHECK_RC(0, colocache_sender_next(primary.sender, 0, 1, 0, runs, 8, &n_runs));
    CHECK_EQ(0, n_runs);
    CHECK_RC(0, colocache_sender_add_block(primary.sender, "late", late, sizeof late, 4096, &index));
    CHECK_EQ(N_BLOCKS + 1, index);
    CHECK_RC(0, colocache_sender_count(primary.sender, &pending, &unacked));
    CHECK_EQ(3, pending);
    CHECK_EQ(3, unacked);
    CHECK_RC(0, colocache_sender_next(primary.sender, 0, 1, 0, runs, 8, &n_runs));
    CHECK_EQ(3, n_runs);
    for (uint32_t i = 0; i < n_runs; i++)
        CHECK(runs[i].block == index && runs[i].first_pfn == i && runs[i].zero == (i == 1) && runs[i].addr == late[i]);
    CHECK_RC(0, colocache_sender_received(primary.sender));
    CHECK_RC(0, colocache_sender_count(primary.sender, &pending, &unacked));
    CHECK_EQ(0, pending + unacked);
    end();
}

/* From then on its memory may be unmapped: a page of it that was pending would be a death of the primary. */
static void nothing_of_a_block_that_was_removed_is_sent(void)
{
    uint64_t pending, unacked;
    struct colocache_run runs[8];
    uint32_t n_runs, index = 9;
    const uint64_t word = 1;
    uint8_t *gone = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(gone != MAP_FAILED);
    begin();
    CHECK_RC(0, colocache_sender_add_block(primary.sender, "dimm", gone, 3 * 4096, 4096, &index));
    CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, index, 1, 2));
    CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, 0, 7, 1));
    CHECK_RC(0, colocache_sender_remove_block(primary.sender, index));
    munmap(gone, 3 * 4096);
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_remove_block(primary.sender, index));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_remove_block(primary.sender, index + 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_mark_dirty(primary.sender, index, 0, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_sync_words(primary.sender, index, 0, 1, &word));
    CHECK_RC(0, colocache_sender_count(primary.sender, &pending, &unacked));
    CHECK_EQ(1, pending);
    CHECK_EQ(1, unacked);
    CHECK_RC(0, colocache_sender_resend(primary.sender));
    CHECK_RC(0, colocache_sender_next(primary.sender, 0, 1, 0, runs, 8, &n_runs));
    CHECK(n_runs == 1 && runs[0].block == 0 && runs[0].first_pfn == 7);
    CHECK_RC(0, colocache_sender_received(primary.sender));
    CHECK_RC(0, colocache_sender_add_block(primary.sender, "dimm", primary.ram[0], 4096, 4096, &index)); /* the name, not the index */
    CHECK_EQ(N_BLOCKS + 1, index);
    CHECK_RC(0, colocache_sender_next(primary.sender, 0, 1, 0, runs, 8, &n_runs));
    CHECK(n_runs == 1 && runs[0].block == index);
    end();
}

int main(void)
{
    RUN(marks_beside_received_lose_no_unacked_bit);
    RUN(every_pending_page_is_handed_out_once);
    RUN(a_run_that_was_not_delivered_is_pending_again);
    RUN(what_is_packed_into_memory_fits_and_arrives);
    RUN(a_senders_arguments_are_checked);
    RUN(all_of_a_block_that_comes_late_is_sent);
    RUN(nothing_of_a_block_that_was_removed_is_sent);
    return DONE();
}
