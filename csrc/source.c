/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <stdio.h>

#include "error.h"

int cc_source_fits(cc_take_fn *take, void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages)
{
    const uint64_t nothing = 0;
    if (first_pfn > UINT64_MAX - n_pages)
        return cc_fail(COLOCACHE_E_RANGE, "a dirty log of %llu pages from page %llu of block %u on", (unsigned long long)n_pages,
                       (unsigned long long)first_pfn, block);
    return take(context, block, first_pfn + n_pages - 1, 1, &nothing); /* no bits of the last page: checked, and sets none */
}

int cc_source_page_size(const char *block_name, uint32_t page_size)
{
    if (page_size == CC_SOURCE_PAGE)
        return 0;
    return cc_fail(COLOCACHE_E_LENGTH,
                   "block %s has pages of %u bytes, a dirty log has %u: add the block with page_size %u, or hand its log "
                   "on in the block's pages by sync_words",
                   block_name, page_size, CC_SOURCE_PAGE, CC_SOURCE_PAGE);
}

int cc_source_not_taken(const char *log)
{
    char why[256];
    snprintf(why, sizeof why, "%s", colocache_last_error()); /* a copy: the next sentence takes its place */
    return cc_fail(COLOCACHE_E_LOG_LOST, "%s was cleared but could not be taken: %s; call colocache_dirty_log_lost", log, why);
}

int cc_source_lost(const char *call)
{
    int saved = errno;
    return cc_fail(COLOCACHE_E_LOG_LOST, "%s failed: %s; call colocache_dirty_log_lost", call, colocache_strerror(-saved));
}

int cc_source_check_slots(const struct colocache_kvm_slot *slots, uint32_t n_slots)
{
    if (!slots || !n_slots || n_slots > CC_SOURCE_PARTS_MAX)
        return cc_fail(COLOCACHE_E_ARGUMENT, "a log of KVM's needs 1 to %u slots", CC_SOURCE_PARTS_MAX);
    for (uint32_t i = 0; i < n_slots; i++) {
        if (slots[i].n_pages == 0 || slots[i].n_pages > CC_SOURCE_PAGES_MAX)
            return cc_fail(COLOCACHE_E_LENGTH, "KVM slot %u has %llu pages", slots[i].slot, (unsigned long long)slots[i].n_pages);
    }
    return 0;
}

/* ---- by itself ----------------------------------------------------------------------------------------------------- */

static int throw_away(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    (void)context, (void)block, (void)first_pfn, (void)n_pages, (void)words;
    return 0;
}

int colocache_source_discard(struct colocache_source *source)
{
    if (!source)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the source is NULL");
    return source->sync(source, throw_away, NULL);
}

int colocache_source_close(struct colocache_source *source)
{
    if (source)
        source->close(source);
    return 0;
}
