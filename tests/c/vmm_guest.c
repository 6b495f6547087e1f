/* SPDX-License-Identifier: Apache-2.0 */
/* vmm_guest.c -- see vmm_guest.h. */
#define _GNU_SOURCE
#include "vmm_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define MAILBOX_ADDR (8ull << 20)
#define MAILBOX_BYTES (4 * GUEST_PAGE_SIZE) /* the struct, then the stack */
#define LOW_ADDR (16ull << 20)
#define HOLE_ADDR (3ull << 30)
#define HIGH_ADDR (4ull << 30)
#define HUGE (2ull << 20)
#define FIRST_PD_PAGE 3u
#define CODE_PAGES 2u
#define PROGRAM_OFFSET 32u
#define EXIT_PORT 0x10
#define EXIT_RING_FULL 31u
#define RFLAGS_IOPL3 0x3002u
#define BURST 32u /* steps between two looks outside */

struct state_header { /* little-endian; then records of blocks, history, registers, hashes, a hash of it all */
    char magic[8];
    uint32_t version;
    char kind[12]; /* of guest, by name */
    uint64_t total;
    uint32_t flags, n_blocks, n_history, n_registers;
    uint64_t program, step, loads, nonce, first_page, n_pages, run_pages, rewrite_below, run_below;
};

struct state_block {
    char name[32];
    uint64_t n_pages;
    uint32_t page_size, reserved;
};

_Static_assert(sizeof(struct state_header) == 120 && sizeof(struct state_block) == 48, "as the Python machine packs them");

static int fail(const char *what)
{
    fprintf(stderr, "vmm_guest: %s: %s\n", what, strerror(errno));
    return -1;
}

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * GUEST_MIX_1;
    x = (x ^ x >> 27) * GUEST_MIX_2;
    return x ^ x >> 31;
}

static uint64_t code_page(const struct guest *guest)
{
    return FIRST_PD_PAGE + (HIGH_ADDR + (guest->boot_pages + guest->ram_pages) * GUEST_PAGE_SIZE + HUGE - 1) / (1ull << 30) + 1;
}

/* ---- KVM ------------------------------------------------------------------------------------------------------- */

static int set_slot(struct guest *guest, uint32_t slot, uint64_t gpa, void *addr, uint64_t n_bytes, bool logged)
{
    struct kvm_userspace_memory_region region = {.slot = slot,
                                                 .flags = logged ? KVM_MEM_LOG_DIRTY_PAGES : 0,
                                                 .guest_phys_addr = gpa,
                                                 .memory_size = n_bytes,
                                                 .userspace_addr = (uint64_t)(uintptr_t)addr};
    return ioctl(guest->vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static int enable(struct guest *guest, uint32_t cap, uint64_t arg)
{
    struct kvm_enable_cap enable = {.cap = cap, .args = {arg}};
    return ioctl(guest->vm, KVM_ENABLE_CAP, &enable);
}

static int make_vm(struct guest *guest)
{
    guest->vm = ioctl(guest->kvm, KVM_CREATE_VM, 0);
    if (guest->vm < 0)
        return fail("KVM_CREATE_VM");
    (void)ioctl(guest->vm, KVM_SET_TSS_ADDR, 12ul << 20); /* older Intel CPUs only */
    if (guest->ring_bytes && enable(guest, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, guest->ring_bytes) != 0 &&
        enable(guest, KVM_CAP_DIRTY_LOG_RING, guest->ring_bytes) != 0)
        return fail("enabling the dirty ring");
    if (!guest->ring_bytes)
        guest->manual_protect = enable(guest, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) == 0;
    void *mailbox = mmap(NULL, MAILBOX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (mailbox == MAP_FAILED)
        return fail("mmap of the mailbox");
    guest->box = mailbox;
    guest->box->split_page = guest->split;
    guest->box->low_addr = LOW_ADDR;
    guest->box->high_addr = guest->high_addr;
    uint64_t low_bytes = guest->split * GUEST_PAGE_SIZE, high_bytes = (guest->ram_pages - guest->split) * GUEST_PAGE_SIZE;
    if (set_slot(guest, 0, 0, guest->boot, guest->boot_pages * GUEST_PAGE_SIZE, true) != 0 ||
        set_slot(guest, 1, LOW_ADDR, guest->ram, low_bytes, true) != 0 ||
        set_slot(guest, 2, guest->high_addr, guest->ram + low_bytes, high_bytes, true) != 0 ||
        set_slot(guest, 3, MAILBOX_ADDR, mailbox, MAILBOX_BYTES, false) != 0)
        return fail("KVM_SET_USER_MEMORY_REGION");
    return 0;
}

static int make_vcpu(struct guest *guest)
{
    union { /* the kernel's struct ends in an array whose length it leaves to us */
        struct kvm_cpuid2 head;
        uint8_t room[sizeof(struct kvm_cpuid2) + 256 * sizeof(struct kvm_cpuid_entry2)];
    } cpuid = {.head = {.nent = 256}};
    struct kvm_sregs sregs;
    guest->vcpu = ioctl(guest->vm, KVM_CREATE_VCPU, 0);
    int run_bytes = ioctl(guest->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (guest->vcpu < 0 || run_bytes < 0)
        return fail("KVM_CREATE_VCPU");
    guest->run_bytes = (uint64_t)run_bytes;
    guest->run = mmap(NULL, guest->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, guest->vcpu, 0);
    if (guest->run == MAP_FAILED || ioctl(guest->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) != 0 ||
        ioctl(guest->vcpu, KVM_SET_CPUID2, &cpuid) != 0 || ioctl(guest->vcpu, KVM_GET_SREGS, &sregs) != 0)
        return fail("setting up the vCPU");
    struct kvm_segment segment = {.limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
    sregs.cs = segment;
    segment.selector = 0x2b;
    segment.type = 3;
    segment.l = 0;
    segment.db = 1;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment;
    sregs.cr0 = 0x80050033;
    sregs.cr3 = GUEST_PAGE_SIZE;
    sregs.cr4 = 0x620;
    sregs.efer = 0xd01;
    struct kvm_regs regs = {.rip = code_page(guest) * GUEST_PAGE_SIZE, .rsp = MAILBOX_ADDR + MAILBOX_BYTES, .rflags = RFLAGS_IOPL3};
    if (ioctl(guest->vcpu, KVM_SET_SREGS, &sregs) != 0 || ioctl(guest->vcpu, KVM_SET_REGS, &regs) != 0)
        return fail("setting the vCPU's registers");
    return 0;
}

/* ---- the vCPU's thread -------------------------------------------------------------------------------------------- */

/* run_once -- into the guest until it says OUT; NULL, or why it can't go on */
static const char *run_once(struct guest *guest)
{
    for (;;) {
        if (ioctl(guest->vcpu, KVM_RUN, 0) != 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            return "KVM_RUN failed";
        }
        if (guest->run->exit_reason == EXIT_RING_FULL && guest->ring_full) {
            guest->n_ring_full++;
            guest->ring_full(guest->context);
            continue;
        }
        if (guest->run->exit_reason != KVM_EXIT_IO || guest->run->io.port != EXIT_PORT) {
            fprintf(stderr, "vmm_guest: exit reason %u\n", guest->run->exit_reason);
            return "the vCPU came out for a reason this guest does not have";
        }
        guest->run->immediate_exit = 1; /* KVM moves the vCPU past an OUT only when it is run again */
        (void)ioctl(guest->vcpu, KVM_RUN, 0);
        guest->run->immediate_exit = 0;
        return NULL;
    }
}

static void *vcpu_thread(void *arg)
{
    struct guest *guest = arg;
    const struct timespec nap = {.tv_nsec = 1000000};
    pthread_mutex_lock(&guest->lock);
    while (!guest->quit) {
        if (!guest->wanted || guest->failure) {
            guest->running = false;
            pthread_cond_broadcast(&guest->changed);
            pthread_cond_wait(&guest->changed, &guest->lock);
            continue;
        }
        guest->running = true;
        pthread_mutex_unlock(&guest->lock);
        guest->box->limit = guest->box->step + BURST;
        const char *failure = run_once(guest);
        (void)nanosleep(&nap, NULL);
        pthread_mutex_lock(&guest->lock);
        guest->failure = failure;
    }
    guest->running = false;
    pthread_mutex_unlock(&guest->lock);
    return NULL;
}

static void set_wanted(struct guest *guest, bool wanted)
{
    pthread_mutex_lock(&guest->lock);
    guest->wanted = wanted;
    guest->box->stop = !wanted;
    pthread_cond_broadcast(&guest->changed);
    while (!wanted && guest->running)
        pthread_cond_wait(&guest->changed, &guest->lock);
    pthread_mutex_unlock(&guest->lock);
}

void guest_resume(struct guest *guest)
{
    uint64_t salt = 0;
    if (getrandom(&salt, sizeof salt, 0) != sizeof salt)
        salt = (uint64_t)time(NULL) * GUEST_STEP;
    guest->history = realloc(guest->history, (guest->n_history + 1) * sizeof *guest->history);
    if (!guest->history)
        abort();
    guest->history[guest->n_history++] = (struct guest_history){guest->box->step, salt};
    guest->box->salt = salt;
    set_wanted(guest, true);
}

void guest_pause(struct guest *guest)
{
    set_wanted(guest, false);
}

bool guest_failed(struct guest *guest)
{
    pthread_mutex_lock(&guest->lock);
    bool failed = guest->failure != NULL;
    pthread_mutex_unlock(&guest->lock);
    return failed;
}

int guest_create(struct guest *guest, uint8_t *boot, uint64_t boot_pages, uint8_t *ram, uint64_t ram_pages, uint32_t ring_bytes)
{
    uint64_t split = ram_pages * 5 / 8, most = (HOLE_ADDR - LOW_ADDR) / GUEST_PAGE_SIZE - 64;
    memset(guest, 0, sizeof *guest);
    guest->boot = boot;
    guest->ram = ram;
    guest->boot_pages = boot_pages;
    guest->ram_pages = ram_pages;
    guest->split = (split < most ? split : most) / 64 * 64 + 37; /* no multiple of 64, as a PC's hole may be */
    guest->high_addr = HIGH_ADDR + guest->split * GUEST_PAGE_SIZE % HUGE;
    guest->ring_bytes = ring_bytes;
    guest->vm = guest->vcpu = -1;
    pthread_mutex_init(&guest->lock, NULL);
    pthread_cond_init(&guest->changed, NULL);
    guest->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (guest->kvm < 0) {
        (void)fail("/dev/kvm");
        return 77;
    }
    if (make_vm(guest) != 0 || make_vcpu(guest) != 0)
        return -1;
    guest->box->n_pages = ram_pages;
    guest->box->run_pages = 1;
    return pthread_create(&guest->thread, NULL, vcpu_thread, guest) == 0 ? 0 : fail("pthread_create");
}

void guest_destroy(struct guest *guest)
{
    pthread_mutex_lock(&guest->lock);
    guest->quit = true;
    guest->box->stop = 1;
    pthread_cond_broadcast(&guest->changed);
    pthread_mutex_unlock(&guest->lock);
    pthread_join(guest->thread, NULL);
    munmap(guest->run, guest->run_bytes);
    close(guest->vcpu);
    close(guest->vm);
    close(guest->kvm);
    munmap((void *)guest->box, MAILBOX_BYTES);
    free(guest->history);
    free(guest->boot_hashes);
}

/* ---- memory and device state --------------------------------------------------------------------------------------- */

void guest_boot(struct guest *guest)
{
    uint64_t *tables = (uint64_t *)(void *)guest->boot, n_tables = code_page(guest) - FIRST_PD_PAGE, n_text;
    tables[512] = 2 * GUEST_PAGE_SIZE | 0x67;
    for (uint64_t i = 0; i < n_tables; i++)
        tables[2 * 512 + i] = (FIRST_PD_PAGE + i) * GUEST_PAGE_SIZE | 0x67;
    for (uint64_t i = 0; i < n_tables * 512; i++)
        tables[FIRST_PD_PAGE * 512 + i] = i * HUGE | 0xe7;
    /* rdi := mailbox; call the program; OUT; again */
    const uint8_t stub[] = {0x48, 0xbf, 0, 0, 0x80, 0, 0, 0, 0, 0, 0xe8, PROGRAM_OFFSET - 15, 0, 0, 0, 0xe6, EXIT_PORT, 0xeb, 0xed};
    uint8_t *code = guest->boot + code_page(guest) * GUEST_PAGE_SIZE;
    memcpy(code, stub, sizeof stub);
    const void *text = guest_program_text(&n_text);
    memcpy(code + PROGRAM_OFFSET, text, n_text);
}

int guest_check_state(void *context, const void *state, uint64_t len_bytes)
{
    const struct guest *guest = context;
    const struct state_header *header = state;
    const struct state_block *blocks = (const void *)(header + 1);
    if (len_bytes < sizeof *header + 8 || len_bytes % 8 || memcmp(header->magic, "COLOVMST", 8) != 0 || header->version != 2 ||
        header->total != len_bytes)
        return 1;
    uint64_t n_hashes = header->flags & 1 ? guest->boot_pages + guest->ram_pages : 0;
    uint64_t regs = sizeof(struct kvm_regs) + sizeof(struct kvm_sregs);
    if (memcmp(header->kind, "kvm", 4) != 0 || header->n_blocks != 2 || header->n_registers != regs || header->n_history > 1u << 20 ||
        len_bytes != sizeof *header + 2 * sizeof *blocks + header->n_history * 16ull + regs + n_hashes * 8 + 8)
        return 2;
    uint64_t hash;
    memcpy(&hash, (const char *)state + len_bytes - 8, 8);
    if (hash != guest_hash(state, len_bytes - 8))
        return 3;
    if (blocks[0].n_pages != guest->boot_pages || blocks[1].n_pages != guest->ram_pages || header->n_pages == 0 ||
        header->first_page + header->n_pages > guest->ram_pages || header->run_pages == 0)
        return 4;
    return 0;
}

int guest_load_state(struct guest *guest, const void *state, uint64_t len_bytes, uint64_t *checked_out, uint64_t *wrong_out)
{
    *checked_out = *wrong_out = 0;
    if (guest_check_state(guest, state, len_bytes) != 0)
        return -1;
    const struct state_header *header = state;
    const uint8_t *at = (const uint8_t *)(header + 1) + 2 * sizeof(struct state_block);
    guest->n_history = header->n_history;
    guest->history = realloc(guest->history, (guest->n_history + 1) * sizeof *guest->history);
    memcpy(guest->history, at, guest->n_history * sizeof *guest->history);
    at += guest->n_history * sizeof *guest->history;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    memcpy(&regs, at, sizeof regs);
    memcpy(&sregs, at + sizeof regs, sizeof sregs);
    regs.rflags |= RFLAGS_IOPL3; /* a KVM without hardware underneath reports IOPL 0, whatever was set */
    if (ioctl(guest->vcpu, KVM_SET_SREGS, &sregs) != 0 || ioctl(guest->vcpu, KVM_SET_REGS, &regs) != 0)
        return fail("loading the registers");
    at += sizeof regs + sizeof sregs;
    free(guest->boot_hashes);
    guest->boot_hashes = NULL;
    if (header->flags & 1) {
        const uint64_t *hashes = (const void *)at;
        for (uint64_t i = 0; i < guest->boot_pages + guest->ram_pages; i++) {
            const uint8_t *page =
                i < guest->boot_pages ? guest->boot + i * GUEST_PAGE_SIZE : guest->ram + (i - guest->boot_pages) * GUEST_PAGE_SIZE;
            *wrong_out += guest_hash(page, GUEST_PAGE_SIZE) != hashes[i];
            ++*checked_out;
        }
        guest->boot_hashes = malloc(guest->boot_pages * 8);
        memcpy(guest->boot_hashes, hashes, guest->boot_pages * 8);
    }
    volatile struct guest_mailbox *box = guest->box;
    box->step = header->step;
    box->first_page = header->first_page;
    box->n_pages = header->n_pages;
    box->run_pages = header->run_pages;
    box->rewrite_below = header->rewrite_below;
    box->run_below = header->run_below;
    for (size_t i = 0; i < sizeof guest->shadow; i++) /* what only this machine knows */
        guest->shadow[i] = (uint8_t)(header->loads + 1 + i * 7 + (uint64_t)getpid());
    memcpy(guest->boot + (guest->boot_pages - 1) * GUEST_PAGE_SIZE, guest->shadow, sizeof guest->shadow);
    if (guest->wrote)
        guest->wrote(guest->context, 0, guest->boot_pages - 1, 1);
    return 0;
}

/* replay -- first word and "was written" of each page of pc.ram after the steps so far */
static void replay(const struct guest *guest, uint64_t *seeds, uint8_t *written)
{
    const volatile struct guest_mailbox *box = guest->box;
    uint64_t entry = 0;
    /* what an older entry decided shows in no page any more: the primary drops such entries */
    for (uint64_t step = guest->n_history ? guest->history[0].first_step : box->step; step < box->step; step++) {
        while (entry + 1 < guest->n_history && guest->history[entry + 1].first_step <= step)
            entry++;
        uint64_t h = mix(guest->history[entry].salt + (step + 1) * GUEST_STEP), kind = h & 0xffff, n = 1;
        uint64_t at = (h >> 32) * box->n_pages >> 32;
        if (kind < box->rewrite_below)
            continue;
        if (kind < box->run_below) {
            n = 2 + ((h >> 16 & 0xffff) * (box->run_pages - 1) >> 16);
            n = n < box->n_pages - at ? n : box->n_pages - at;
        }
        for (uint64_t page = box->first_page + at; n; n--, page++) {
            seeds[page] = mix(h ^ (page + 1) * GUEST_PAGE);
            written[page] = 1;
        }
    }
}

uint64_t guest_verify(struct guest *guest)
{
    uint64_t *seeds = calloc(guest->ram_pages, sizeof *seeds), wrong = 0;
    uint8_t *written = calloc(guest->ram_pages, 1);
    if (!seeds || !written)
        abort();
    replay(guest, seeds, written);
    for (uint64_t page = 0; page < guest->ram_pages; page++) {
        const uint64_t *words = (const uint64_t *)(const void *)(guest->ram + page * GUEST_PAGE_SIZE);
        uint64_t differ = 0;
        for (uint64_t i = 0; i < GUEST_PAGE_WORDS; i++)
            differ |= words[i] ^ (written[page] ? seeds[page] + i * GUEST_WORD : 0);
        wrong += differ != 0;
    }
    for (uint64_t page = 0; guest->boot_hashes && page + 1 < guest->boot_pages; page++)
        wrong += guest_hash(guest->boot + page * GUEST_PAGE_SIZE, GUEST_PAGE_SIZE) != guest->boot_hashes[page];
    if (guest->boot_hashes)
        wrong += memcmp(guest->boot + (guest->boot_pages - 1) * GUEST_PAGE_SIZE, guest->shadow, GUEST_PAGE_SIZE) != 0;
    free(seeds);
    free(written);
    return wrong;
}
