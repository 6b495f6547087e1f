/* SPDX-License-Identifier: Apache-2.0 */
/* staging.c -- the sparse cache of a bounded region.  What holds is in staging.h. */
#define _GNU_SOURCE
#include "internal.h"
#include "staging.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "error.h"
#include "fault.h"
#include "forget.h"
#include "sparse.h"
#include "spill.h"

#ifndef MADV_POPULATE_READ /* Linux 5.14 */
#define MADV_POPULATE_READ 22
#endif

int cc_staging_open(struct cc_block *block)
{
    const uint64_t n_words = cc_words_for(block->n_pages);
    block->staged = calloc(1, sizeof *block->staged);
    block->staged_words = calloc(n_words + cc_words_for(n_words), 8);
    if (!block->staged || !block->staged_words)
        return cc_fail(-ENOMEM, "no memory for the bitmap of staged pages of block %s", block->name);
    cc_bitmap_init(block->staged, block->staged_words, block->staged_words + n_words, block->n_pages);
    return 0;
}

void cc_staging_close(struct cc_block *block)
{
    free(block->staged);
    free(block->staged_words);
}

int cc_staging_no_room(const struct cc_block *block)
{
    return cc_fail(COLOCACHE_E_NO_MEMORY,
                   "there is no room for a further page of block %s in its cache: abort the epoch, and enlarge the file "
                   "system that the cache is in, or free some of it",
                   block->name);
}

/* new_pages -- how many of them are not counted yet */
static uint64_t new_pages(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    const uint64_t end = first_pfn + n_pages;
    uint64_t n_new = 0;
    for (uint64_t at = first_pfn, n; at < end; at += n) {
        n = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        n_new += (uint64_t)__builtin_popcountll(~cc_observe(&block->staged->words[at / 64]) & cc_word_mask(at % 64, n));
    }
    return n_new;
}

int cc_staging_expect(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    const uint64_t n_bytes = new_pages(block, first_pfn, n_pages) << block->page_shift, limit = cc_observe(&cc->staged_limit);
    const uint64_t before = cc_add(&cc->staged_bytes, n_bytes);
    if (n_bytes && limit && (before > limit || n_bytes > limit - before)) {
        cc_add(&cc->staged_bytes, 0 - n_bytes);
        if (cc_spill_may(cc))
            return CC_SPILLS;
        return cc_fail(
            COLOCACHE_E_NO_MEMORY,
            "%llu bytes of pages are staged, and %llu more of block %s would pass their limit of %llu: abort the epoch, and raise "
            "the limit or take checkpoints more often",
            (unsigned long long)before, (unsigned long long)n_bytes, block->name, (unsigned long long)limit);
    }
    cc_bitmap_set(block->staged, first_pfn, n_pages);
    return 0;
}

/* map_now -- so that the flush, in the pause, finds them mapped.  Only a matter of speed: before Linux 5.14 it is refused. */
static void map_now(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    const int keep = errno;
    (void)madvise(block->cache.addr + (first_pfn << block->page_shift), n_pages << block->page_shift, MADV_POPULATE_READ);
    errno = keep;
}

static int not_written(const struct cc_block *block)
{
    return errno == ENOSPC || errno == ENOMEM ? cc_staging_no_room(block) : cc_fail_errno("writing a page into the cache");
}

int cc_staging_write(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, const void *data)
{
    const uint8_t *from = data;
    uint64_t left = n_pages << block->page_shift;
    off_t at = (off_t)(block->cache.offset + (first_pfn << block->page_shift));
    int rc = cc_staging_expect(cc, block, first_pfn, n_pages);
    if (rc == CC_SPILLS) {
        rc = cc_spill_write(cc, block, first_pfn, 0, data, left);
        if (rc == 0)
            cc_spill_done(cc, block, first_pfn, n_pages);
        return rc;
    }
    if (rc == 0 && CC_HALF_WRITTEN(block->cache.fd, (uint64_t)at, data, left, "receive: half a page, staged") != 0)
        return not_written(block);
    while (rc == 0 && left) {
        ssize_t n = pwrite(block->cache.fd, from, left, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return not_written(block);
        from += n;
        at += n;
        left -= (uint64_t)n;
    }
    if (rc == 0) {
        map_now(block, first_pfn, n_pages);
        cc_spill_drop(cc, block, first_pfn, n_pages);
    }
    return rc;
}

static int punch(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    return cc_sparse_punch(&block->cache, first_pfn << block->page_shift, n_pages << block->page_shift);
}

int cc_staging_zero(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    const uint64_t end = first_pfn + n_pages;
    for (uint64_t at = first_pfn, n; at < end; at += n) {
        n = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        uint64_t *word = &block->staged->words[at / 64], mine = cc_word_mask(at % 64, n);
        if (!(cc_observe(word) & mine))
            continue; /* holes already */
        CC_CRASH_POINT("receive: before the hole");
        int rc = punch(block, at, n);
        if (rc)
            return rc;
        CC_CRASH_POINT("receive: the hole is there");
        cc_add(&cc->staged_bytes, 0 - ((uint64_t)__builtin_popcountll(cc_drop_bits(word, mine) & mine) << block->page_shift));
    }
    cc_spill_drop(cc, block, first_pfn, n_pages);
    return 0;
}

void cc_staging_find(struct cc_block *block)
{
    uint64_t at = 0, first, n_bytes;
    cc_bitmap_clear_all(block->staged);
    while (cc_sparse_next_staged(block, at, &first, &n_bytes)) {
        cc_bitmap_set(block->staged, first >> block->page_shift, n_bytes >> block->page_shift);
        at = first + n_bytes;
    }
}

int cc_staging_empty_one(struct cc_block *block)
{
    CC_CRASH_POINT("staging: before a cache is emptied");
    int rc = punch(block, 0, block->n_pages);
    if (rc)
        return rc;
    CC_CRASH_POINT("staging: a cache is empty");
    cc_bitmap_clear_all(block->staged);
    return 0;
}

int cc_staging_empty(struct colocache *cc)
{
    int rc = 0;
    pthread_mutex_lock(&cc->walking);
    for (uint32_t i = 0; rc == 0 && i < cc_observe32(&cc->n_blocks); i++) {
        cc_forget_rest(&cc->blocks[i].forget);
        rc = cc_gone(&cc->blocks[i]) ? 0 : cc_staging_empty_one(&cc->blocks[i]);
    }
    if (rc == 0) {
        cc_publish(&cc->staged_bytes, 0);
        cc_spill_empty(cc);
    }
    pthread_mutex_unlock(&cc->walking);
    return rc;
}

/* counted_before -- several blocks may have their caches in one file */
static bool counted_before(const struct colocache *cc, uint32_t index)
{
    const struct cc_image_identity *one = &cc->region.table[index].cache;
    for (uint32_t i = 0; i < index; i++) {
        const struct cc_image_identity *other = &cc->region.table[i].cache;
        if (!cc_gone(&cc->blocks[i]) && other->device == one->device && other->inode == one->inode)
            return true;
    }
    return false;
}

int cc_staging_bytes(struct colocache *cc, uint64_t *n_bytes_out)
{
    uint64_t n_bytes = 0;
    int rc = 0;
    pthread_mutex_lock(&cc->walking);
    for (uint32_t i = 0; rc == 0 && cc->bounded && i < cc_observe32(&cc->n_blocks); i++) {
        struct stat st;
        if (cc_gone(&cc->blocks[i]) || counted_before(cc, i))
            continue;
        if (fstat(cc->blocks[i].cache.fd, &st) != 0)
            rc = cc_fail_errno("looking at a cache");
        else
            n_bytes += (uint64_t)st.st_blocks * 512;
    }
    pthread_mutex_unlock(&cc->walking);
    *n_bytes_out = n_bytes;
    return rc;
}

int colocache_limit_staged(struct colocache *cc, uint64_t n_bytes)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    if (!cc->bounded)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "a limit of %llu bytes for staged pages: only bounded memory stages any",
                       (unsigned long long)n_bytes);
    cc_publish(&cc->staged_limit, n_bytes);
    return 0;
}
