/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_kvm.c -- KVM's dirty log of a VM's memory slots.
 *
 * KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, always both: whether the get has cleared and write-protected already (it has, unless
 * KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 was enabled) nobody can be asked, and clearing once more what was got is harmless.  A page that is
 * written between the two loses its bit to the clear; it is among the bits that were got, the clear write-protects it again, and whoever
 * reads its bytes reads them after this returns: on a primary, where vCPUs run, that is all that is needed, and on a secondary they stand.
 *
 * Every slot is probed when it is named: a clear of no pages at all changes nothing, and says whether the slot is there, is logged, and
 * how long it is.
 */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bitmap.h"
#include "error.h"
#include "ioctl.h"
#include "map.h"

#define CLEAR_PAGES_MAX (1ull << 31) /* in one KVM_CLEAR_DIRTY_LOG: a power of two that fits its 32 bits */

struct kvm_slot {
    struct colocache_kvm_slot given;
    uint64_t *again; /* got, and not taken: they are in no log of KVM's any more */
    bool waits;      /* some are */
};

struct kvm_slots {
    void *memory; /* room for the largest slot's words, which end at `end` */
    uint64_t map_bytes;
    uint8_t *end;
    void *again;
    uint64_t again_bytes;
    uint32_t n;
    struct kvm_slot slots[];
};

struct kvm_source {
    struct colocache_source base;
    int vm_fd;
    bool can_clear; /* KVM_CLEAR_DIRTY_LOG is there: Linux 5.0 */
    struct kvm_slots *now;
};

static uint64_t *words_of(const struct kvm_slots *all, uint64_t n_pages)
{
    return (uint64_t *)(void *)all->end - cc_words_for(n_pages);
}

/* ---- which slots there are ----------------------------------------------------------------------------------------- */

static int clear_log(int vm_fd, uint32_t slot, uint64_t first, uint32_t n, uint64_t *words)
{
    struct kvm_clear_dirty_log clear = {.slot = slot, .num_pages = n, .first_page = first, .dirty_bitmap = words};
    return cc_ioctl(vm_fd, KVM_CLEAR_DIRTY_LOG, &clear) == 0 ? 0 : -errno;
}

/* probe -- is there a logged slot of exactly this length?  The words are all zero: nothing is cleared. */
static int probe(int vm_fd, const struct kvm_slots *all, const struct colocache_kvm_slot *slot, bool *can_clear)
{
    uint64_t *words = words_of(all, slot->n_pages);
    /* A length must be a multiple of 64, or end where the slot ends. */
    uint64_t last = slot->n_pages & (CLEAR_PAGES_MAX - 1) ? slot->n_pages & ~(CLEAR_PAGES_MAX - 1) : slot->n_pages - CLEAR_PAGES_MAX;
    int rc = clear_log(vm_fd, slot->slot, last, (uint32_t)(slot->n_pages - last), words + last / 64);
    bool longer = false;
    for (uint32_t more = 1; rc == 0 && slot->n_pages % 64 == 0 && more <= 64 && !longer; more++)
        longer = clear_log(vm_fd, slot->slot, slot->n_pages, more, words) == 0;
    if (rc == 0 && !longer)
        return 0;
    if (rc == -ENOTTY && ioctl(vm_fd, KVM_CHECK_EXTENSION, (unsigned long)KVM_CAP_USER_MEMORY) > 0) {
        *can_clear = false;
        return 0;
    }
    if (rc == -EINVAL &&
        (ioctl(vm_fd, KVM_GET_API_VERSION, 0) > 0 || ioctl(vm_fd, KVM_CHECK_EXTENSION, (unsigned long)KVM_CAP_USER_MEMORY) <= 0))
        rc = -ENOTTY; /* /dev/kvm itself, or a vCPU */
    if (rc == -ENOENT)
        return cc_fail(COLOCACHE_E_ARGUMENT,
                       "KVM has no slot %u, or it has no KVM_MEM_LOG_DIRTY_PAGES: set that flag before the VM first runs", slot->slot);
    if (rc == 0 || rc == -EINVAL)
        return cc_fail(COLOCACHE_E_LENGTH, "KVM slot %u does not have the %llu pages given", slot->slot, (unsigned long long)slot->n_pages);
    if (rc == -ENXIO)
        return cc_fail(COLOCACHE_E_UNSUPPORTED,
                       "this VM has dirty rings, which take the place of the log of slot %u: use "
                       "colocache_source_kvm_ring",
                       slot->slot);
    if (rc == -ENOTTY)
        return cc_fail(COLOCACHE_E_ARGUMENT, "descriptor %d is no VM of KVM's: give what KVM_CREATE_VM returned", vm_fd);
    return cc_fail(rc, "KVM does not tell of slot %u: %s", slot->slot, colocache_strerror(rc));
}

static void free_slots(struct kvm_slots *all)
{
    if (!all)
        return;
    cc_unmap(all->memory, all->map_bytes);
    cc_unmap(all->again, all->again_bytes);
    free(all);
}

static int make_slots(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots, bool *can_clear, struct kvm_slots **out)
{
    uint64_t most = 0, n_words = 0;
    struct kvm_slots *all = calloc(1, sizeof *all + n_slots * sizeof all->slots[0]);
    if (!all)
        return cc_fail(-ENOMEM, "no memory for %u KVM slots", n_slots);
    all->n = n_slots;
    for (uint32_t i = 0; i < n_slots; i++) {
        most = slots[i].n_pages > most ? slots[i].n_pages : most;
        n_words += cc_words_for(slots[i].n_pages); /* at most 2^16 slots of 2^38 pages: no overflow */
    }
    uint8_t *end;
    int rc = cc_map_guarded(cc_words_for(most) * 8, &all->memory, &all->map_bytes, &all->end);
    if (rc == 0)
        rc = cc_map_guarded(n_words * 8, &all->again, &all->again_bytes, &end); /* address space: no memory unless it is needed */
    uint64_t *again = all->again;
    for (uint32_t i = 0; i < n_slots && rc == 0; i++) {
        all->slots[i] = (struct kvm_slot){.given = slots[i], .again = again};
        again += cc_words_for(slots[i].n_pages);
        rc = probe(vm_fd, all, &slots[i], can_clear);
    }
    if (rc) {
        free_slots(all);
        return rc;
    }
    *out = all;
    return 0;
}

static int kvm_set_slots(struct colocache_source *base, const struct colocache_kvm_slot *slots, uint32_t n_slots)
{
    struct kvm_source *source = (struct kvm_source *)base;
    struct kvm_slots *all = NULL;
    int rc = make_slots(source->vm_fd, slots, n_slots, &source->can_clear, &all);
    if (rc)
        return rc;
    free_slots(source->now); /* what they had was taken: see change_begin */
    source->now = all;
    return 0;
}

/* ---- what was written ---------------------------------------------------------------------------------------------- */

/* sync_slot -- KVM writes as many bits as its slot has pages now.  So the words end at a page that can't be
 * written: a slot that was made larger meanwhile is an error of this call (EFAULT, or bits past the end), never somebody's memory. */
static int sync_slot(struct kvm_source *source, struct kvm_slot *mine, cc_take_fn *take, void *context)
{
    const struct colocache_kvm_slot *slot = &mine->given;
    const uint64_t n_words = cc_words_for(slot->n_pages);
    uint64_t *words = words_of(source->now, slot->n_pages);
    memset(words, 0, n_words * 8);
    struct kvm_dirty_log get = {.slot = slot->slot, .dirty_bitmap = words};
    int got = cc_ioctl(source->vm_fd, KVM_GET_DIRTY_LOG, &get);
    if (got != 0 && errno != EFAULT)
        return cc_source_lost("KVM_GET_DIRTY_LOG");
    if (got != 0 || !cc_bitmap_tail_ok(words, slot->n_pages)) /* whatever it had is cleared */
        return cc_fail(COLOCACHE_E_LOG_LOST,
                       "KVM slot %u has more pages than the %llu given: call colocache_dirty_log_lost, and change slots only between "
                       "colocache_source_change_begin and _end",
                       slot->slot, (unsigned long long)slot->n_pages);
    for (uint64_t i = 0; i < n_words && mine->waits; i++)
        words[i] |= mine->again[i];
    int rc = take(context, slot->block, slot->first_pfn, slot->n_pages, words);
    if (rc) { /* the get may have cleared them */
        memcpy(mine->again, words, n_words * 8);
        mine->waits = true;
        return rc;
    }
    if (mine->waits)
        memset(mine->again, 0, n_words * 8);
    mine->waits = false;
    /* num_pages must be a multiple of 64 or reach the end of the slot: one call per 2^31 pages at most does both */
    for (uint64_t first = 0; first < slot->n_pages && source->can_clear;) {
        uint64_t n = slot->n_pages - first < CLEAR_PAGES_MAX ? slot->n_pages - first : CLEAR_PAGES_MAX;
        if (clear_log(source->vm_fd, slot->slot, first, (uint32_t)n, words + first / 64) != 0)
            return cc_source_lost("KVM_CLEAR_DIRTY_LOG");
        first += n;
    }
    return 0;
}

static int kvm_sync(struct colocache_source *base, cc_take_fn *take, void *context)
{
    struct kvm_source *source = (struct kvm_source *)base;
    struct kvm_slots *all = source->now;
    int rc = 0;
    for (uint32_t i = 0; i < all->n && rc == 0; i++)
        rc = cc_source_fits(take, context, all->slots[i].given.block, all->slots[i].given.first_pfn, all->slots[i].given.n_pages);
    for (uint32_t i = 0; i < all->n && rc == 0; i++)
        rc = sync_slot(source, &all->slots[i], take, context);
    return rc;
}

static void kvm_close(struct colocache_source *base)
{
    struct kvm_source *source = (struct kvm_source *)base;
    if (source->vm_fd >= 0)
        close(source->vm_fd);
    free_slots(source->now);
    free(source);
}

int colocache_source_kvm(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots, int manual_protect,
                         struct colocache_source **out)
{
    (void)manual_protect; /* from when the get was believed to have cleared */
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    int rc = cc_source_check_slots(slots, n_slots);
    if (rc)
        return rc;
    struct kvm_source *source = calloc(1, sizeof *source);
    if (!source)
        return cc_fail(-ENOMEM, "no memory for a log of KVM's");
    cc_source_init(&source->base, kvm_sync, kvm_close, kvm_set_slots);
    source->can_clear = true;
    source->vm_fd = fcntl(vm_fd, F_DUPFD_CLOEXEC, 3);
    rc = source->vm_fd < 0 ? cc_fail_errno("duplicating the VM's descriptor") : kvm_set_slots(&source->base, slots, n_slots);
    if (rc) {
        kvm_close(&source->base);
        return rc;
    }
    *out = &source->base;
    return 0;
}
