/* SPDX-License-Identifier: Apache-2.0 */
/* dirty_kvm.c on the real /dev/kvm: what a vCPU writes is in the log, whatever becomes of it on the way.  The slots: test_kvm_slots.c. */
#define _GNU_SOURCE
#include "source.h"
#include "bitmap.h"
#include "error.h"

#include "kvm_rig.h"

#include <stdarg.h>
#include <sys/syscall.h>

#if defined(__x86_64__)

static void vcpu_writes_are_in_the_log(bool manual_protect)
{
    static const uint16_t pages[][6] = {{36, 37, 38, 199, 2, 100}, {199, 198, 64, 63, 65, 128}, {2, 2, 3, 36, 37, 101}};
    struct colocache_source *log = NULL;
    struct dice dice = {81};
    if (!begin(manual_protect, &log))
        return;
    const uint16_t first[] = {50, 60};
    if (!guest_writes(first, 2)) {
        end(log);
        return;
    }
    CHECK_RC(0, colocache_source_discard(log));
    rig.blocks[0].svm[50] = rig.blocks[0].svm[60] = 0;
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig_check(&rig, false); /* thrown away: they are told of by hand, or their pages would stay wrong */
    CHECK_RC(0, colocache_mark_dirty(rig.cc, 0, 50, 11));
    memset(rig.blocks[0].svm + 50, 1, 11);
    for (uint64_t epoch = 1; epoch <= 6; epoch++) {
        uint16_t list[40];
        unsigned n = epoch <= 3 ? 6 : (unsigned)below(&dice, 40);
        for (unsigned i = 0; i < n; i++)
            list[i] = epoch <= 3 ? pages[epoch - 1][i] : (uint16_t)(2 + below(&dice, PAGES - 2));
        guest_writes(list, n);
        CHECK_RC(0, colocache_mark_dirty(rig.cc, 0, CODE_PAGE, 2)); /* user space wrote the program and its list */
        rig.blocks[0].svm[0] = rig.blocks[0].svm[1] = 1;
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, true);
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log)); /* cleared: nothing comes twice */
        rig_receive(&rig, epoch, 0, below(&dice, PAGES), epoch);
        rig_checkpoint(&rig, epoch, 0);
        rig_check(&rig, true);
        CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache, PAGES * 4096) == 0);
    }
    end(log);
}

static void vcpu_writes_are_in_the_log_by_get(void)
{
    vcpu_writes_are_in_the_log(false);
}

static void vcpu_writes_are_in_the_log_by_get_and_clear(void)
{
    vcpu_writes_are_in_the_log(true);
}

static int take_nothing(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    (void)context, (void)block, (void)first_pfn;
    return cc_words_for(n_pages) == 1 && !words[0] ? 0 : cc_fail(-ENOMEM, "no room for what the log says");
}

static void a_log_is_kept_when_it_is_not_taken(bool manual_protect)
{
    struct colocache_source *log = NULL;
    if (!begin(manual_protect, &log))
        return;
    const uint16_t pages[] = {5, 36, 37, 150}, more[] = {36, 38};
    CHECK_RC(0, colocache_source_discard(log));
    if (guest_writes(pages, 4)) {
        CHECK_RC(-ENOMEM, log->sync(log, take_nothing, NULL));
        CHECK_RC(-ENOMEM, log->sync(log, take_nothing, NULL));
        guest_writes(more, 2);
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, false); /* every page, though the first get may have cleared */
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, false);
    }
    end(log);
}

static void a_log_that_was_got_and_not_taken_is_kept_by_get(void)
{
    a_log_is_kept_when_it_is_not_taken(false);
}

static void a_log_that_was_got_and_not_taken_is_kept_by_get_and_clear(void)
{
    a_log_is_kept_when_it_is_not_taken(true);
}
#endif

/* ---- a kernel that says more than it should: this program's ioctl goes before the C library's --------------------------- */

static bool kernel_is_ours;
static unsigned gets, clears, page_that_is_said;

int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    va_start(args, request);
    void *arg = va_arg(args, void *);
    va_end(args);
    if (!kernel_is_ours)
        return (int)syscall(SYS_ioctl, fd, request, arg);
    if (request == KVM_GET_DIRTY_LOG) {
        const struct kvm_dirty_log *get = arg;
        ((uint64_t *)get->dirty_bitmap)[0] = 1ull << page_that_is_said;
        gets++;
    } else {
        CHECK(request == KVM_CLEAR_DIRTY_LOG);
        clears++;
    }
    return 0;
}

/* A bit past what was said to be the slot's end is a page of a larger slot: left out, it would be wrong for ever. */
static void bits_past_the_end_of_a_slot_are_a_lost_log(void)
{
    static const uint64_t n_pages[] = {300};
    const struct colocache_kvm_slot slot = {.slot = 3, .first_pfn = 40, .n_pages = 37};
    struct rig ours;
    struct colocache_source *log = NULL;
    rig_open(&ours, 1, n_pages, 4096, false);
    kernel_is_ours = true;
    CHECK_RC(0, colocache_source_kvm(ours.control_fd, &slot, 1, true, &log));
    for (page_that_is_said = 35; page_that_is_said < 64; page_that_is_said++) {
        gets = clears = 0;
        CHECK_RC(page_that_is_said < 37 ? 0 : COLOCACHE_E_LOG_LOST, colocache_sync_dirty_log(ours.cc, log));
        CHECK(gets == 1 && clears == (page_that_is_said < 37));
    }
    kernel_is_ours = false;
    ours.blocks[0].svm[40 + 35] = ours.blocks[0].svm[40 + 36] = 1;
    rig_check(&ours, false);
    CHECK_RC(0, colocache_source_close(log));
    rig_close(&ours);
}

static void wrong_slots_are_refused(void)
{
    struct colocache_source *log = (void *)1;
    struct colocache_kvm_slot slot = {.n_pages = 1};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_kvm(0, NULL, 1, 0, &log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_kvm(0, &slot, 0, 0, &log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_kvm(0, &slot, 1, 0, NULL));
    CHECK_RC(-EBADF, colocache_source_kvm(-1, &slot, 1, 0, &log));
    slot.n_pages = 0;
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_source_kvm(0, &slot, 1, 0, &log));
    slot.n_pages = ~0ull;
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_source_kvm(0, &slot, 1, 0, &log));
    CHECK(log == (void *)1);
}

int main(void)
{
    RUN(wrong_slots_are_refused);
    RUN(bits_past_the_end_of_a_slot_are_a_lost_log);
#if defined(__x86_64__)
    RUN(vcpu_writes_are_in_the_log_by_get);
    RUN(vcpu_writes_are_in_the_log_by_get_and_clear);
    RUN(a_log_that_was_got_and_not_taken_is_kept_by_get);
    RUN(a_log_that_was_got_and_not_taken_is_kept_by_get_and_clear);
#endif
    return DONE();
}
