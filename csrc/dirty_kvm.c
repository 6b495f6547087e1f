/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_kvm.c -- KVM's dirty log of a VM's memory slots.
 *
 * Plain KVM_GET_DIRTY_LOG gets and write-protects in one call.  With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 the get is almost
 * free and KVM_CLEAR_DIRTY_LOG write-protects; a page written between the two would be in no log, so both happen here, one after the other,
 * while the vCPUs stand still (secondary) or before any of the pages is read (primary, which only needs extra bits to be possible).
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

struct kvm_source {
    struct colocache_source base;
    int vm_fd;
    bool manual_protect;
    uint32_t n_slots;
    void *memory; /* room for the largest slot's words, which end at `end` */
    uint64_t map_bytes;
    uint8_t *end;
    struct colocache_kvm_slot slots[];
};

/* sync_slot -- KVM writes as many bits as its slot has pages, which nobody can ask it for.  So the words end at a page that can't be
 * written: a slot that is larger than was said is an error of this call (EFAULT, or bits past the end), never somebody's memory. */
static int sync_slot(struct kvm_source *source, const struct colocache_kvm_slot *slot, cc_take_fn *take, void *context)
{
    const uint64_t n_words = cc_words_for(slot->n_pages);
    uint64_t *words = (uint64_t *)(void *)source->end - n_words;
    memset(words, 0, n_words * 8);
    struct kvm_dirty_log get = {.slot = slot->slot, .dirty_bitmap = words};
    int got = cc_ioctl(source->vm_fd, KVM_GET_DIRTY_LOG, &get);
    if (got != 0 && errno != EFAULT)
        return cc_source_lost("KVM_GET_DIRTY_LOG");
    if (got != 0 || !cc_bitmap_tail_ok(words, slot->n_pages)) /* whatever it had is cleared */
        return cc_fail(COLOCACHE_E_LOG_LOST,
                       "KVM slot %u has more pages than the %llu given: call colocache_dirty_log_lost, and make the "
                       "source anew",
                       slot->slot, (unsigned long long)slot->n_pages);
    int rc = take(context, slot->block, slot->first_pfn, slot->n_pages, words);
    if (rc && !source->manual_protect)
        return cc_source_not_taken("KVM's dirty log"); /* the get has cleared it */
    if (rc || !source->manual_protect)
        return rc;
    /* num_pages must be a multiple of 64 or reach the end of the slot: one call per 2^31 pages at most does both */
    for (uint64_t first = 0; first < slot->n_pages;) {
        uint64_t n = slot->n_pages - first < (1u << 31) ? slot->n_pages - first : 1u << 31;
        struct kvm_clear_dirty_log clear = {
            .slot = slot->slot, .num_pages = (uint32_t)n, .first_page = first, .dirty_bitmap = words + first / 64};
        if (cc_ioctl(source->vm_fd, KVM_CLEAR_DIRTY_LOG, &clear) != 0)
            return cc_source_lost("KVM_CLEAR_DIRTY_LOG");
        first += n;
    }
    return 0;
}

static int kvm_sync(struct colocache_source *base, cc_take_fn *take, void *context)
{
    struct kvm_source *source = (struct kvm_source *)base;
    int rc = 0;
    for (uint32_t i = 0; i < source->n_slots && rc == 0; i++)
        rc = cc_source_fits(take, context, source->slots[i].block, source->slots[i].first_pfn, source->slots[i].n_pages);
    for (uint32_t i = 0; i < source->n_slots && rc == 0; i++)
        rc = sync_slot(source, &source->slots[i], take, context);
    return rc;
}

static void kvm_close(struct colocache_source *base)
{
    struct kvm_source *source = (struct kvm_source *)base;
    if (source->vm_fd >= 0)
        close(source->vm_fd);
    cc_unmap(source->memory, source->map_bytes);
    free(source);
}

int colocache_source_kvm(int vm_fd, const struct colocache_kvm_slot *slots, uint32_t n_slots, int manual_protect,
                         struct colocache_source **out)
{
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    int rc = cc_source_check_slots(slots, n_slots);
    if (rc)
        return rc;
    uint64_t most = 0;
    for (uint32_t i = 0; i < n_slots; i++)
        most = slots[i].n_pages > most ? slots[i].n_pages : most;
    struct kvm_source *source = calloc(1, sizeof *source + n_slots * sizeof slots[0]);
    if (!source)
        return cc_fail(-ENOMEM, "no memory for %u KVM slots", n_slots);
    source->base = (struct colocache_source){.sync = kvm_sync, .close = kvm_close};
    source->manual_protect = manual_protect != 0;
    source->n_slots = n_slots;
    memcpy(source->slots, slots, n_slots * sizeof slots[0]);
    source->vm_fd = fcntl(vm_fd, F_DUPFD_CLOEXEC, 3);
    rc = source->vm_fd < 0 ? cc_fail_errno("duplicating the VM's descriptor")
                           : cc_map_guarded(cc_words_for(most) * 8, &source->memory, &source->map_bytes, &source->end);
    if (rc) {
        kvm_close(&source->base);
        return rc;
    }
    *out = &source->base;
    return 0;
}
