/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_kvm.c on the real /dev/kvm: a machine of one vCPU in real mode whose program writes a byte to each page of a list, over a
 * RAM block behind two memory slots that meet at a page which is no multiple of 64.
 */
#define _GNU_SOURCE
#include "source.h"
#include "error.h"
#include "bitmap.h"

#include "rig.h"

#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#if defined(__x86_64__)

#define PAGES 200u /* below 1 MiB: real mode reaches it */
#define SPLIT 37u
#define CODE_PAGE 0u
#define LIST_PAGE 1u /* u16 segments, 0xffff ends it */

static const uint64_t blocks[] = {PAGES};
static struct rig rig;
static uint8_t *guest;
static int kvm = -1, vm = -1, vcpu = -1;
static struct kvm_run *run;
static int run_bytes;

/*     mov si, 0x1000
 * 1:  lodsw                 ; the segment of a page: its number times 256
 *     cmp ax, 0xffff
 *     je 2f
 *     mov es, ax
 *     inc byte [es:0x20]
 *     jmp 1b
 * 2:  hlt                                                                                       */
static const uint8_t program[] = {0xbe, 0x00, 0x10, 0xad, 0x3d, 0xff, 0xff, 0x74, 0x09, 0x8e,
                                  0xc0, 0x26, 0xfe, 0x06, 0x20, 0x00, 0xeb, 0xf1, 0xf4};

static bool begin(bool manual_protect, struct colocache_source **log)
{
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        check_skip_reason = "/dev/kvm can't be opened here";
        return false;
    }
    if (manual_protect && !(ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)) {
        close(kvm);
        check_skip_reason = "this KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
        return false;
    }
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0) {
        close(kvm);
        check_skip_reason = "KVM_CREATE_VM is refused here";
        return false;
    }
    rig_open(&rig, 1, blocks, 4096, false);
    struct colocache_block_info info;
    CHECK_RC(0, colocache_get_block(rig.cc, 0, &info));
    guest = info.guest_addr;
    (void)ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
    if (manual_protect) {
        struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}};
        REQUIRE(ioctl(vm, KVM_ENABLE_CAP, &cap) == 0);
    }
    struct kvm_userspace_memory_region low = {.slot = 3,
                                              .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                              .guest_phys_addr = 0,
                                              .memory_size = SPLIT * 4096,
                                              .userspace_addr = (uint64_t)(uintptr_t)guest};
    struct kvm_userspace_memory_region high = {.slot = 7,
                                               .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                               .guest_phys_addr = SPLIT * 4096,
                                               .memory_size = (PAGES - SPLIT) * 4096,
                                               .userspace_addr = (uint64_t)(uintptr_t)(guest + SPLIT * 4096)};
    REQUIRE(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &low) == 0 && ioctl(vm, KVM_SET_USER_MEMORY_REGION, &high) == 0);
    vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    run_bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    REQUIRE(vcpu >= 0 && run_bytes > 0);
    run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    REQUIRE(run != MAP_FAILED);
    const struct colocache_kvm_slot slots[] = {{.slot = 3, .block = 0, .first_pfn = 0, .n_pages = SPLIT},
                                               {.slot = 7, .block = 0, .first_pfn = SPLIT, .n_pages = PAGES - SPLIT}};
    CHECK_RC(0, colocache_source_kvm(vm, slots, 2, manual_protect, log));
    return true;
}

static void end(struct colocache_source *log)
{
    CHECK_RC(0, colocache_source_close(log));
    munmap(run, (size_t)run_bytes);
    close(vcpu);
    close(vm);
    close(kvm);
    rig_close(&rig);
}

/* user_write -- the VMM writes guest RAM: in no log of KVM's */
static void user_write(uint64_t at, const void *bytes, uint64_t n)
{
    memcpy(guest + at, bytes, n);
    memcpy(rig.blocks[0].guest_oracle + at, bytes, n);
}

/* guest_writes -- the vCPU writes these pages and halts */
static bool guest_writes(const uint16_t *pfns, unsigned n)
{
    uint16_t list[64];
    REQUIRE(n < 64);
    for (unsigned i = 0; i < n; i++)
        list[i] = (uint16_t)(pfns[i] * 256);
    list[n] = 0xffff;
    user_write(CODE_PAGE * 4096, program, sizeof program);
    user_write(LIST_PAGE * 4096, list, 2 * (n + 1));
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = 0, .rflags = 2};
    REQUIRE(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.ds.base = sregs.es.base = 0;
    sregs.cs.selector = sregs.ds.selector = sregs.es.selector = 0;
    REQUIRE(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0 && ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
    int rc;
    do {
        rc = ioctl(vcpu, KVM_RUN, 0);
    } while (rc < 0 && errno == EINTR);
    if (rc < 0 || run->exit_reason != KVM_EXIT_HLT) {
        CHECK_SAY("the vCPU ended with %d, exit reason %u", rc, run->exit_reason);
        return false;
    }
    for (unsigned i = 0; i < n; i++) {
        rig.blocks[0].guest_oracle[pfns[i] * 4096 + 0x20]++;
        rig.blocks[0].svm[pfns[i]] = 1;
    }
    return true;
}

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
    RUN(slots_without_a_log_are_refused_by_get);
    RUN(slots_without_a_log_are_refused_by_get_and_clear);
    RUN(a_vm_that_is_gone_is_a_lost_log);
    RUN(slots_change_by_get);
    RUN(slots_change_by_get_and_clear);
    RUN(slots_that_fit_no_block_are_refused_before_the_log_is_got);
    RUN(a_log_that_was_got_and_not_taken_is_kept_by_get);
    RUN(a_log_that_was_got_and_not_taken_is_kept_by_get_and_clear);
    RUN(a_larger_slot_is_a_lost_log_by_get);
    RUN(a_larger_slot_is_a_lost_log_by_get_and_clear);
#endif
    return DONE();
}
