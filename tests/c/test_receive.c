/* SPDX-License-Identifier: Apache-2.0 */
/* receive.c and dirty_log.c's marks, against arrays: bytes to the cache only, one bit for each page, and nothing at all on error. */
#include "rig.h"

#include <signal.h>

#include "internal.h"

static const uint64_t odd_blocks[] = {100, 4097, 1};

static void pages_go_to_the_cache_and_nowhere_else(void)
{
    struct rig rig;
    struct dice dice = {21};
    rig_open(&rig, 3, odd_blocks, 4096, false);
    for (int i = 0; i < 300; i++) {
        uint32_t b = (uint32_t)below(&dice, 3);
        uint64_t pfn = below(&dice, odd_blocks[b]);
        if (i % 3 == 0)
            rig_receive_zero(&rig, 1, b, pfn, 1 + below(&dice, odd_blocks[b] - pfn < 40 ? odd_blocks[b] - pfn : 40));
        else
            rig_receive(&rig, 1, b, pfn, (uint64_t)i);
    }
    rig_check(&rig, false); /* guest RAM's oracle is still all zero */
    rig_close(&rig);
}

static void many_pages_in_one_call(void)
{
    struct rig rig;
    rig_open(&rig, 3, odd_blocks, 4096, false);
    struct rig_block *block = &rig.blocks[1];
    const uint64_t pfns[] = {4096, 0, 63, 64, 65, 4095, 63}; /* the last wins for page 63 */
    uint8_t data[7 * 4096];
    for (unsigned i = 0; i < 7; i++) {
        rig_fill(data + i * 4096, 4096, i + 1, 1, pfns[i]);
        rig_fill(block->cache_oracle + pfns[i] * 4096, 4096, i + 1, 1, pfns[i]);
        block->pvm[pfns[i]] = 1;
    }
    CHECK_RC(0, colocache_receive_pages(rig.cc, 1, 1, pfns, 7, data, sizeof data));
    rig_check(&rig, false);
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(rig.cc, &status));
    CHECK_EQ(7, status.received_pages); /* repeats included */

    const uint64_t past[] = {1, 2, 4097};
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_pages(rig.cc, 1, 1, past, 3, data, 3 * 4096));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_receive_pages(rig.cc, 1, 1, pfns, 7, data, 7 * 4096 - 1));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_receive_pages(rig.cc, 1, 1, pfns, 7, data, 6 * 4096));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_pages(rig.cc, 1, 1, NULL, 1, data, 4096));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_pages(rig.cc, 1, 1, pfns, 1, NULL, 4096));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_pages(rig.cc, 1, 3, pfns, 1, data, 4096));
    CHECK_RC(0, colocache_receive_pages(rig.cc, 1, 1, NULL, 0, NULL, 0));
    rig_check(&rig, false);
    CHECK_RC(0, colocache_get_status(rig.cc, &status));
    CHECK_EQ(7, status.received_pages);
    rig_close(&rig);
}

static void pages_out_of_range_write_nothing(void)
{
    struct rig rig;
    uint8_t page[8192] = {1};
    rig_open(&rig, 3, odd_blocks, 4096, false);
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_page(rig.cc, 1, 0, 100, page, 4096));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_page(rig.cc, 1, 0, ~0ull, page, 4096));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_receive_page(rig.cc, 1, 0, 99, page, 4095));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_receive_page(rig.cc, 1, 0, 99, page, 8192));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_receive_page(rig.cc, 1, 0, 99, page, 0));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_zero(rig.cc, 1, 0, 99, 2));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_zero(rig.cc, 1, 0, 1, ~0ull));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_zero(rig.cc, 1, 0, 100, 0));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_zero(rig.cc, 1, 3, 0, 1));
    CHECK_EQ(0, rig.control->receiving); /* not even the epoch was opened */
    rig_check(&rig, false);
    rig_close(&rig);
}

static void epochs_only_go_up(void)
{
    struct rig rig;
    void *addr;
    rig_open(&rig, 3, odd_blocks, 4096, false);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 0, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, UINT64_MAX, 0, 0, 1));
    rig_receive(&rig, 5, 0, 0, 1);
    CHECK_EQ(5, rig.control->receiving);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 4, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 6, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_device_state_begin(rig.cc, 6, 1, &addr));
    CHECK_RC(0, colocache_abort(rig.cc, 5, "test"));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 5, 0, 0, 1)); /* never again */
    CHECK_EQ(5, rig.control->receiving);
    rig_receive(&rig, 9, 0, 1, 1);
    rig_device_state(&rig, 9, 0);
    rig_seal(&rig, 9);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_receive_zero(rig.cc, 10, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_receive_zero(rig.cc, 9, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_device_state_begin(rig.cc, 10, 1, &addr));
    CHECK_EQ(9, rig.control->receiving); /* a refused page does not say that it may have come */
    rig_flush(&rig);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_receive_zero(rig.cc, 10, 0, 0, 1));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 9, 0, 0, 1));
    rig_receive(&rig, 10, 0, 2, 1);
    rig_check(&rig, true);
    rig_close(&rig);
}

static struct rig *watched; /* whose `receiving` can't be written: the first store faults, and what the others can see then is noted */
static uint64_t open_at_the_store;

static void at_the_store(int signal)
{
    (void)signal;
    open_at_the_store = watched->cc->epoch.open;
    mprotect(watched->cc->region.control, 4096, PROT_READ | PROT_WRITE);
}

/* A second receiver that finds its epoch open writes its page at once.  If the word came later, a death in between would leave a page
 * of the new epoch in a cache that attach takes for the old one. */
static void the_receiving_word_is_stored_before_anybody_can_find_the_epoch_open(void)
{
    struct rig rig;
    struct sigaction action = {.sa_handler = at_the_store}, before;
    rig_open(&rig, 3, odd_blocks, 4096, false);
    watched = &rig;
    open_at_the_store = 99;
    REQUIRE(sigaction(SIGSEGV, &action, &before) == 0 && mprotect(rig.cc->region.control, 4096, PROT_READ) == 0);
    rig_receive(&rig, 7, 0, 5, 1);
    REQUIRE(sigaction(SIGSEGV, &before, NULL) == 0);
    CHECK_EQ(0, open_at_the_store);
    CHECK_EQ(7, rig.control->receiving);
    rig_check(&rig, false);
    rig_close(&rig);
}

static void device_state_has_any_length_up_to_its_bound(void)
{
    struct rig rig;
    const void *state = NULL;
    uint64_t n = 0;
    void *addr = NULL;
    rig_open(&rig, 1, odd_blocks, 4096, false);
    CHECK_RC(COLOCACHE_E_NO_STATE, colocache_device_state(rig.cc, &state, &n));
    CHECK_RC(COLOCACHE_E_TOO_LARGE, colocache_device_state_begin(rig.cc, 1, 10001, &addr));
    CHECK_RC(COLOCACHE_E_TOO_LARGE, colocache_device_state_begin(rig.cc, 1, ~0ull, &addr));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_device_state_begin(rig.cc, 1, 1, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_device_state(rig.cc, NULL, &n));
    CHECK_EQ(0, rig.control->receiving);
    const uint64_t lengths[] = {10000, 0, 1, 4095, 4096, 4097, 8192, 10000};
    for (uint64_t epoch = 1; epoch <= 8; epoch++) {
        rig_device_state(&rig, epoch, 33); /* the last call before seal counts */
        rig_device_state(&rig, epoch, lengths[epoch - 1]);
        if (epoch > 1)
            rig_check_device_state(&rig, epoch - 1, lengths[epoch - 2]); /* the sealed one stays whole while the next is written */
        rig_checkpoint(&rig, epoch, lengths[epoch - 1]);
        rig_check_device_state(&rig, epoch, lengths[epoch - 1]);
    }
    /* an aborted epoch's state, and a refused one's, change nothing */
    rig_device_state(&rig, 9, 5000);
    CHECK_RC(0, colocache_abort(rig.cc, 9, "test"));
    rig_check_device_state(&rig, 8, 10000);
    rig_device_state(&rig, 10, 5000); /* of the same parity as the sealed one: the area is the other one all the same */
    rig_check_device_state(&rig, 8, 10000);
    rig_check(&rig, true);
    rig_close(&rig);
}

static uint64_t allocated_bytes(int fd)
{
    struct stat st;
    REQUIRE(fstat(fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512;
}

static void sparse_images_are_allocated_as_pages_come(void)
{
    struct rig rig;
    const uint64_t big[] = {5000};
    rig_open(&rig, 1, big, 4096, true);
    /* the test's oracle compares whole images through mappings, which would fill the holes: here only what matters is looked at */
    struct rig_block *block = &rig.blocks[0];
    CHECK_EQ(0, allocated_bytes(block->cache_fd));
    rig_receive(&rig, 1, 0, 4999, 1);
    rig_receive_zero(&rig, 1, 0, 10, 3);
    CHECK_EQ(4 * 4096, allocated_bytes(block->cache_fd));
    CHECK_EQ(4 * 4096, allocated_bytes(block->guest_fd)); /* so that the flush can't meet a full machine */
    CHECK_RC(0, colocache_mark_dirty(rig.cc, 0, 100, 2)); /* the SVM's own pages: allocated at seal, before the commit point */
    memset(block->svm + 100, 1, 2);
    rig_device_state(&rig, 1, 0);
    rig_seal(&rig, 1);
    CHECK_EQ(6 * 4096, allocated_bytes(block->cache_fd));
    CHECK_EQ(6 * 4096, allocated_bytes(block->guest_fd));
    rig_flush(&rig);
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig)); /* a restart copies data and leaves holes holes */
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    CHECK(allocated_bytes(block->cache_fd) <= 5000 * 4096 / 2);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void pages_of_other_sizes(void)
{
    struct rig rig;
    const uint64_t n_pages[] = {65, 3};
    const uint32_t sizes[] = {8192, 65536};
    for (int i = 0; i < 2; i++) {
        rig_open(&rig, 2, n_pages, sizes[i], false);
        rig_receive(&rig, 1, 0, 64, 1);
        rig_receive(&rig, 1, 1, 2, 1);
        CHECK_RC(COLOCACHE_E_LENGTH, colocache_receive_page(rig.cc, 1, 0, 0, rig.blocks[0].cache_oracle, 4096));
        rig_guest_write(&rig, 0, 0, 2);
        rig_checkpoint(&rig, 1, 0);
        rig_check(&rig, true);
        rig_close(&rig);
    }
}

int main(void)
{
    RUN(pages_go_to_the_cache_and_nowhere_else);
    RUN(many_pages_in_one_call);
    RUN(pages_out_of_range_write_nothing);
    RUN(epochs_only_go_up);
    RUN(the_receiving_word_is_stored_before_anybody_can_find_the_epoch_open);
    RUN(device_state_has_any_length_up_to_its_bound);
    RUN(sparse_images_are_allocated_as_pages_come);
    RUN(pages_of_other_sizes);
    return DONE();
}
