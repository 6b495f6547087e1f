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
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, COLOCACHE_EPOCH_MAX + 1, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_device_state_begin(rig.cc, COLOCACHE_EPOCH_MAX + 1, 1, &addr));
    rig_receive(&rig, 5, 0, 0, 1);
    CHECK_EQ(cc_word_make(5), rig.control->receiving);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 4, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 6, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_device_state_begin(rig.cc, 6, 1, &addr));
    CHECK_RC(0, colocache_abort(rig.cc, 5, "test"));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 5, 0, 0, 1)); /* never again */
    CHECK_EQ(cc_word_make(5), rig.control->receiving);
    rig_receive(&rig, 9, 0, 1, 1);
    rig_device_state(&rig, 9, 0);
    rig_seal(&rig, 9);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_receive_zero(rig.cc, 10, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_receive_zero(rig.cc, 9, 0, 0, 1));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_device_state_begin(rig.cc, 10, 1, &addr));
    CHECK_EQ(cc_word_make(9), rig.control->receiving); /* a refused page does not say that it may have come */
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
    CHECK_EQ(cc_word_make(7), rig.control->receiving);
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
    CHECK_EQ(4096, allocated_bytes(block->cache_fd));     /* pages of zeros stay holes: test_sparse.c */
    CHECK_EQ(4096, allocated_bytes(block->guest_fd));     /* so that the flush can't meet a full machine */
    CHECK_RC(0, colocache_mark_dirty(rig.cc, 0, 100, 2)); /* the SVM's own pages, which the cache does not have: zeros */
    memset(block->svm + 100, 1, 2);
    rig_device_state(&rig, 1, 0);
    rig_seal(&rig, 1);
    CHECK_EQ(4096, allocated_bytes(block->cache_fd));
    CHECK_EQ(4096, allocated_bytes(block->guest_fd));
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

/* ---- in place ---------------------------------------------------------------------------------------------------------- */

static struct rig in_place; /* with a short wait, so that what must not hang is seen to come back */

static void open_in_place(void)
{
    rig_open(&in_place, 3, odd_blocks, 4096, false);
    in_place.cc->epoch.receive_wait_ns = 30000000;
}

static int seal_in_place(uint64_t epoch, uint64_t n_pages)
{
    void *state;
    CHECK_RC(0, colocache_device_state_begin(in_place.cc, epoch, 0, &state));
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = n_pages};
    return colocache_seal(in_place.cc, &args, NULL);
}

static void bytes_written_in_place_are_pages_when_they_are_done(void)
{
    struct dice dice = {31};
    open_in_place();
    for (int i = 0; i < 100; i++) {
        uint32_t b = (uint32_t)below(&dice, 2);
        uint64_t n = 1 + below(&dice, 20), pfn = below(&dice, odd_blocks[b] - n + 1);
        struct rig_block *block = &in_place.blocks[b];
        void *addr = NULL;
        CHECK_RC(0, colocache_receive_begin(in_place.cc, 1, b, pfn, n, &addr));
        rig_check(&in_place, false); /* no bit before it is done */
        for (uint64_t k = 0; k < n; k++) {
            rig_fill((uint8_t *)addr + k * 4096, 4096, (uint64_t)i, b, pfn + k);
            rig_fill(block->cache_oracle + (pfn + k) * 4096, 4096, (uint64_t)i, b, pfn + k);
            block->pvm[pfn + k] = 1;
        }
        CHECK_RC(0, colocache_receive_done(in_place.cc, 1, b, pfn, n, 1));
        rig_check(&in_place, false);
    }
    rig_close(&in_place);
}

static void an_abandoned_range_has_bits_and_no_count(void)
{
    void *addr;
    open_in_place();
    CHECK_RC(0, colocache_receive_begin(in_place.cc, 1, 0, 10, 4, &addr));
    memset(addr, 9, 4096); /* one page of four, and the transport broke */
    memset(in_place.blocks[0].cache_oracle + 10 * 4096, 9, 4096);
    CHECK_RC(0, colocache_receive_done(in_place.cc, 1, 0, 10, 4, 0));
    memset(in_place.blocks[0].pvm + 10, 1, 4);
    rig_check(&in_place, false);
    CHECK_RC(COLOCACHE_E_INCOMPLETE, seal_in_place(1, 4)); /* as the peer counts them: aborted */
    CHECK_RC(0, colocache_receive_begin(in_place.cc, 2, 0, 10, 4, &addr));
    for (uint64_t k = 0; k < 4; k++) {
        rig_fill((uint8_t *)addr + k * 4096, 4096, 2, 0, 10 + k);
        rig_fill(in_place.blocks[0].cache_oracle + (10 + k) * 4096, 4096, 2, 0, 10 + k);
    }
    CHECK_RC(0, colocache_receive_done(in_place.cc, 2, 0, 10, 4, 1));
    CHECK_RC(0, seal_in_place(2, 4)); /* sent again, whole */
    rig_close(&in_place);
}

static void a_range_left_open_makes_the_seal_fail_and_never_hang(void)
{
    void *addr, *other;
    uint64_t epoch;
    open_in_place();
    rig_receive(&in_place, 1, 0, 1, 1);
    rig_checkpoint(&in_place, 1, 0);
    CHECK_RC(0, colocache_receive_begin(in_place.cc, 2, 1, 64, 2, &addr));
    CHECK_RC(0, colocache_receive_begin(in_place.cc, 2, 0, 0, 1, &other)); /* several at once */
    CHECK_RC(COLOCACHE_E_RECEIVING, seal_in_place(2, COLOCACHE_ANY_COUNT));
    CHECK(strstr(colocache_last_error(), "2 receives into epoch 2") != NULL);
    CHECK_RC(COLOCACHE_E_RECEIVING, colocache_abort(in_place.cc, 2, "too early"));
    CHECK_EQ(COLOCACHE_PHASE_LIVE, rig_phase(&in_place)); /* nothing was changed: it goes on */
    for (uint64_t k = 0; k < 2; k++) {
        rig_fill((uint8_t *)addr + k * 4096, 4096, 2, 1, 64 + k);
        rig_fill(in_place.blocks[1].cache_oracle + (64 + k) * 4096, 4096, 2, 1, 64 + k);
        in_place.blocks[1].pvm[64 + k] = 1;
    }
    CHECK_RC(0, colocache_receive_done(in_place.cc, 2, 1, 64, 2, 1));
    CHECK_RC(COLOCACHE_E_RECEIVING, seal_in_place(2, 2));
    in_place.blocks[0].pvm[0] = 1;
    CHECK_RC(0, colocache_receive_done(in_place.cc, 2, 0, 0, 1, 0));
    rig_check(&in_place, false);
    CHECK_RC(0, seal_in_place(2, 2));
    CHECK_RC(0, colocache_flush(in_place.cc, NULL));
    CHECK_RC(0, colocache_loaded(in_place.cc, 1));
    CHECK_RC(0, colocache_receive_begin(in_place.cc, 3, 1, 64, 2, &addr));
    CHECK_RC(0, colocache_failover(in_place.cc, &epoch)); /* a peer that died in mid-transfer holds up no takeover */
    CHECK_EQ(2, epoch);
    CHECK_RC(0, colocache_receive_done(in_place.cc, 3, 1, 64, 2, 0));
    CHECK_RC(COLOCACHE_E_FAILED_OVER, colocache_receive_begin(in_place.cc, 4, 1, 64, 2, &addr));
    rig_close(&in_place);
}

static void what_can_not_be_received_in_place_is_refused(void)
{
    void *addr = &addr;
    open_in_place();
    CHECK_RC(COLOCACHE_E_RANGE, colocache_receive_begin(in_place.cc, 1, 0, 99, 2, &addr));
    CHECK(addr == NULL);
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_receive_begin(in_place.cc, 1, 3, 0, 1, &addr));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_begin(in_place.cc, 1, 0, 0, 0, &addr));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_begin(in_place.cc, 1, 0, 0, 1, NULL));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_begin(in_place.cc, 0, 0, 0, 1, &addr));
    CHECK_RC(COLOCACHE_E_ORDER, colocache_receive_done(in_place.cc, 1, 0, 0, 1, 1)); /* nobody began */
    CHECK_RC(0, colocache_receive_begin(in_place.cc, 1, 0, 0, 1, &addr));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_done(in_place.cc, 2, 0, 0, 1, 1));
    CHECK_RC(0, colocache_receive_done(in_place.cc, 1, 0, 0, 1, 0));
    rig_close(&in_place);
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
    RUN(bytes_written_in_place_are_pages_when_they_are_done);
    RUN(an_abandoned_range_has_bits_and_no_count);
    RUN(a_range_left_open_makes_the_seal_fail_and_never_hang);
    RUN(what_can_not_be_received_in_place_is_refused);
    return DONE();
}
