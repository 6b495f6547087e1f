/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvm_rig.h -- a machine of one vCPU on the real /dev/kvm, in real mode, whose program writes a byte to each page of a list, over a RAM
 * block behind two memory slots that meet at a page which is no multiple of 64.
 */
#ifndef KVM_RIG_H
#define KVM_RIG_H

#include "rig.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

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

#endif
#endif
