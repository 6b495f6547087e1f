/* SPDX-License-Identifier: Apache-2.0 */
/* test_sparse.c -- what a sparse guest does not use takes no memory, and what it gives back is its host's again. */
#include "rig.h"

#include <pthread.h>

enum { PAGES = 16384, USED = 1024 }; /* 64 MiB, of which the guest uses 4 */

static const uint64_t all_pages[] = {PAGES};
static struct rig rig;

static uint64_t taken(int fd)
{
    struct stat st;
    REQUIRE(fstat(fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512 / 4096;
}

/* takes -- so many pages in each image */
static void takes(uint64_t guest, uint64_t cache)
{
    CHECK_EQ(guest, taken(rig.blocks[0].guest_fd));
    CHECK_EQ(cache, taken(rig.blocks[0].cache_fd));
}

static bool file_is(int fd, uint64_t pfn, const uint8_t *oracle)
{
    uint8_t page[4096]; /* by pread, as a look through a mapping fills a hole */
    REQUIRE(pread(fd, page, sizeof page, (off_t)(pfn * 4096)) == sizeof page);
    return memcmp(page, oracle + pfn * 4096, 4096) == 0;
}

static void check_files(void)
{
    const struct rig_block *block = &rig.blocks[0];
    for (uint64_t pfn = 0; pfn < block->n_pages; pfn++) {
        if (!file_is(block->guest_fd, pfn, block->guest_oracle) || !file_is(block->cache_fd, pfn, block->cache_oracle)) {
            CHECK_SAY("page %llu is wrong in guest RAM or cache", (unsigned long long)pfn);
            break;
        }
    }
    CHECK_RC(0, colocache_validate(rig.cc, 1));
}

static void give_back(uint64_t pfn, uint64_t n)
{
    struct rig_block *block = &rig.blocks[0];
    CHECK_RC(0, colocache_give_back(rig.cc, 0, pfn, n));
    memset(block->svm + pfn, 1, n);
    memset(block->guest_oracle + pfn * 4096, 0, n * 4096);
}

enum way { BY_CALL, BY_STREAM, BY_PACKETS, WAYS };

struct sending {
    struct colocache_sender *sender;
    int fd;
};

static void *send_to_socket(void *context)
{
    struct sending *sending = context;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    CHECK_RC(0, colocache_sender_send(sending->sender, sending->fd, 10000, 1, 0, 1, 0, NULL));
    colocache_message_header(header, 1, 1, 0, 0, 0);
    CHECK_EQ((long long)sizeof header, send(sending->fd, header, sizeof header, 0));
    return NULL;
}

static void by_stream(struct colocache_sender *sender)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    struct sending sending = {.sender = sender};
    pthread_t thread;
    uint64_t came = 0;
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    sending.fd = pair[0];
    REQUIRE(pthread_create(&thread, NULL, send_to_socket, &sending) == 0);
    CHECK_RC(0, colocache_receive_stream(rig.cc, pair[1], 10000, 1, header, &came));
    pthread_join(thread, NULL);
    CHECK_EQ(PAGES, came);
    close(pair[0]);
    close(pair[1]);
}

static void by_packets(struct colocache_sender *sender)
{
    const uint64_t room_bytes = 1 << 20;
    uint8_t *room = malloc(room_bytes), header[COLOCACHE_HEADER_BYTES];
    uint64_t came = 0, used, n;
    struct colocache_send_result result;
    REQUIRE(room != NULL);
    for (;;) {
        result = (struct colocache_send_result){.struct_size = sizeof result};
        CHECK_RC(0, colocache_sender_pack(sender, room, room_bytes, 1, 0, 1, 0, &result));
        if (result.n_bytes == 0 || check_broken)
            break;
        CHECK_RC(COLOCACHE_READY_NOT, colocache_receive_packets(rig.cc, room, result.n_bytes, 1, header, &used, &n));
        CHECK_EQ(result.n_bytes, used);
        came += n;
    }
    CHECK_EQ(PAGES, came);
    free(room);
}

/* send_all -- a primary's memory, of which all but the first USED pages are zeros */
static void send_all(enum way way)
{
    struct rig_block *block = &rig.blocks[0];
    struct colocache_sender *sender;
    memset(block->cache_oracle, 0, rig_len(block));
    for (uint64_t pfn = 0; pfn < USED; pfn++)
        rig_fill(block->cache_oracle + pfn * 4096, 4096, 1, 0, pfn);
    memset(block->pvm, 1, block->n_pages);
    if (way == BY_CALL) {
        for (uint64_t pfn = 0; pfn < USED; pfn++)
            rig_receive(&rig, 1, 0, pfn, 1);
        rig_receive_zero(&rig, 1, 0, USED, PAGES - USED);
        return;
    }
    REQUIRE(colocache_sender_create(&sender) == 0);
    REQUIRE(colocache_sender_add_block(sender, block->name, block->cache_oracle, rig_len(block), 4096, NULL) == 0);
    CHECK_RC(0, colocache_sender_mark_all(sender));
    (way == BY_STREAM ? by_stream : by_packets)(sender);
    colocache_sender_close(sender);
}

static void preflush(void)
{
    CHECK_RC(0, colocache_preflush(rig.cc, NULL));
    rig_flushed(&rig);
    memset(rig.blocks[0].pvm, 0, PAGES);
    memcpy(rig.blocks[0].guest_oracle, rig.blocks[0].cache_oracle, rig_len(&rig.blocks[0]));
}

static void a_guest_that_uses_4_of_64_MiB_takes_4_in_each_image_whichever_way_it_comes(void)
{
    for (enum way way = 0; way < WAYS; way++) {
        for (int early = 0; early < 2; early++) {
            rig_open(&rig, 1, all_pages, 4096, true);
            send_all(way);
            takes(USED, USED); /* guest RAM's too: the flush can't meet a full machine */
            if (early)
                preflush();
            takes(USED, USED);
            rig_checkpoint(&rig, 1, 10);
            takes(USED, USED);
            check_files();
            rig_die(&rig);
            CHECK_RC(0, rig_attach(&rig));
            CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
            takes(USED, USED);
            check_files();
            rig_close(&rig);
        }
    }
}

static void an_initial_copy_that_starts_again_leaves_nothing_of_the_one_before(void)
{
    rig_open(&rig, 1, all_pages, 4096, true);
    for (uint64_t pfn = 0; pfn < 100; pfn++)
        rig_receive(&rig, 1, 0, pfn + 5000, 3);
    preflush();
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_NOTHING, rig.report.action);
    rig_receive_zero(&rig, 2, 0, 0, PAGES);
    preflush();
    takes(0, 0);
    rig_receive(&rig, 2, 0, 7, 2); /* it came, it was copied, and it came as zeros */
    preflush();
    rig_receive_zero(&rig, 2, 0, 7, 1);
    rig_checkpoint(&rig, 2, 0);
    check_files();
    rig_close(&rig);
}

static void what_the_primary_gives_back_comes_back_in_both_images(void)
{
    rig_open(&rig, 1, all_pages, 4096, true);
    send_all(BY_CALL);
    rig_checkpoint(&rig, 1, 0);
    rig_receive_zero(&rig, 2, 0, 100, 200);
    takes(USED, USED - 200);
    rig_guest_write(&rig, 0, 9000, 5); /* the SVM's own, where the primary has nothing */
    takes(USED + 1, USED - 200);
    rig_checkpoint(&rig, 2, 0);
    takes(USED - 200, USED - 200);
    check_files();
    rig_receive(&rig, 3, 0, 150, 6); /* and used again */
    rig_checkpoint(&rig, 3, 0);
    takes(USED - 199, USED - 199);
    check_files();
    rig_close(&rig);
}

static void what_the_svm_gives_back_is_its_hosts_until_the_next_flush(void)
{
    rig_open(&rig, 1, all_pages, 4096, true);
    send_all(BY_CALL);
    rig_checkpoint(&rig, 1, 0);
    give_back(0, 500);
    takes(USED - 500, USED);
    check_files();
    rig_check_bitmap(&rig, 0, COLOCACHE_BITMAP_SVM, rig.blocks[0].svm);
    rig_receive_zero(&rig, 2, 0, 0, 300); /* the primary's guest gave some of it back as well */
    rig_receive(&rig, 2, 0, 300, 8);
    rig_device_state(&rig, 2, 0);
    rig_seal(&rig, 2);
    takes(USED - 300, USED - 300); /* there before the commit point: the flush can't meet a full machine */
    rig_flush(&rig);
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    takes(USED - 300, USED - 300);
    check_files();
    give_back(400, 10);
    rig_guest_write(&rig, 0, 12000, 9); /* where the cache has a hole: the restart makes it one */
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    memcpy(rig.blocks[0].guest_oracle, rig.blocks[0].cache_oracle, rig_len(&rig.blocks[0]));
    takes(USED - 300, USED - 300);
    check_files();
    rig_close(&rig);
}

static void a_replay_leaves_holes_where_the_epoch_has_zeros(void)
{
    rig_open(&rig, 1, all_pages, 4096, true);
    send_all(BY_CALL);
    rig_checkpoint(&rig, 1, 0);
    rig_receive_zero(&rig, 2, 0, 0, 64);
    rig_guest_write(&rig, 0, 8000, 3);
    rig_device_state(&rig, 2, 0);
    rig_seal(&rig, 2);
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_REPLAYED, rig.report.action);
    rig_flushed(&rig);
    takes(USED - 64, USED - 64);
    check_files();
    rig_close(&rig);
}

static void give_back_is_refused_where_it_would_do_harm(void)
{
    rig_open(&rig, 1, all_pages, 4096, true);
    CHECK_RC(COLOCACHE_E_ORDER, colocache_give_back(rig.cc, 0, 0, 1));
    send_all(BY_CALL);
    rig_device_state(&rig, 1, 0);
    rig_seal(&rig, 1);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_give_back(rig.cc, 0, 0, 1));
    rig_flush(&rig);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_give_back(rig.cc, 0, 0, 1));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_give_back(rig.cc, 0, PAGES, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_give_back(rig.cc, 1, 0, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_give_back(NULL, 0, 0, 1));
    CHECK_RC(0, colocache_give_back(rig.cc, 0, 0, 0));
    check_files();
    rig_close(&rig);
    rig_open(&rig, 1, (const uint64_t[]){100}, 4096, false);
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_give_back(rig.cc, 0, 0, 1));
    rig_close(&rig);
}

static void *give_back_often(void *context)
{
    (void)context;
    for (unsigned i = 0; i < 3000; i++) {
        int rc = colocache_give_back(rig.cc, 0, i * 7 % 256, 1 + i % 8);
        if (rc != COLOCACHE_E_SEALED)
            CHECK_RC(0, rc);
    }
    return NULL;
}

static void pages_given_back_beside_receivers_and_seals_are_the_epochs(void)
{
    pthread_t thread;
    rig_open(&rig, 1, (const uint64_t[]){300}, 4096, true);
    struct rig_block *block = &rig.blocks[0];
    for (uint64_t pfn = 0; pfn < 300; pfn++)
        rig_receive(&rig, 1, 0, pfn, 1);
    rig_checkpoint(&rig, 1, 0);
    REQUIRE(pthread_create(&thread, NULL, give_back_often, NULL) == 0);
    for (uint64_t epoch = 2; epoch < 40; epoch++) {
        struct colocache_seal_args args = rig_seal_args(epoch);
        for (uint64_t pfn = epoch % 3; pfn < 300; pfn += 3) {
            if (pfn % 5 == epoch % 5)
                rig_receive_zero(&rig, epoch, 0, pfn, 1);
            else
                rig_receive(&rig, epoch, 0, pfn, epoch);
        }
        rig_device_state(&rig, epoch, 0);
        CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
        CHECK_RC(0, colocache_flush(rig.cc, NULL));
        memcpy(block->guest_oracle, block->cache_oracle, rig_len(block)); /* all that was given back is in the flush set */
        for (uint64_t pfn = 0; pfn < 300; pfn++) {
            if (!file_is(block->guest_fd, pfn, block->cache_oracle))
                CHECK_SAY("epoch %llu: page %llu of guest RAM is not the epoch's", (unsigned long long)epoch, (unsigned long long)pfn);
        }
        CHECK_RC(0, colocache_loaded(rig.cc, 1));
    }
    pthread_join(thread, NULL);
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    rig_close(&rig);
}

int main(void)
{
    RUN(a_guest_that_uses_4_of_64_MiB_takes_4_in_each_image_whichever_way_it_comes);
    RUN(an_initial_copy_that_starts_again_leaves_nothing_of_the_one_before);
    RUN(what_the_primary_gives_back_comes_back_in_both_images);
    RUN(what_the_svm_gives_back_is_its_hosts_until_the_next_flush);
    RUN(a_replay_leaves_holes_where_the_epoch_has_zeros);
    RUN(give_back_is_refused_where_it_would_do_harm);
    RUN(pages_given_back_beside_receivers_and_seals_are_the_epochs);
    return DONE();
}
