/* SPDX-License-Identifier: Apache-2.0 */
/* block_change.c: blocks that go while epochs come and go, and what an attach finds of them. */
#include "block_change_rig.h"

static void removed(uint32_t b)
{
    CHECK_RC(0, colocache_remove_block(rig.cc, b));
    rig.blocks[b].leaving = true;
}

static unsigned open_descriptors(void)
{
    unsigned n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static bool is_mapped(const void *at)
{
    return msync((void *)(uintptr_t)at, 4096, MS_ASYNC) == 0;
}

/* nobodys -- no call takes the index of a block that is gone */
static void nobodys(uint32_t b, uint64_t epoch)
{
    struct colocache_block_info info;
    uint8_t page[4096] = {1};
    const uint64_t pfn = 0, word = 1;
    uint64_t words[4];
    void *at;
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_get_block(rig.cc, b, &info));
    CHECK(said("was removed"));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_page(rig.cc, epoch, b, 0, page, 4096));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_zero(rig.cc, epoch, b, 0, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_pages(rig.cc, epoch, b, &pfn, 1, page, 4096));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_begin(rig.cc, epoch, b, 0, 1, &at));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_mark_dirty(rig.cc, b, 0, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_sync_words(rig.cc, b, 0, 1, &word));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_get_bitmap(rig.cc, b, 0, words, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_remove_block(rig.cc, b));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_block_sealed(rig.cc, b));
}

static void a_block_goes_with_the_seal_of_the_next_epoch(void)
{
    struct colocache_block_info info;
    begin();
    CHECK_RC(0, colocache_get_block(rig.cc, 1, &info));
    unsigned descriptors = open_descriptors();
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_remove_block(rig.cc, 2));
    removed(1);
    removed(1);
    rig_receive(&rig, 2, 1, 3, 2); /* was on its way */
    rig_guest_write(&rig, 1, 2, 2);
    rig_check(&rig, false);
    CHECK_RC(0, colocache_abort(rig.cc, 2, "test"));
    rig_check(&rig, false); /* an abort changes nothing of it, */
    rig_receive(&rig, 3, 1, 4, 3);
    rig_receive(&rig, 3, 0, 9, 3);
    rig_guest_write(&rig, 0, 10, 3);
    rig_device_state(&rig, 3, 10);
    rig_seal(&rig, 3); /* and the block goes all the same */
    nobodys(1, 4);
    CHECK(is_mapped(info.guest_addr) && is_mapped(info.cache_addr));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_remove_block(rig.cc, 0));
    rig_flush(&rig);
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK(!is_mapped(info.guest_addr) && !is_mapped(info.cache_addr));
    CHECK_EQ(descriptors - 2, open_descriptors());
    nobodys(1, 4);
    rig_check(&rig, true);
    rig_receive(&rig, 4, 0, 11, 4);
    rig_checkpoint(&rig, 4, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void until_that_seal_the_epoch_before_is_there_with_it(void)
{
    begin();
    removed(1);
    rig_guest_write(&rig, 1, 2, 2);
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    for (uint32_t b = 0; b < 2; b++)
        memcpy(rig.blocks[b].guest_oracle, rig.blocks[b].cache_oracle, rig_len(&rig.blocks[b]));
    rig_check(&rig, true);
    rig.blocks[1].leaving = false; /* nobody knows of it any more */
    rig_receive(&rig, 2, 1, 0, 2);
    rig_checkpoint(&rig, 2, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void from_that_seal_no_attach_takes_it(void)
{
    struct colocache_status status = {.struct_size = sizeof status};
    struct colocache_block_info infos[2];
    uint32_t n = 2;
    begin();
    removed(1);
    rig_receive(&rig, 2, 0, 1, 2);
    rig_receive(&rig, 2, 1, 1, 2);
    rig_device_state(&rig, 2, 20);
    rig_seal(&rig, 2);
    rig_die(&rig);
    rig.blocks[1].gone = false;
    CHECK_RC(COLOCACHE_E_BLOCK, rig_attach(&rig));
    CHECK(said("block boot, which the control region does not have"));
    rig.blocks[1].gone = true;
    CHECK_RC(0, colocache_inspect(rig.control_fd, &status, infos, &n));
    CHECK(n == 2 && strcmp(infos[0].name, "pc.ram") == 0 && !infos[1].name[0] && infos[1].n_pages == 0 && infos[1].len_bytes == 0);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_REPLAYED, rig.report.action);
    CHECK_EQ(1, rig.report.n_pages);
    rig_flushed(&rig);
    nobodys(1, 3);
    rig_check(&rig, true);
    rig_receive(&rig, 3, 0, 2, 3);
    rig_checkpoint(&rig, 3, 0);
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void name_and_memory_may_come_again_and_the_index_does_not(void)
{
    struct rig_block *boot = &rig.blocks[1], *again = &rig.blocks[2];
    uint32_t index = 9;
    begin();
    CHECK_RC(1, colocache_block_sealed(rig.cc, 0));
    removed(1);
    struct colocache_images images = rig_images(boot);
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_add_block(rig.cc, &images, &index)); /* it is there still */
    rig_checkpoint(&rig, 2, 0);
    memset(boot->guest, 0, rig_len(boot));
    memset(boot->cache, 0, rig_len(boot));
    CHECK_RC(0, colocache_add_block(rig.cc, &images, &index));
    CHECK_EQ(2, index);
    *again = *boot;
    again->gone = again->leaving = false;
    again->guest_oracle = calloc(2, rig_len(boot));
    again->cache_oracle = again->guest_oracle + rig_len(boot);
    again->pvm = calloc(3, boot->n_pages);
    again->svm = again->pvm + boot->n_pages;
    again->flush = again->svm + boot->n_pages;
    memset(again->svm, 1, boot->n_pages);
    memset(boot->guest_oracle, 0, 2 * rig_len(boot));
    rig.n_blocks = 3;
    CHECK_RC(0, colocache_block_sealed(rig.cc, 2));
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig)); /* by the name, the one that is there */
    CHECK_RC(0, colocache_block_sealed(rig.cc, 2));
    rig_receive(&rig, 3, 2, 6, 3);
    memcpy(boot->cache_oracle, again->cache_oracle, rig_len(boot));
    rig_checkpoint(&rig, 3, 0);
    memcpy(boot->guest_oracle, again->guest_oracle, rig_len(boot));
    CHECK_RC(1, colocache_block_sealed(rig.cc, 2));
    rig_check(&rig, true);
    nobodys(1, 4);
    free(again->guest_oracle);
    free(again->pvm);
    rig.n_blocks = 2; /* its files are boot's */
    rig_close(&rig);
}

static void the_last_block_may_go_and_a_region_has_256_in_its_life(void)
{
    const int fd = rig_memfd("all", 1024 * 4096);
    char name[16];
    struct colocache_images images = {
        .struct_size = sizeof images, .name = name, .len_bytes = 4096, .page_size = 4096, .guest_fd = fd, .cache_fd = fd};
    rig_open(&rig, 1, n_pages, 4096, false);
    for (uint32_t i = 1; i < 256; i++) {
        snprintf(name, sizeof name, "block %u", i);
        images.guest_offset = i * 8192ull;
        images.cache_offset = i * 8192ull + 4096;
        CHECK_RC(0, colocache_add_block(rig.cc, &images, NULL));
    }
    rig_checkpoint(&rig, 1, 0);
    for (uint32_t i = 0; i < 256; i++)
        CHECK_RC(0, colocache_remove_block(rig.cc, i));
    rig.blocks[0].leaving = true;
    rig_checkpoint(&rig, 2, 0);
    nobodys(0, 3);
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_add_block(rig.cc, &images, NULL));
    CHECK(said("removed ones included"));
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    close(fd);
    rig_close(&rig);
}

/* Pages and marks of a block that come late meet its removal at any moment: either they are in, or the block is nobody's. */
static void other_threads_may_work_while_a_block_goes(void)
{
    struct colocache_seal_args args;
    for (int round = 0; round < 20; round++) {
        begin();
        add("dimm", false);
        add("dimm 2", false);
        for (int i = 0; i < 2; i++) {
            others[i] = (struct other){.receives = i, .may_go = true};
            REQUIRE(pthread_create(&others[i].thread, NULL, work, &others[i]) == 0);
        }
        for (int i = 0; i < 2; i++) {
            while (__atomic_load_n(&others[i].n_of_last, __ATOMIC_ACQUIRE) == 0)
                usleep(100);
        }
        removed(2);
        removed(3);
        rig_device_state(&rig, 2, 0);
        args = rig_seal_args(2);
        CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
        CHECK_RC(0, colocache_flush(rig.cc, NULL));
        CHECK_RC(0, colocache_loaded(rig.cc, 1));
        for (int i = 0; i < 2; i++) {
            __atomic_store_n(&others[i].stop, 1, __ATOMIC_RELEASE);
            pthread_join(others[i].thread, NULL);
        }
        for (uint32_t b = 2; b < 4; b++)
            nobodys(b, 3);
        CHECK_RC(0, colocache_validate(rig.cc, 0));
        rig_close(&rig);
    }
}

int main(void)
{
    RUN(a_block_goes_with_the_seal_of_the_next_epoch);
    RUN(until_that_seal_the_epoch_before_is_there_with_it);
    RUN(from_that_seal_no_attach_takes_it);
    RUN(name_and_memory_may_come_again_and_the_index_does_not);
    RUN(the_last_block_may_go_and_a_region_has_256_in_its_life);
    RUN(other_threads_may_work_while_a_block_goes);
    return DONE();
}
