/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitmap.h"
#include "error.h"

struct cc_kept {
    struct cc_kept *next;
    uint32_t block;
    uint64_t first_pfn, n_pages;
    uint64_t words[];
};

void cc_source_init(struct colocache_source *source, int (*sync)(struct colocache_source *, cc_take_fn *, void *),
                    void (*close)(struct colocache_source *),
                    int (*set_slots)(struct colocache_source *, const struct colocache_kvm_slot *, uint32_t))
{
    *source = (struct colocache_source){.sync = sync, .close = close, .set_slots = set_slots};
    pthread_mutex_init(&source->lock, NULL);
}

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
    return cc_source_sync(source, throw_away, NULL);
}

int colocache_source_close(struct colocache_source *source)
{
    if (!source)
        return 0;
    while (source->kept) {
        struct cc_kept *kept = source->kept;
        source->kept = kept->next;
        free(kept);
    }
    pthread_mutex_destroy(&source->lock);
    source->close(source);
    return 0;
}

/* ---- slots that change --------------------------------------------------------------------------------------------- */

static int keep(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    struct colocache_source *source = context;
    const uint64_t n_words = cc_words_for(n_pages);
    uint64_t any = 0;
    for (uint64_t i = 0; i < n_words && !any; i++)
        any = words[i];
    if (!any)
        return 0;
    struct cc_kept *kept = malloc(sizeof *kept + n_words * 8);
    if (!kept)
        return cc_fail(-ENOMEM, "no memory to keep the log of %llu pages", (unsigned long long)n_pages);
    *kept = (struct cc_kept){.next = source->kept, .block = block, .first_pfn = first_pfn, .n_pages = n_pages};
    memcpy(kept->words, words, n_words * 8);
    source->kept = kept;
    return 0;
}

static int hand_on_kept(struct colocache_source *source, cc_take_fn *take, void *context)
{
    while (source->kept) {
        struct cc_kept *kept = source->kept;
        int rc = take(context, kept->block, kept->first_pfn, kept->n_pages, kept->words);
        if (rc && rc != COLOCACHE_E_BLOCK) /* a block that is gone by now has no page that could be wrong */
            return rc;
        source->kept = kept->next;
        free(kept);
    }
    return 0;
}

int cc_source_sync(struct colocache_source *source, cc_take_fn *take, void *context)
{
    pthread_mutex_lock(&source->lock);
    int rc = source->changing ? cc_fail(COLOCACHE_E_ORDER, "the slots of this log are being changed: call "
                                                           "colocache_source_change_end first")
                              : hand_on_kept(source, take, context);
    pthread_mutex_unlock(&source->lock);
    return rc ? rc : source->sync(source, take, context);
}

int colocache_source_change_begin(struct colocache_source *source)
{
    if (!source)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the source is NULL");
    if (!source->set_slots)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "this log has no KVM slots that could change");
    pthread_mutex_lock(&source->lock);
    int rc = source->changing ? cc_fail(COLOCACHE_E_ORDER, "the slots of this log are being changed already")
                              : source->sync(source, keep, source);
    source->changing = source->changing || rc == 0;
    pthread_mutex_unlock(&source->lock);
    return rc;
}

int colocache_source_change_end(struct colocache_source *source, const struct colocache_kvm_slot *slots, uint32_t n_slots)
{
    if (!source)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the source is NULL");
    pthread_mutex_lock(&source->lock);
    int rc = source->changing ? cc_source_check_slots(slots, n_slots)
                              : cc_fail(COLOCACHE_E_ORDER, "no change of this log's slots was begun: call "
                                                           "colocache_source_change_begin before the slots change");
    if (rc == 0)
        rc = source->set_slots(source, slots, n_slots);
    source->changing = source->changing && rc != 0;
    pthread_mutex_unlock(&source->lock);
    return rc;
}
