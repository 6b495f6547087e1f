/* SPDX-License-Identifier: Apache-2.0 */
/* block_change.c: blocks that come while epochs do, and what an attach finds of them. */
#include "block_change_rig.h"

static bool is_zero(const uint8_t *at, uint64_t n_bytes)
{
    return n_bytes == 0 || (at[0] == 0 && memcmp(at, at + 1, n_bytes - 1) == 0);
}

static void a_block_that_comes_late_is_flushed_whole(void)
{
    begin();
    add("dimm", false);
    rig_fill(rig.blocks[2].guest + 77 * 4096, 4096, 9, 2, 77); /* a page that no log knows */
    rig_fill(rig.blocks[2].guest_oracle + 77 * 4096, 4096, 9, 2, 77);
    rig_check(&rig, false);
    rig_receive(&rig, 2, 2, 129, 2);
    rig_receive(&rig, 2, 0, 1, 2);
    rig_checkpoint(&rig, 2, 20);
    CHECK(is_zero(rig.blocks[2].guest, 129 * 4096));
    rig_check(&rig, true);
    rig_guest_write(&rig, 2, 3, 4); /* and from then on it is a block as any other */
    rig_receive(&rig, 3, 2, 64, 3);
    rig_checkpoint(&rig, 3, 30);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void a_block_may_come_into_an_open_epoch(void)
{
    begin();
    rig_receive(&rig, 2, 0, 1, 2);
    add("dimm", false);
    rig_receive(&rig, 2, 2, 0, 2);
    CHECK_RC(0, colocache_abort(rig.cc, 2, "test")); /* which it outlives */
    rig_receive(&rig, 3, 2, 1, 3);
    rig_checkpoint(&rig, 3, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void a_block_may_come_before_the_first_seal(void)
{
    rig_open(&rig, 1, n_pages, 4096, false);
    rig_receive(&rig, 1, 0, 5, 1);
    add("late", false);
    memset(rig.blocks[1].svm, 0, 7); /* all of RAM is on its way: nothing need be restored */
    rig_check(&rig, false);
    rig_receive(&rig, 1, 1, 6, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void no_block_comes_while_an_epoch_is_flushed_or_after_the_end(void)
{
    struct rig_block late;
    uint64_t epoch;
    begin();
    rig_block_init(&late, "late", 3, 4096, false);
    struct colocache_images images = rig_images(&late);
    rig_device_state(&rig, 2, 0);
    rig_seal(&rig, 2);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_add_block(rig.cc, &images, NULL));
    rig_flush(&rig);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_add_block(rig.cc, &images, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 0));
    CHECK_RC(COLOCACHE_E_LOAD_FAILED, colocache_add_block(rig.cc, &images, NULL));
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_RC(0, colocache_failover(rig.cc, &epoch));
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_add_block(rig.cc, &images, NULL));
    rig_check(&rig, true);
    munmap(late.guest, rig_len(&late));
    munmap(late.cache, rig_len(&late));
    close(late.guest_fd);
    close(late.cache_fd);
    free(late.guest_oracle);
    free(late.pvm);
    rig_close(&rig);
}

static void a_restart_from_an_epoch_before_the_block_finds_it_all_zeros(void)
{
    begin();
    add("dimm", false);
    rig_fill(rig.blocks[2].guest, 4096, 9, 2, 0); /* the VM that dies has used it */
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    CHECK_EQ(1, rig.report.epoch);
    CHECK(is_zero(rig.blocks[2].guest, rig_len(&rig.blocks[2])));
    rig_check(&rig, true); /* and it counts as written still */
    rig_receive(&rig, 2, 2, 7, 2);
    rig_die(&rig); /* now something of it had come */
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_NO_RESTART, rig.report.action);
    for (uint32_t b = 0; b < 3; b++)
        memset(rig.blocks[b].svm, 1, n_pages[b]);
    rig_receive(&rig, 3, 2, 8, 3);
    rig_device_state(&rig, 3, 0);
    rig_seal(&rig, 3);
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_REPLAYED, rig.report.action);
    rig_flushed(&rig);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void attach_names_the_block_that_is_missing_or_unknown(void)
{
    begin();
    add("dimm", false);
    rig_die(&rig);
    rig.n_blocks = 2;
    CHECK_RC(COLOCACHE_E_BLOCK, rig_attach(&rig));
    CHECK(said("no images were given for block dimm"));
    rig.n_blocks = 3;
    struct colocache *cc = NULL;
    struct colocache_images images[4];
    for (uint32_t b = 0; b < 3; b++)
        images[b] = rig_images(&rig.blocks[b]);
    images[3] = images[2];
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_attach(rig.control_fd, NULL, images, 4, NULL, &cc));
    CHECK(said("twice for block dimm"));
    images[3].name = "never added"; /* its process died before it came to it */
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_attach(rig.control_fd, NULL, images, 4, NULL, &cc));
    CHECK(said("block never added, which the control region does not have"));
    images[3].name = NULL;
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_attach(rig.control_fd, NULL, images, 4, NULL, &cc));
    CHECK_RC(0, rig_attach(&rig));
    rig_close(&rig);
}

/* A process that dies in add_block has enlarged the region, perhaps, and set bits there. */
static void bits_of_an_unfinished_block_are_no_bits_of_the_next(void)
{
    begin();
    rig_die(&rig);
    uint64_t end = rig.control_bytes;
    REQUIRE(ftruncate(rig.control_fd, (off_t)end + 6 * 4096) == 0);
    uint8_t *left = mmap(NULL, 6 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, rig.control_fd, (off_t)end);
    REQUIRE(left != MAP_FAILED);
    memset(left, 0xff, 6 * 4096);
    munmap(left, 6 * 4096);
    CHECK_RC(0, rig_attach(&rig));
    add("dimm", false);
    rig_check(&rig, true);
    rig_receive(&rig, 2, 2, 0, 2);
    rig_checkpoint(&rig, 2, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void a_sparse_block_that_comes_late_stays_sparse(void)
{
    struct stat st;
    begin();
    add("dimm", true);
    rig_receive(&rig, 2, 2, 100, 2);
    rig_checkpoint(&rig, 2, 0);
    REQUIRE(fstat(rig.blocks[2].guest_fd, &st) == 0);
    CHECK_EQ(1, st.st_blocks * 512 / 4096);
    rig_check(&rig, false);
    rig_close(&rig);
}

static void other_threads_may_work_while_blocks_come(void)
{
    begin();
    for (int i = 0; i < 2; i++) {
        others[i] = (struct other){.receives = i};
        REQUIRE(pthread_create(&others[i].thread, NULL, work, &others[i]) == 0);
    }
    add("dimm", false);
    add("dimm 2", false);
    for (int i = 0; i < 2; i++) {
        while (__atomic_load_n(&others[i].n_of_last, __ATOMIC_ACQUIRE) == 0)
            usleep(100);
        __atomic_store_n(&others[i].stop, 1, __ATOMIC_RELEASE);
        pthread_join(others[i].thread, NULL);
    }
    rig_device_state(&rig, 2, 0);
    CHECK_RC(0, rig_try_seal(&rig, 2));
    CHECK_RC(0, colocache_flush(rig.cc, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    for (uint32_t b = 0; b < 4; b++)
        CHECK(memcmp(rig.blocks[b].guest, rig.blocks[b].cache, rig_len(&rig.blocks[b])) == 0 && rig.blocks[b].guest[4096] == 1);
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    rig_close(&rig);
}

int main(void)
{
    RUN(a_block_that_comes_late_is_flushed_whole);
    RUN(a_block_may_come_into_an_open_epoch);
    RUN(a_block_may_come_before_the_first_seal);
    RUN(no_block_comes_while_an_epoch_is_flushed_or_after_the_end);
    RUN(a_restart_from_an_epoch_before_the_block_finds_it_all_zeros);
    RUN(attach_names_the_block_that_is_missing_or_unknown);
    RUN(bits_of_an_unfinished_block_are_no_bits_of_the_next);
    RUN(a_sparse_block_that_comes_late_stays_sparse);
    RUN(other_threads_may_work_while_blocks_come);
    return DONE();
}
