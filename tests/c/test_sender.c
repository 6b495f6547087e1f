/* SPDX-License-Identifier: Apache-2.0 */
/* sender.c, and the whole way of a page: from the primary's RAM over a socket into the cache, by the oracle. */
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

struct receiving {
    int fd, rc;
    uint64_t epoch, n_pages;
};

static void *receive(void *arg)
{
    struct receiving *receiving = arg;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    receiving->rc = colocache_receive_stream(rig.cc, receiving->fd, 20000, receiving->epoch, header, &receiving->n_pages);
    return NULL;
}

static void end_mark(int fd, uint64_t epoch)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    CHECK_RC(0, colocache_message_header(header, 1, epoch, 0, 0, 0));
    REQUIRE(write(fd, header, sizeof header) == sizeof header);
}

/* sent -- the oracle of a send of everything: the pages travel as they are now */
static uint64_t sent(bool all)
{
    uint64_t n = 0;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn++) {
            if (!primary.pending[b][pfn])
                continue;
            n++;
            memcpy(rig.blocks[b].cache_oracle + pfn * 4096, primary.ram[b] + pfn * 4096, 4096);
            rig.blocks[b].pvm[pfn] = 1;
            if (all)
                primary.pending[b][pfn] = 0;
        }
    }
    return n;
}

static void send_epoch(uint64_t epoch, uint64_t max_pages)
{
    pthread_t thread;
    struct receiving receiving = {.fd = pair[1], .epoch = epoch};
    REQUIRE(pthread_create(&thread, NULL, receive, &receiving) == 0);
    uint64_t expected = sent(true), total = 0, zero = 0;
    for (;;) {
        struct colocache_send_result result = {.struct_size = sizeof result};
        CHECK_RC(0, colocache_sender_send(primary.sender, pair[0], 20000, epoch, 0, 1, max_pages, &result));
        CHECK(max_pages == 0 || result.n_pages <= max_pages);
        CHECK(result.n_zero <= result.n_pages);
        CHECK(result.n_bytes >= (result.n_pages - result.n_zero) * 4096);
        total += result.n_pages;
        zero += result.n_zero;
        if (max_pages == 0 || result.n_pages == 0)
            break;
    }
    end_mark(pair[0], epoch);
    pthread_join(thread, NULL);
    CHECK_EQ(0, receiving.rc);
    CHECK_EQ(expected, total);
    CHECK_EQ(expected, receiving.n_pages);
    CHECK(zero <= total);
}

static void random_epochs_arrive_as_they_were_sent(void)
{
    struct dice dice = {51};
    begin();
    CHECK_RC(0, colocache_sender_mark_all(primary.sender));
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        memset(primary.pending[b], 1, 2 * blocks[b]);
    counts_are_the_oracles();
    for (uint64_t epoch = 1; epoch <= 10; epoch++) {
        guest_writes(&dice, epoch);
        send_epoch(epoch, epoch % 2 ? 0 : 37);
        counts_are_the_oracles();
        rig_guest_write(&rig, 1, below(&dice, blocks[1]), epoch + 100);
        rig_check(&rig, epoch > 1);
        rig_checkpoint(&rig, epoch, 0);
        rig_check(&rig, true);
        for (uint32_t b = 0; b < N_BLOCKS; b++)
            CHECK(memcmp(rig.blocks[b].guest, primary.ram[b], blocks[b] * 4096) == 0); /* the secondary is the primary */
        CHECK_RC(0, colocache_sender_received(primary.sender));
        for (uint32_t b = 0; b < N_BLOCKS; b++)
            memset(primary.unacked[b], 0, blocks[b]);
        counts_are_the_oracles();
    }
    end();
}

static void an_aborted_epoch_is_sent_again(void)
{
    struct dice dice = {52};
    begin();
    guest_writes(&dice, 1);
    send_epoch(1, 0);
    CHECK_RC(0, colocache_abort(rig.cc, 1, "test"));
    CHECK_RC(0, colocache_sender_resend(primary.sender));
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn++)
            primary.pending[b][pfn] |= primary.unacked[b][pfn];
    }
    guest_writes(&dice, 2);
    send_epoch(2, 0);
    rig_checkpoint(&rig, 2, 0);
    rig_check(&rig, true);
    /* a page marked after the last send stays unacked through RECEIVED: it was not in the epoch */
    CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, 1, 64, 3));
    memset(primary.pending[1] + 64, 1, 3);
    CHECK_RC(0, colocache_sender_received(primary.sender));
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        memcpy(primary.unacked[b], primary.pending[b], blocks[b]);
    counts_are_the_oracles();
    end();
}

/* ---- several streams ------------------------------------------------------------------------------------------- */

#define STRIPES 3u

struct sending {
    int fd;
    uint32_t stripe;
    uint64_t n_pages;
};

static void *send_stripe(void *arg)
{
    struct sending *sending = arg;
    struct colocache_send_result result = {.struct_size = sizeof result};
    CHECK_RC(0, colocache_sender_send(primary.sender, sending->fd, 20000, 1, sending->stripe, STRIPES, 0, &result));
    sending->n_pages = result.n_pages;
    end_mark(sending->fd, 1);
    return NULL;
}

static void stripes_together_send_everything_once(void)
{
    pthread_t receivers[STRIPES], senders[STRIPES];
    struct receiving receiving[STRIPES];
    struct sending sending[STRIPES];
    int pairs[STRIPES][2];
    begin();
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn += 3)
            rig_fill(primary.ram[b] + pfn * 4096, 4096, 1, b, pfn);
        memset(primary.pending[b], 1, 2 * blocks[b]);
    }
    CHECK_RC(0, colocache_sender_mark_all(primary.sender));
    uint64_t expected = sent(true), total = 0;
    for (uint32_t i = 0; i < STRIPES; i++) {
        REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pairs[i]) == 0);
        receiving[i] = (struct receiving){.fd = pairs[i][1], .epoch = 1};
        sending[i] = (struct sending){.fd = pairs[i][0], .stripe = i};
        REQUIRE(pthread_create(&receivers[i], NULL, receive, &receiving[i]) == 0);
        REQUIRE(pthread_create(&senders[i], NULL, send_stripe, &sending[i]) == 0);
    }
    for (uint32_t i = 0; i < STRIPES; i++) {
        pthread_join(senders[i], NULL);
        pthread_join(receivers[i], NULL);
        CHECK_EQ(0, receiving[i].rc);
        CHECK_EQ(sending[i].n_pages, receiving[i].n_pages);
        total += sending[i].n_pages;
        close(pairs[i][0]);
        close(pairs[i][1]);
    }
    CHECK_EQ(expected, total);
    counts_are_the_oracles();
    rig_checkpoint(&rig, 1, 0);
    rig_check(&rig, true);
    end();
}

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

/* ---- errors -------------------------------------------------------------------------------------------------------------- */

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

static void a_lost_or_silent_peer_ends_the_send(void)
{
    begin();
    CHECK_RC(0, colocache_sender_mark_all(primary.sender));
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        memset(primary.ram[b], 0x55, blocks[b] * 4096);
    struct colocache_send_result result = {.struct_size = sizeof result};
    CHECK_RC(COLOCACHE_E_TIMEOUT, colocache_sender_send(primary.sender, pair[0], 20, 1, 0, 1, 0, &result)); /* nobody reads */
    const uint64_t in_socket = result.n_pages;                                                              /* whole packets */
    close(pair[1]);
    CHECK_RC(COLOCACHE_E_PEER_LOST, colocache_sender_send(primary.sender, pair[0], 20, 1, 0, 1, 0, &result));
    uint64_t pending = 0, unacked = 0;
    CHECK_RC(0, colocache_sender_count(primary.sender, &pending, &unacked));
    CHECK_EQ(0, result.n_pages);
    CHECK_EQ(9300 - in_socket, pending); /* what was not handed over whole is pending as before */
    CHECK_EQ(9300, unacked);             /* so a reconnection sends everything */
    CHECK_RC(-EBADF, colocache_sender_send(primary.sender, -1, 20, 1, 0, 1, 0, NULL));
    pair[1] = open("/dev/null", O_RDONLY | O_CLOEXEC);
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
    RUN(random_epochs_arrive_as_they_were_sent);
    RUN(an_aborted_epoch_is_sent_again);
    RUN(stripes_together_send_everything_once);
    RUN(marks_beside_received_lose_no_unacked_bit);
    RUN(every_pending_page_is_handed_out_once);
    RUN(a_run_that_was_not_delivered_is_pending_again);
    RUN(what_is_packed_into_memory_fits_and_arrives);
    RUN(a_lost_or_silent_peer_ends_the_send);
    RUN(a_senders_arguments_are_checked);
    RUN(all_of_a_block_that_comes_late_is_sent);
    RUN(nothing_of_a_block_that_was_removed_is_sent);
    return DONE();
}
