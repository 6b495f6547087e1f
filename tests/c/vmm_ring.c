/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_ring.c -- KVM's dirty rings under a real vCPU: every page it wrote is in the SVM bitmap, whatever the ring went through.
 *
 * The guest's working set is larger than its ring, so the vCPU comes out with "ring full" and its own thread harvests while
 * it waits.  After each round colocache_validate compares guest RAM with the cache: a page that differs and has no bit
 * is a page the ring lost.  Exit status 77: this machine has no KVM or no rings.
 */
#define _GNU_SOURCE
#include <colocache.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "vmm_guest.h"

#define BOOT_PAGES 131u
#define RAM_PAGES 8201u   /* no multiple of 64 */
#define RING_BYTES 65536u /* 4096 entries: fewer than the working set has pages */

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition, colocache_last_error()); \
            exit(1); \
        } \
    } while (0)

struct vmm {
    struct colocache *cache;
    struct colocache_source *log;
    struct guest guest;
    int error_in_thread;
};

static void ring_full(void *context)
{
    struct vmm *vmm = context;
    int rc = colocache_sync_dirty_log(vmm->cache, vmm->log);
    if (rc)
        vmm->error_in_thread = rc;
}

static int memory(uint64_t n_bytes)
{
    int fd = memfd_create("vmm_ring", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0);
    return fd;
}

static void epoch(struct vmm *vmm, uint64_t number, struct colocache_seal_result *sealed)
{
    void *room;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = number, .n_pages = COLOCACHE_ANY_COUNT};
    struct colocache_flush_result flushed = {.struct_size = sizeof flushed};
    sealed->struct_size = sizeof *sealed;
    CHECK(colocache_device_state_begin(vmm->cache, number, 0, &room) == 0);
    CHECK(colocache_seal(vmm->cache, &args, sealed) == 0);
    CHECK(colocache_flush(vmm->cache, &flushed) == 0);
    CHECK(colocache_loaded(vmm->cache, 1) == 0);
}

static void run_for(struct vmm *vmm, uint64_t n_steps)
{
    const struct timespec moment = {.tv_nsec = 2000000};
    uint64_t until = vmm->guest.box->step + n_steps;
    guest_resume(&vmm->guest);
    while (vmm->guest.box->step < until && !guest_failed(&vmm->guest))
        nanosleep(&moment, NULL);
    guest_pause(&vmm->guest);
    CHECK(!guest_failed(&vmm->guest) && vmm->error_in_thread == 0);
}

/* one_round -- the guest runs, its ring is taken, an epoch comes; guest RAM must be the cache again */
static void one_round(struct vmm *vmm, uint64_t number, uint64_t n_steps, bool fills)
{
    struct colocache_block_info block;
    struct colocache_seal_result sealed;
    uint64_t before = vmm->guest.n_ring_full;
    run_for(vmm, n_steps);
    CHECK(!fills || vmm->guest.n_ring_full > before);
    CHECK(colocache_sync_dirty_log(vmm->cache, vmm->log) == 0);
    CHECK(colocache_validate(vmm->cache, 1) == 0);
    uint64_t differ = 0;
    for (uint32_t b = 0; b < 2; b++) {
        CHECK(colocache_get_block(vmm->cache, b, &block) == 0);
        for (uint64_t page = 0; page < block.n_pages; page++)
            differ += memcmp((char *)block.guest_addr + page * 4096, (char *)block.cache_addr + page * 4096, 4096) != 0;
    }
    CHECK(differ > n_steps / 8);
    CHECK(colocache_receive_zero(vmm->cache, number, 1, 7, 1) == 0);
    epoch(vmm, number, &sealed);
    CHECK(sealed.svm_pages + sealed.both_pages >= differ);
    CHECK(sealed.svm_pages + sealed.both_pages <= RAM_PAGES); /* each page once, however often it was in the ring */
    for (uint32_t b = 0; b < 2; b++) {
        CHECK(colocache_get_block(vmm->cache, b, &block) == 0);
        CHECK(memcmp(block.guest_addr, block.cache_addr, block.len_bytes) == 0);
    }
}

static void refusals(struct vmm *vmm, const struct colocache_kvm_slot *slots)
{
    struct colocache_source *source = NULL;
    struct colocache_kvm_ring ring = {.vcpu_fd = vmm->guest.vcpu};
    const struct colocache_kvm_slot twice[] = {slots[0], slots[0]}, empty = {.slot = 9};
    int vm = vmm->guest.vm;
    CHECK(colocache_source_kvm_ring(vm, slots, 0, &ring, 1, RING_BYTES, &source) == COLOCACHE_E_ARGUMENT);
    CHECK(colocache_source_kvm_ring(vm, slots, 3, &ring, 1, 5000, &source) == COLOCACHE_E_ARGUMENT);
    CHECK(colocache_source_kvm_ring(vm, twice, 2, &ring, 1, RING_BYTES, &source) == COLOCACHE_E_ARGUMENT);
    CHECK(colocache_source_kvm_ring(vm, &empty, 1, &ring, 1, RING_BYTES, &source) == COLOCACHE_E_LENGTH);
    CHECK(colocache_source_kvm_ring(-1, slots, 3, &ring, 1, RING_BYTES, &source) < 0);
    ring.vcpu_fd = vm; /* not a vCPU: nothing to map */
    CHECK(colocache_source_kvm_ring(vm, slots, 3, &ring, 1, RING_BYTES, &source) < 0);
    ring.addr = (void *)4095;
    CHECK(colocache_source_kvm_ring(vm, slots, 3, &ring, 1, RING_BYTES, &source) == COLOCACHE_E_ARGUMENT);
    CHECK(source == NULL);
}

/* unknown_pages_are_lost_not_ignored -- a source that was not given all logged slots says so, and its own slots still come */
static void unknown_pages_are_lost_not_ignored(struct vmm *vmm, const struct colocache_kvm_slot *slots, void *ring_addr)
{
    struct colocache_kvm_ring ring = {.vcpu_fd = -1, .addr = ring_addr};
    struct colocache_source *whole = vmm->log;
    CHECK(colocache_source_kvm_ring(vmm->guest.vm, slots, 2, &ring, 1, RING_BYTES, &vmm->log) == 0);
    vmm->guest.ring_full = NULL;
    vmm->guest.box->n_pages = 64;
    vmm->guest.box->first_page = vmm->guest.split - 32;
    run_for(vmm, 2000);
    CHECK(colocache_sync_dirty_log(vmm->cache, vmm->log) == COLOCACHE_E_LOG_LOST);
    CHECK(strstr(colocache_last_error(), "dirty_log_lost") != NULL);
    struct colocache_block_info ram;
    CHECK(colocache_get_block(vmm->cache, 1, &ram) == 0 && ram.svm_pages >= 30);
    CHECK(colocache_dirty_log_lost(vmm->cache) == 0);
    CHECK(colocache_get_block(vmm->cache, 1, &ram) == 0 && ram.svm_pages == RAM_PAGES);
    colocache_source_close(vmm->log);
    vmm->log = whole;
}

int main(void)
{
    struct vmm vmm = {0};
    const uint64_t n_pages[2] = {BOOT_PAGES, RAM_PAGES};
    struct colocache_block_info info[2];
    struct colocache_seal_result sealed;
    int control = memory(0), ram = memory((BOOT_PAGES + RAM_PAGES) * 4096ull), cache = memory((BOOT_PAGES + RAM_PAGES) * 4096ull);
    CHECK(colocache_create(control, NULL, &vmm.cache) == 0);
    for (uint32_t i = 0; i < 2; i++) {
        struct colocache_images images = {.struct_size = sizeof images,
                                          .name = i ? "pc.ram" : "boot",
                                          .len_bytes = n_pages[i] * 4096,
                                          .page_size = 4096,
                                          .guest_fd = ram,
                                          .cache_fd = cache,
                                          .guest_offset = i * BOOT_PAGES * 4096ull,
                                          .cache_offset = i * BOOT_PAGES * 4096ull};
        CHECK(colocache_add_block(vmm.cache, &images, NULL) == 0);
        CHECK(colocache_get_block(vmm.cache, i, &info[i]) == 0);
    }
    int rc = guest_create(&vmm.guest, info[0].guest_addr, BOOT_PAGES, info[1].guest_addr, RAM_PAGES, RING_BYTES);
    if (rc)
        return 77;
    vmm.guest.context = &vmm;
    vmm.guest.ring_full = ring_full;
    const struct colocache_kvm_slot slots[GUEST_SLOTS] = {
        {.slot = 0, .block = 0, .first_pfn = 0, .n_pages = BOOT_PAGES},
        {.slot = 1, .block = 1, .first_pfn = 0, .n_pages = vmm.guest.split},
        {.slot = 2, .block = 1, .first_pfn = vmm.guest.split, .n_pages = RAM_PAGES - vmm.guest.split},
    };
    refusals(&vmm, slots);
    struct colocache_kvm_ring ring = {.vcpu_fd = vmm.guest.vcpu};
    CHECK(colocache_source_kvm_ring(vmm.guest.vm, slots, GUEST_SLOTS, &ring, 1, RING_BYTES, &vmm.log) == 0);
    CHECK(colocache_source_discard(vmm.log) == 0);

    guest_boot(&vmm.guest);
    for (uint64_t page = 0; page < BOOT_PAGES; page++)
        CHECK(colocache_receive_page(vmm.cache, 1, 0, page, vmm.guest.boot + page * 4096, 4096) == 0);
    epoch(&vmm, 1, &sealed);
    one_round(&vmm, 2, 12000, true);
    one_round(&vmm, 3, 50, false);
    one_round(&vmm, 4, 9000, true);
    struct colocache_stats stats = {.struct_size = sizeof stats};
    CHECK(colocache_get_stats(vmm.cache, &stats) == 0);
    CHECK(stats.sealed_epochs == 4 && stats.epoch == 4 && stats.received_pages == BOOT_PAGES + 3);
    CHECK(stats.sync_ns && stats.seal_ns && stats.flush_ns && stats.flushed_bytes == stats.flushed_pages * 4096);
    CHECK(guest_verify(&vmm.guest) != 0); /* the flushes took the guest's own writes away: the check above saw real pages */

    /* The ring's position belongs to its source: a second one on the same ring needs a fresh VM. */
    colocache_source_close(vmm.log);
    guest_destroy(&vmm.guest);
    rc = guest_create(&vmm.guest, info[0].guest_addr, BOOT_PAGES, info[1].guest_addr, RAM_PAGES, RING_BYTES);
    CHECK(rc == 0);
    vmm.guest.context = &vmm;
    void *mapped =
        mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vmm.guest.vcpu, KVM_DIRTY_LOG_PAGE_OFFSET * sysconf(_SC_PAGESIZE));
    CHECK(mapped != MAP_FAILED);
    vmm.log = NULL;
    unknown_pages_are_lost_not_ignored(&vmm, slots, mapped);
    munmap(mapped, RING_BYTES);
    guest_destroy(&vmm.guest);
    CHECK(colocache_close(vmm.cache) == 0);
    close(control), close(ram), close(cache);
    return 0;
}
