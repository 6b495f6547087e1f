/* SPDX-License-Identifier: Apache-2.0 */
/* The slots of dirty_kvm.c on the real /dev/kvm: probed when they are named, changed without a page lost, never believed to be shorter. */
#define _GNU_SOURCE
#include "source.h"
#include "bitmap.h"
#include "error.h"

#include "kvm_rig.h"

#if defined(__x86_64__)

/* Each is told when the source is made: a slot found to be without a log at a checkpoint would cost a copy of all of RAM. */
static void slots_that_have_no_log_are_refused_when_the_source_is_made(bool manual_protect)
{
    struct colocache_source *log = NULL, *none = (void *)1;
    if (!begin(manual_protect, &log))
        return;
    void *spare = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region unlogged = {
        .slot = 9, .guest_phys_addr = 2 << 20, .memory_size = 64 * 4096, .userspace_addr = (uint64_t)(uintptr_t)spare};
    REQUIRE(spare != MAP_FAILED && ioctl(vm, KVM_SET_USER_MEMORY_REGION, &unlogged) == 0);
    const uint16_t pages[] = {5, 36, 37, 150};
    CHECK_RC(0, colocache_source_discard(log));
    bool wrote = guest_writes(pages, 4);
    struct colocache_kvm_slot slot = {.slot = 99, .n_pages = 1};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_kvm(vm, &slot, 1, 0, &none));
    slot = (struct colocache_kvm_slot){.slot = 9, .n_pages = 64};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_kvm(vm, &slot, 1, 0, &none));
    CHECK(strstr(colocache_last_error(), "slot 9") && strstr(colocache_last_error(), "KVM_MEM_LOG_DIRTY_PAGES"));
    static const uint64_t wrong_lengths[] = {1, 36, 38, 64, 128, 1ull << 31, (1ull << 31) + 64, (1ull << 32) + 37};
    for (unsigned i = 0; i < sizeof wrong_lengths / sizeof wrong_lengths[0]; i++) {
        slot = (struct colocache_kvm_slot){.slot = 3, .n_pages = wrong_lengths[i]};
        CHECK_RC(COLOCACHE_E_LENGTH, colocache_source_kvm(vm, &slot, 1, 0, &none));
        slot.slot = 7;
        CHECK_RC(COLOCACHE_E_LENGTH, colocache_source_kvm(vm, &slot, 1, 0, &none));
    }
    unlogged.flags = KVM_MEM_LOG_DIRTY_PAGES; /* 64 pages, and later 128: multiples of 64, which a shorter length may be too */
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &unlogged) == 0);
    slot = (struct colocache_kvm_slot){.slot = 9, .block = 0, .n_pages = 64};
    CHECK_RC(0, colocache_source_kvm(vm, &slot, 1, 0, &none));
    CHECK_RC(0, colocache_source_close(none));
    none = (void *)1;
    slot.n_pages = 128;
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_source_kvm(vm, &slot, 1, 0, &none));
    const int no_vms[] = {open("/dev/null", O_RDWR | O_CLOEXEC), rig.control_fd, kvm, vcpu};
    for (unsigned i = 0; i < 4; i++) {
        CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_kvm(no_vms[i], &slot, 1, 0, &none));
        CHECK(strstr(colocache_last_error(), "no VM"));
    }
    close(no_vms[0]);
    CHECK(none == (void *)1);
    if (wrote) { /* and asking took nothing from the log */
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, false);
    }
    munmap(spare, 64 * 4096);
    end(log);
}

static void slots_without_a_log_are_refused_by_get(void)
{
    slots_that_have_no_log_are_refused_when_the_source_is_made(false);
}

static void slots_without_a_log_are_refused_by_get_and_clear(void)
{
    slots_that_have_no_log_are_refused_when_the_source_is_made(true);
}

static void a_vm_that_is_gone_is_a_lost_log(void)
{
    struct colocache_source *log = NULL;
    if (!begin(false, &log))
        return;
    struct kvm_userspace_memory_region gone = {.slot = 7};
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &gone) == 0); /* without a word to the source */
    CHECK_RC(COLOCACHE_E_LOG_LOST, colocache_sync_dirty_log(rig.cc, log));
    end(log);
}

/* Removed, added and made longer, with pages written before and after: none is lost, whichever slot it lay in. */
static void slots_change_and_no_page_is_lost(bool manual_protect)
{
    struct colocache_source *log = NULL;
    if (!begin(manual_protect, &log))
        return;
    CHECK_RC(0, colocache_source_discard(log));
    const uint16_t before[] = {5, 36, 37, 150}, after[] = {6, 36, 38, 199};
    if (!guest_writes(before, 4)) {
        end(log);
        return;
    }
    const struct colocache_kvm_slot none = {.slot = 3, .n_pages = SPLIT}, changed[] = {{.slot = 4, .first_pfn = 0, .n_pages = 64},
                                                                                       {.slot = 8, .first_pfn = 64, .n_pages = PAGES - 64}};
    CHECK_RC(COLOCACHE_E_ORDER, colocache_source_change_end(log, &none, 1));
    CHECK_RC(0, colocache_source_change_begin(log));
    CHECK_RC(COLOCACHE_E_ORDER, colocache_source_change_begin(log));
    CHECK_RC(COLOCACHE_E_ORDER, colocache_sync_dirty_log(rig.cc, log));
    struct kvm_userspace_memory_region region = {.slot = 3};
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    region.slot = 7;
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    for (unsigned i = 0; i < 2; i++) {
        region = (struct kvm_userspace_memory_region){.slot = changed[i].slot,
                                                      .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                                      .guest_phys_addr = changed[i].first_pfn * 4096,
                                                      .memory_size = changed[i].n_pages * 4096,
                                                      .userspace_addr = (uint64_t)(uintptr_t)(guest + changed[i].first_pfn * 4096)};
        REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    }
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_change_end(log, &none, 1)); /* gone: and the change goes on */
    CHECK_RC(0, colocache_source_change_end(log, changed, 2));
    guest_writes(after, 4);
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig_check(&rig, false);
    const uint16_t later[] = {63, 64};
    guest_writes(later, 2);
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig_check(&rig, false);
    CHECK_RC(0, colocache_source_change_begin(log)); /* what is kept goes with the source */
    end(log);
}

static void slots_change_by_get(void)
{
    slots_change_and_no_page_is_lost(false);
}

static void slots_change_by_get_and_clear(void)
{
    slots_change_and_no_page_is_lost(true);
}

static void slots_that_fit_no_block_are_refused_before_the_log_is_got(void)
{
    struct colocache_source *log = NULL, *wrong = NULL;
    if (!begin(false, &log))
        return;
    const uint16_t pages[] = {5, 36, 37, 150};
    CHECK_RC(0, colocache_source_discard(log));
    if (guest_writes(pages, 4)) {
        const struct colocache_kvm_slot past_end[] = {{.slot = 3, .block = 0, .first_pfn = 0, .n_pages = SPLIT},
                                                      {.slot = 7, .block = 0, .first_pfn = SPLIT + 1, .n_pages = PAGES - SPLIT}};
        CHECK_RC(0, colocache_source_kvm(vm, past_end, 2, 0, &wrong));
        CHECK_RC(COLOCACHE_E_RANGE, colocache_sync_dirty_log(rig.cc, wrong));
        CHECK_RC(0, colocache_source_close(wrong));
        const struct colocache_kvm_slot no_block[] = {{.slot = 7, .block = 9, .first_pfn = 0, .n_pages = PAGES - SPLIT}};
        CHECK_RC(0, colocache_source_kvm(vm, no_block, 1, 0, &wrong));
        CHECK_RC(COLOCACHE_E_BLOCK, colocache_sync_dirty_log(rig.cc, wrong));
        CHECK_RC(0, colocache_source_close(wrong));
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, false); /* every page the vCPU wrote is still in the log */
    }
    end(log);
}

/* KVM writes as many bits as its slot has now, into whatever stands behind a buffer that is too small. */
static void a_slot_made_larger_in_secret_is_a_lost_log_and_spoils_nothing(bool manual_protect, uint64_t before, uint64_t later)
{
    struct colocache_source *log = NULL, *mine = NULL;
    if (!begin(manual_protect, &log))
        return;
    void *spare = mmap(NULL, later * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {.slot = 9,
                                                 .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                                 .guest_phys_addr = 1 << 30,
                                                 .memory_size = before * 4096,
                                                 .userspace_addr = (uint64_t)(uintptr_t)spare};
    REQUIRE(spare != MAP_FAILED && ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    const struct colocache_kvm_slot slot = {.slot = 9, .n_pages = before};
    CHECK_RC(0, colocache_source_kvm(vm, &slot, 1, manual_protect, &mine));
    region.memory_size = 0;
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    region.memory_size = later * 4096;
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    int rc = colocache_sync_dirty_log(rig.cc, mine);
    CHECK(rc == COLOCACHE_E_LOG_LOST || rc == COLOCACHE_E_RANGE || rc == 0);
    if (cc_words_for(later) > cc_words_for(before))
        CHECK(rc == COLOCACHE_E_LOG_LOST && strstr(colocache_last_error(), "slot 9"));
    CHECK_RC(0, colocache_source_close(mine));
    munmap(spare, later * 4096);
    end(log);
}

static void a_larger_slot_is_a_lost_log_by_get(void)
{
    a_slot_made_larger_in_secret_is_a_lost_log_and_spoils_nothing(false, 64, 163);
}

static void a_larger_slot_is_a_lost_log_by_get_and_clear(void)
{
    a_slot_made_larger_in_secret_is_a_lost_log_and_spoils_nothing(true, 64, 163);
}
#endif

int main(void)
{
#if defined(__x86_64__)
    RUN(slots_without_a_log_are_refused_by_get);
    RUN(slots_without_a_log_are_refused_by_get_and_clear);
    RUN(a_vm_that_is_gone_is_a_lost_log);
    RUN(slots_change_by_get);
    RUN(slots_change_by_get_and_clear);
    RUN(slots_that_fit_no_block_are_refused_before_the_log_is_got);
    RUN(a_larger_slot_is_a_lost_log_by_get);
    RUN(a_larger_slot_is_a_lost_log_by_get_and_clear);
#endif
    return DONE();
}
