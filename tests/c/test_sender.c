/* SPDX-License-Identifier: Apache-2.0 */
/* sender.c, and the whole way of a page: from the primary's RAM over a socket into the cache, by the oracle. */
#include "sender_rig.h"

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

static void *send_all(void *arg)
{
    struct colocache_send_result *result = arg;
    CHECK_RC(0, colocache_sender_send(primary.sender, pair[0], 20000, 1, 0, 1, 0, result));
    end_mark(pair[0], 1);
    return NULL;
}

/* The peer takes in what has come while the sender looks for more: so much is sent at once, and no more, and zeros count as nothing. */
static void a_socket_gets_packets_of_half_a_mebibyte(void)
{
    pthread_t thread;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct colocache_send_result result = {.struct_size = sizeof result};
    uint64_t n_pages;
    begin();
    memset(primary.ram[1], 5, 300 * 4096); /* and 60 pages of zeros after them */
    CHECK_RC(0, colocache_sender_mark_dirty(primary.sender, 1, 0, 360));
    REQUIRE(pthread_create(&thread, NULL, send_all, &result) == 0);
    CHECK_RC(0, colocache_receive_stream(rig.cc, pair[1], 20000, 1, header, &n_pages));
    pthread_join(thread, NULL);
    CHECK_EQ(360, n_pages);
    CHECK_EQ(3, result.n_packets);
    CHECK_EQ(60, result.n_zero);
    for (uint64_t pfn = 0; pfn < 360; pfn++)
        CHECK(memcmp(rig.blocks[1].cache + pfn * 4096, primary.ram[1] + pfn * 4096, 4096) == 0);
    end();
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

int main(void)
{
    RUN(random_epochs_arrive_as_they_were_sent);
    RUN(a_socket_gets_packets_of_half_a_mebibyte);
    RUN(an_aborted_epoch_is_sent_again);
    RUN(stripes_together_send_everything_once);
    RUN(a_lost_or_silent_peer_ends_the_send);
    return DONE();
}
