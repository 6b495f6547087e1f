/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_ring.c -- KVM's dirty rings: one per vCPU, read here, written by KVM.
 *
 * An entry goes 00 -> DIRTY (KVM) -> RESET (we took it) -> 00 (KVM_RESET_DIRTY_RINGS, which also write-protects its page again).
 * Entries are taken in order and never skipped.  A page may stand in several rings, or twice in one that was full: they meet in a
 * bitmap per slot, so every page is handed on once.  What was taken stays in that bitmap until it has been
 * handed on, so that an error on the way loses nothing.
 *
 * Nothing in a ring is believed: an entry of a slot or page that this source does not know is counted as a lost log, never ignored.
 */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "atomics.h"
#include "bitmap.h"
#include "error.h"
#include "ioctl.h"
#include "map.h"

#ifndef KVM_RESET_DIRTY_RINGS /* Linux 5.11 */
#define KVM_RESET_DIRTY_RINGS _IO(KVMIO, 0xc7)
#endif
#ifndef KVM_DIRTY_LOG_PAGE_OFFSET
#define KVM_DIRTY_LOG_PAGE_OFFSET 0 /* this architecture has no rings */
#endif
#define GFN_DIRTY 1u
#define GFN_RESET 2u
#define GFN_FLAGS 3u

/* The kernel's struct kvm_dirty_gfn, for builds against headers without it. */
struct ring_entry {
    uint32_t flags;
    uint32_t slot;
    uint64_t page; /* in the slot */
};

_Static_assert(sizeof(struct ring_entry) == 16, "the kernel's entries are 16 bytes");

struct ring {
    struct ring_entry *entries;
    uint64_t map_bytes; /* 0: the caller's mapping */
    uint32_t next;      /* index of the entry that KVM fills next, or has */
};

struct ring_slot {
    struct colocache_kvm_slot given;
    uint64_t *words; /* taken and not handed on yet */
    bool touched;
};

struct ring_source {
    struct colocache_source base;
    pthread_mutex_t lock; /* the conductor and a vCPU thread whose ring is full may sync at once */
    int vm_fd;
    uint32_t n_entries;
    uint32_t n_slots, n_rings;
    uint64_t n_unknown;      /* entries that fit no slot of ours, until that has been told */
    struct ring_slot *slots; /* in order of their slot numbers */
    struct ring *rings;
    uint64_t *words;
};

static int by_number(const void *left, const void *right)
{
    uint32_t a = ((const struct ring_slot *)left)->given.slot, b = ((const struct ring_slot *)right)->given.slot;
    return (a > b) - (a < b);
}

static struct ring_slot *find_slot(struct ring_source *source, uint32_t number)
{
    struct ring_slot key = {.given = {.slot = number}};
    return bsearch(&key, source->slots, source->n_slots, sizeof key, by_number);
}

/* harvest -- every dirty entry of a ring into the slots' bitmaps */
static void harvest(struct ring_source *source, struct ring *ring)
{
    struct ring_slot *slot = NULL;
    for (uint32_t n = 0; n < source->n_entries; n++) {
        struct ring_entry *entry = &ring->entries[ring->next & (source->n_entries - 1)];
        if ((cc_observe32(&entry->flags) & GFN_FLAGS) != GFN_DIRTY) /* acquire: slot and page were written before the flag */
            break;
        uint32_t number = entry->slot;
        uint64_t page = entry->page;
        if (!slot || slot->given.slot != number)
            slot = find_slot(source, number);
        if (slot && page < slot->given.n_pages) {
            slot->words[page / 64] |= 1ull << (page % 64);
            slot->touched = true;
        } else {
            source->n_unknown++;
        }
        cc_publish32(&entry->flags, GFN_RESET); /* release: KVM reuses the entry only after it was read */
        ring->next++;
    }
}

static int hand_on(struct ring_source *source, cc_take_fn *take, void *context)
{
    for (uint32_t i = 0; i < source->n_slots; i++) {
        struct ring_slot *slot = &source->slots[i];
        if (!slot->touched)
            continue;
        int rc = take(context, slot->given.block, slot->given.first_pfn, slot->given.n_pages, slot->words);
        if (rc)
            return rc;
        memset(slot->words, 0, cc_words_for(slot->given.n_pages) * 8);
        slot->touched = false;
    }
    return 0;
}

static int ring_sync(struct colocache_source *base, cc_take_fn *take, void *context)
{
    struct ring_source *source = (struct ring_source *)base;
    pthread_mutex_lock(&source->lock);
    int rc = 0;
    for (uint32_t i = 0; i < source->n_slots && rc == 0; i++) {
        const struct colocache_kvm_slot *slot = &source->slots[i].given;
        rc = cc_source_fits(take, context, slot->block, slot->first_pfn, slot->n_pages);
    }
    for (uint32_t i = 0; i < source->n_rings && rc == 0; i++)
        harvest(source, &source->rings[i]);
    if (rc == 0)
        rc = hand_on(source, take, context);
    if (rc == 0 && cc_ioctl(source->vm_fd, KVM_RESET_DIRTY_RINGS, NULL) < 0) /* the clear: entries are free, pages write-protected */
        rc = cc_source_lost("KVM_RESET_DIRTY_RINGS");
    if (rc == 0 && source->n_unknown)
        rc = cc_fail(COLOCACHE_E_LOG_LOST,
                     "%llu entries of the dirty rings name slots or pages this source was not given; call "
                     "colocache_dirty_log_lost",
                     (unsigned long long)source->n_unknown);
    if (rc == 0 || rc == COLOCACHE_E_LOG_LOST) /* told: all ones cover them */
        source->n_unknown = 0;
    pthread_mutex_unlock(&source->lock);
    return rc;
}

static void ring_close(struct colocache_source *base)
{
    struct ring_source *source = (struct ring_source *)base;
    for (uint32_t i = 0; source->rings && i < source->n_rings; i++)
        cc_unmap(source->rings[i].entries, source->rings[i].map_bytes);
    if (source->vm_fd >= 0)
        close(source->vm_fd);
    pthread_mutex_destroy(&source->lock);
    free(source->rings);
    free(source->slots);
    free(source->words);
    free(source);
}

/* share_out -- copies of the caller's slots, in order, each with its part of `words` */
static int share_out(const struct colocache_kvm_slot *given, uint32_t n_slots, struct ring_slot *slots, uint64_t *words)
{
    for (uint32_t i = 0; i < n_slots; i++)
        slots[i].given = given[i];
    qsort(slots, n_slots, sizeof slots[0], by_number);
    for (uint32_t i = 0; i < n_slots; i++) {
        if (i && slots[i].given.slot == slots[i - 1].given.slot)
            return cc_fail(COLOCACHE_E_ARGUMENT, "KVM slot %u is given twice", slots[i].given.slot);
        slots[i].words = words;
        words += cc_words_for(slots[i].given.n_pages);
    }
    return 0;
}

static int ring_set_slots(struct colocache_source *base, const struct colocache_kvm_slot *given, uint32_t n_slots)
{
    struct ring_source *source = (struct ring_source *)base;
    uint64_t n_words = 0;
    for (uint32_t i = 0; i < n_slots; i++)
        n_words += cc_words_for(given[i].n_pages);
    struct ring_slot *slots = calloc(n_slots, sizeof *slots);
    uint64_t *words = calloc(n_words, 8);
    int rc = slots && words ? share_out(given, n_slots, slots, words)
                            : cc_fail(-ENOMEM, "no memory for a log of %llu words", (unsigned long long)n_words);
    if (rc) {
        free(slots);
        free(words);
        return rc;
    }
    pthread_mutex_lock(&source->lock);
    free(source->slots); /* what they had was taken: see change_begin */
    free(source->words);
    source->slots = slots;
    source->words = words;
    source->n_slots = n_slots;
    pthread_mutex_unlock(&source->lock);
    return 0;
}

static int map_rings(struct ring_source *source, const struct colocache_kvm_ring *rings)
{
    uint64_t n_bytes = (uint64_t)source->n_entries * sizeof(struct ring_entry);
    for (uint32_t i = 0; i < source->n_rings; i++) {
        void *addr = rings[i].addr;
        if (!addr) {
            int rc =
                cc_map_file(rings[i].vcpu_fd, (uint64_t)KVM_DIRTY_LOG_PAGE_OFFSET * (uint64_t)sysconf(_SC_PAGESIZE), n_bytes, true, &addr);
            if (rc)
                return cc_fail(rc,
                               "the dirty ring of vCPU %u (%llu bytes) does not map: %s; was KVM_CAP_DIRTY_LOG_RING enabled with this size "
                               "before the vCPU was made?",
                               i, (unsigned long long)n_bytes, colocache_strerror(rc));
            source->rings[i].map_bytes = n_bytes;
        }
        source->rings[i].entries = addr;
    }
    return 0;
}

int colocache_source_kvm_ring(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots, const struct colocache_kvm_ring *rings,
                              uint32_t n_rings, uint32_t ring_bytes, struct colocache_source **out)
{
    if (!rings || !n_rings || n_rings > CC_SOURCE_PARTS_MAX || !out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "a dirty-ring log needs 1 to %u rings, and a place for the result", CC_SOURCE_PARTS_MAX);
    if (ring_bytes < 4096 || (ring_bytes & (ring_bytes - 1)))
        return cc_fail(COLOCACHE_E_ARGUMENT, "a dirty ring of %u bytes: KVM's are a power of two, at least 4096", ring_bytes);
    for (uint32_t i = 0; i < n_rings; i++) {
        if (!rings[i].addr && KVM_DIRTY_LOG_PAGE_OFFSET == 0)
            return cc_fail(COLOCACHE_E_UNSUPPORTED, "KVM has no dirty rings on this architecture");
        if ((uintptr_t)rings[i].addr % sizeof(struct ring_entry))
            return cc_fail(COLOCACHE_E_ARGUMENT, "ring %u begins at %p, which is not aligned to its entries", i, rings[i].addr);
    }
    int rc = cc_source_check_slots(slots, n_slots);
    if (rc)
        return rc;
    struct ring_source *source = calloc(1, sizeof *source);
    if (!source)
        return cc_fail(-ENOMEM, "no memory for a dirty-ring log");
    cc_source_init(&source->base, ring_sync, ring_close, ring_set_slots);
    pthread_mutex_init(&source->lock, NULL);
    source->n_entries = ring_bytes / (uint32_t)sizeof(struct ring_entry);
    source->n_rings = n_rings;
    source->rings = calloc(n_rings, sizeof *source->rings);
    source->vm_fd = fcntl(vm_fd, F_DUPFD_CLOEXEC, 3);
    if (source->vm_fd < 0)
        rc = cc_fail_errno("duplicating the VM's descriptor");
    else if (!source->rings)
        rc = cc_fail(-ENOMEM, "no memory for %u dirty rings", n_rings);
    if (rc == 0)
        rc = ring_set_slots(&source->base, slots, n_slots);
    if (rc == 0)
        rc = map_rings(source, rings);
    if (rc) {
        ring_close(&source->base);
        return rc;
    }
    *out = &source->base;
    return 0;
}
