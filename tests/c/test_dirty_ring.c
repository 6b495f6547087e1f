/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_ring.c with rings of the test's own, filled here as KVM would, and the reset of a real VM without vCPUs.  With vCPUs that
 * write: vmm_ring.c.
 */
#define _GNU_SOURCE
#include "bitmap.h"
#include "error.h"
#include "source.h"

#include "rig.h"

#if defined(__x86_64__)
#include <linux/kvm.h>
#include <sys/ioctl.h>

#define N_ENTRIES 256u

struct entry {
    uint32_t flags, slot;
    uint64_t page;
};

static const uint64_t blocks[] = {100, 70};
static struct rig rig;
static struct entry entries[N_ENTRIES];
static uint32_t n_written;
static int kvm = -1, vm = -1;

static bool begin(const struct colocache_kvm_slot *slots, uint32_t n_slots, struct colocache_source **log)
{
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING, .args = {sizeof entries}};
    if (vm < 0 || ioctl(vm, KVM_ENABLE_CAP, &cap) != 0) {
        close(vm);
        close(kvm);
        check_skip_reason = "there is no KVM with dirty rings here";
        return false;
    }
    rig_open(&rig, 2, blocks, 4096, false);
    memset(entries, 0, sizeof entries);
    n_written = 0;
    const struct colocache_kvm_ring ring = {.vcpu_fd = -1, .addr = entries};
    CHECK_RC(0, colocache_source_kvm_ring(vm, slots, n_slots, &ring, 1, sizeof entries, log));
    return true;
}

static void end(struct colocache_source *log)
{
    CHECK_RC(0, colocache_source_close(log));
    close(vm);
    close(kvm);
    rig_close(&rig);
}

static void kvm_writes(uint32_t slot, uint64_t page)
{
    entries[n_written++ % N_ENTRIES] = (struct entry){.flags = 1, .slot = slot, .page = page};
}

static const struct colocache_kvm_slot right[] = {{.slot = 4, .block = 1, .first_pfn = 3, .n_pages = 67},
                                                  {.slot = 2, .block = 0, .first_pfn = 0, .n_pages = 100}};

static void entries_are_in_the_log_once(void)
{
    struct colocache_source *log = NULL;
    if (!begin(right, 2, &log))
        return;
    for (uint32_t i = 0; i < 3; i++) {
        kvm_writes(2, 99);
        kvm_writes(4, 66);
        rig.blocks[0].svm[99] = rig.blocks[1].svm[69] = 1;
        CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
        rig_check(&rig, false);
    }
    end(log);
}

static void slots_that_fit_no_block_leave_the_ring_alone(void)
{
    struct colocache_source *log = NULL;
    const struct colocache_kvm_slot wrong[] = {right[0], {.slot = 2, .block = 0, .first_pfn = 1, .n_pages = 100}};
    if (!begin(wrong, 2, &log))
        return;
    kvm_writes(4, 10);
    CHECK_RC(COLOCACHE_E_RANGE, colocache_sync_dirty_log(rig.cc, log));
    CHECK_EQ(1, entries[0].flags);
    rig_check(&rig, false);
    end(log);
}

static int take_nothing(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    (void)context, (void)block, (void)first_pfn;
    for (uint64_t w = 0; w < cc_words_for(n_pages); w++) {
        if (words[w])
            return cc_fail(-ENOMEM, "no room for what the log says");
    }
    return 0;
}

static void what_was_not_taken_is_handed_on_again(void)
{
    struct colocache_source *log = NULL;
    if (!begin(right, 2, &log))
        return;
    kvm_writes(4, 10);
    CHECK_RC(-ENOMEM, log->sync(log, take_nothing, NULL));
    kvm_writes(2, 64);
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig.blocks[0].svm[64] = rig.blocks[1].svm[13] = 1;
    rig_check(&rig, false);
    end(log);
}

static void unknown_pages_are_lost_also_when_the_known_were_not_taken(void)
{
    struct colocache_source *log = NULL;
    if (!begin(right, 2, &log))
        return;
    kvm_writes(4, 10);
    kvm_writes(9, 10); /* a slot that the source was not given */
    CHECK_RC(-ENOMEM, log->sync(log, take_nothing, NULL));
    CHECK_RC(COLOCACHE_E_LOG_LOST, colocache_sync_dirty_log(rig.cc, log));
    rig.blocks[1].svm[13] = 1;
    rig_check(&rig, false);
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log)); /* told once */
    kvm_writes(2, 100);
    CHECK_RC(COLOCACHE_E_LOG_LOST, colocache_sync_dirty_log(rig.cc, log)); /* past the end of a slot */
    end(log);
}

static void slots_change_and_no_entry_is_lost(void)
{
    struct colocache_source *log = NULL;
    if (!begin(right, 2, &log))
        return;
    const struct colocache_kvm_slot changed[] = {{.slot = 5, .block = 1, .first_pfn = 0, .n_pages = 70}, right[1]};
    kvm_writes(4, 10); /* of a slot that goes */
    kvm_writes(2, 64);
    CHECK_RC(0, colocache_source_change_begin(log));
    CHECK_RC(COLOCACHE_E_ORDER, colocache_sync_dirty_log(rig.cc, log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_change_end(log, NULL, 0));
    const struct colocache_kvm_slot twice[] = {right[1], right[1]};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_change_end(log, twice, 2));
    CHECK_RC(0, colocache_source_change_end(log, changed, 2));
    kvm_writes(5, 69);
    CHECK_RC(0, colocache_sync_dirty_log(rig.cc, log));
    rig.blocks[0].svm[64] = rig.blocks[1].svm[13] = rig.blocks[1].svm[69] = 1;
    rig_check(&rig, false);
    kvm_writes(4, 10); /* it is gone */
    CHECK_RC(COLOCACHE_E_LOG_LOST, colocache_sync_dirty_log(rig.cc, log));
    end(log);
}

static int take_of_block_0(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    if (block != 0)
        return cc_fail(COLOCACHE_E_BLOCK, "block %u was removed", block);
    for (uint64_t i = 0; i < n_pages; i++)
        *(uint64_t *)context += words[i / 64] >> i % 64 & 1 ? first_pfn + i : 0;
    return 0;
}

static void what_was_kept_of_a_block_that_is_gone_holds_nothing_up(void)
{
    struct colocache_source *log = NULL;
    uint64_t pages = 0;
    if (!begin(right, 2, &log))
        return;
    kvm_writes(4, 10);
    kvm_writes(2, 64);
    CHECK_RC(0, colocache_source_change_begin(log));
    CHECK_RC(0, colocache_source_change_end(log, &right[1], 1));
    kvm_writes(2, 3);
    CHECK_RC(0, cc_source_sync(log, take_of_block_0, &pages));
    CHECK_EQ(67, pages);
    end(log);
}
#endif

int main(void)
{
#if defined(__x86_64__)
    RUN(entries_are_in_the_log_once);
    RUN(slots_that_fit_no_block_leave_the_ring_alone);
    RUN(what_was_not_taken_is_handed_on_again);
    RUN(slots_change_and_no_entry_is_lost);
    RUN(what_was_kept_of_a_block_that_is_gone_holds_nothing_up);
    RUN(unknown_pages_are_lost_also_when_the_known_were_not_taken);
#endif
    return DONE();
}
