/* SPDX-License-Identifier: Apache-2.0 */
/* dirty_uffd.c on the real kernel: what this process writes is in the log, once, and pages that were only read are not. */
#define _GNU_SOURCE
#include "error.h"
#include "source.h"

#include "rig.h"

static const uint64_t blocks[] = {200, 4500};
static struct rig rig;
static uint8_t *guest[2]; /* the library's mapping: where the "VM" runs and what is tracked */

static bool begin(struct colocache_source **log)
{
    rig_open(&rig, 2, blocks, 4096, false);
    struct colocache_uffd_range ranges[3];
    for (uint32_t b = 0; b < 2; b++) {
        struct colocache_block_info info;
        CHECK_RC(0, colocache_get_block(rig.cc, b, &info));
        guest[b] = info.guest_addr;
    }
    ranges[0] = (struct colocache_uffd_range){.block = 0, .first_pfn = 0, .n_pages = 65, .addr = guest[0]};
    ranges[1] = (struct colocache_uffd_range){.block = 0, .first_pfn = 65, .n_pages = 135, .addr = guest[0] + 65 * 4096};
    ranges[2] = (struct colocache_uffd_range){.block = 1, .first_pfn = 0, .n_pages = blocks[1], .addr = guest[1]};
    int rc = colocache_source_uffd(ranges, 3, log);
    if (rc != 0)
        rig_close(&rig);
    if (rc == COLOCACHE_E_UNSUPPORTED) {
        check_skip_reason = "userfaultfd write-protect-async is unavailable here (kernel before 6.7, or not allowed)";
        return false;
    }
    REQUIRE(rc == 0);
    return true;
}

static void end(struct colocache_source *log)
{
    CHECK_RC(0, colocache_source_close(log));
    rig_close(&rig);
}

static void guest_writes(uint32_t b, uint64_t pfn, uint8_t value)
{
    guest[b][pfn * 4096 + 77] = value;
    rig.blocks[b].guest_oracle[pfn * 4096 + 77] = value;
    rig.blocks[b].svm[pfn] = 1;
}

static void writes_are_in_the_log_once(void)
{
    struct colocache_source *log = NULL;
    struct dice dice = {71};
    if (!begin(&log))
        return;
    for (uint64_t epoch = 1; epoch <= 6; epoch++) {
        uint64_t n_writes = epoch == 3 ? 0 : below(&dice, 60);
        for (uint64_t i = 0; i < n_writes; i++) {
            uint32_t b = (uint32_t)below(&dice, 2);
            guest_writes(b, below(&dice, blocks[b]), (uint8_t)epoch);
        }
        if (epoch == 5) {
            for (uint64_t pfn = 0; pfn < blocks[1]; pfn++) /* more than one hand-over of 4096 pages */
                guest_writes(1, pfn, (uint8_t)(pfn + 1));
        }
        volatile uint8_t read_only = guest[0][150 * 4096];
        (void)read_only;
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, true);
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log)); /* nothing since: nothing more */
        rig_check(&rig, true);
        rig_receive(&rig, epoch, 1, below(&dice, blocks[1]), epoch);
        rig_checkpoint(&rig, epoch, 0);
        /* The flush writes guest RAM through the tracked mapping: extra bits, never missing ones.  They are thrown away with the log. */
        CHECK_RC(0, colocache_source_discard(log));
        rig_check(&rig, true);
    }
    end(log);
}

static void writes_of_the_kernel_are_seen(void)
{
    struct colocache_source *log = NULL;
    int fds[2];
    if (!begin(&log))
        return;
    REQUIRE(pipe(fds) == 0 && write(fds[1], "abcdef", 6) == 6);
    REQUIRE(read(fds[0], guest[0] + 65 * 4096 - 3, 6) == 6); /* across the edge of two ranges */
    memcpy(rig.blocks[0].guest_oracle + 65 * 4096 - 3, "abcdef", 6);
    rig.blocks[0].svm[64] = rig.blocks[0].svm[65] = 1;
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig_check(&rig, false);
    close(fds[0]);
    close(fds[1]);
    end(log);
}

static void discard_forgets(void)
{
    struct colocache_source *log = NULL;
    if (!begin(&log))
        return;
    guest_writes(0, 10, 1);
    rig.blocks[0].svm[10] = 0;
    CHECK_RC(0, colocache_source_discard(log));
    guest_writes(0, 11, 1);
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig_check(&rig, false);
    end(log);
}

static void a_range_whose_block_is_not_there_yet_loses_nothing(void)
{
    struct colocache_sender *sender = NULL;
    struct colocache_source *log = NULL;
    uint64_t pending = 99, unacked = 99;
    uint8_t *memory = mmap(NULL, 20 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    const struct colocache_uffd_range ranges[] = {{.block = 0, .n_pages = 10, .addr = memory},
                                                  {.block = 1, .n_pages = 10, .addr = memory + 10 * 4096}};
    CHECK_RC(0, colocache_sender_create(&sender));
    CHECK_RC(0, colocache_sender_add_block(sender, "low", memory, 10 * 4096, 4096, NULL));
    int rc = colocache_source_uffd(ranges, 2, &log);
    if (rc == COLOCACHE_E_UNSUPPORTED) {
        check_skip_reason = "userfaultfd write-protect-async is unavailable here";
    } else {
        REQUIRE(rc == 0);
        memory[3 * 4096] = memory[12 * 4096] = memory[19 * 4096] = 1;
        CHECK_RC(COLOCACHE_E_BLOCK, colocache_sender_sync_dirty_log(sender, log));
        CHECK_RC(0, colocache_sender_add_block(sender, "high", memory + 10 * 4096, 10 * 4096, 4096, NULL));
        CHECK_RC(0, colocache_sender_sync_dirty_log(sender, log));
        CHECK_RC(0, colocache_sender_count(sender, &pending, &unacked));
        CHECK_EQ(3, pending);
        CHECK_EQ(3, unacked);
    }
    CHECK_RC(0, colocache_source_close(log));
    CHECK_RC(0, colocache_sender_close(sender));
    munmap(memory, 20 * 4096);
}

static int take_nothing(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    (void)context, (void)block, (void)first_pfn, (void)n_pages;
    return !words[0] ? 0 : cc_fail(-ENOMEM, "no room for what the log says");
}

static void a_log_that_was_cleared_and_not_taken_is_lost(void)
{
    struct colocache_source *log = NULL;
    if (!begin(&log))
        return;
    guest_writes(0, 10, 1);
    CHECK_RC(COLOCACHE_E_LOG_LOST, log->sync(log, take_nothing, NULL));
    end(log);
}

static void wrong_ranges_are_refused(void)
{
    struct colocache_source *log = (void *)1;
    struct colocache_uffd_range range = {.n_pages = 1, .addr = (void *)4096};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd(NULL, 1, &log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd(&range, 0, &log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd(&range, 1, NULL));
    range.addr = (void *)100;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd(&range, 1, &log));
    range = (struct colocache_uffd_range){.n_pages = 0, .addr = (void *)4096};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd(&range, 1, &log));
    range = (struct colocache_uffd_range){.n_pages = 1, .addr = (void *)4096}; /* nothing is mapped there */
    CHECK(colocache_source_uffd(&range, 1, &log) < 0);
    CHECK(log == (void *)1);
}

int main(void)
{
    RUN(writes_are_in_the_log_once);
    RUN(writes_of_the_kernel_are_seen);
    RUN(discard_forgets);
    RUN(a_range_whose_block_is_not_there_yet_loses_nothing);
    RUN(a_log_that_was_cleared_and_not_taken_is_lost);
    RUN(wrong_ranges_are_refused);
    return DONE();
}
