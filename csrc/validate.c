/* SPDX-License-Identifier: Apache-2.0 */
/* validate.c -- every invariant, checked and told with the first that is broken. */
#include "internal.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "block.h"
#include "clock.h"
#include "commit.h"
#include "control.h"
#include "device_state.h"
#include "error.h"
#include "flush_set.h"
#include "sparse.h"
#include "validate.h"
#include "word.h"

#define SETTER_NS_MAX 2000000000u /* how long a thread may stand between two stores: its core may be taken away */

static const char *const bitmap_names[CC_BITMAPS] = {"PVM bitmap", "SVM bitmap", "flush set"};

/* hides_a_word -- for good: a thread that sets bits stores a word and then the bits above it, and is in the gate meanwhile.  So a word that
 * is seen hidden, and is hidden still after the gate was seen empty, has lost them. */
static bool hides_a_word(const struct cc_bitmap *bitmap, const struct cc_gate *setters)
{
    const uint64_t until = cc_now_ns() + SETTER_NS_MAX;
    uint64_t w = cc_bitmap_next_hidden(bitmap, 0);
    while (w < bitmap->n_words) {
        bool nobody = (cc_observe32(&setters->word) & ~CC_GATE_CLOSED) == 0; /* after the look that found it, before the next */
        uint64_t next = cc_bitmap_next_hidden(bitmap, w);
        if (next == w) {
            if (nobody || cc_now_ns() > until)
                return true;
            usleep(100);
        }
        w = next;
    }
    return !cc_bitmap_tail_ok(bitmap->summary, bitmap->n_words);
}

int cc_validate_bitmaps(struct colocache *cc, bool with_summaries)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        const struct cc_block *block = &cc->blocks[i];
        for (uint32_t kind = 0; kind < CC_BITMAPS && !cc_gone(block); kind++) {
            const struct cc_bitmap *bitmap = &block->bitmaps[kind];
            if (!cc_bitmap_tail_ok(bitmap->words, bitmap->n_bits))
                return cc_fail(COLOCACHE_E_TAIL, "block %s: the %s has bits set past the last page %llu", block->name, bitmap_names[kind],
                               (unsigned long long)block->n_pages - 1);
            if (with_summaries && hides_a_word(bitmap, kind == COLOCACHE_BITMAP_PVM ? &cc->epoch.gate : &cc->mark_gate))
                return cc_fail(COLOCACHE_E_CORRUPT, "block %s: the summary of the %s hides a word", block->name, bitmap_names[kind]);
        }
    }
    return 0;
}

static int validate_record(struct colocache *cc)
{
    struct cc_record record;
    int rc = cc_commit_read(cc->region.control, &record);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return 0;
    uint64_t receiving;
    rc = cc_word_read("newest received epoch", &cc->region.control->receiving, &receiving);
    if (rc)
        return rc;
    if (receiving < record.epoch || (!record.committed && receiving > record.epoch))
        return cc_fail(COLOCACHE_E_CORRUPT, "epoch %llu is %s while the newest received is %llu", (unsigned long long)record.epoch,
                       record.committed ? "committed" : "sealed", (unsigned long long)receiving);
    if (!record.committed) {
        uint64_t n_pages = 0;
        for (uint32_t i = 0; i < cc->n_blocks; i++)
            n_pages += cc_gone(&cc->blocks[i]) ? 0 : cc_bitmap_count(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_FLUSH_SET]);
        if (record.flush_checksum != cc_flush_set_checksum(cc) || record.flush_pages != n_pages)
            return cc_fail(COLOCACHE_E_CORRUPT, "the flush set of epoch %llu (%llu pages) changed since its seal (%llu pages)",
                           (unsigned long long)record.epoch, (unsigned long long)n_pages, (unsigned long long)record.flush_pages);
    }
    return cc_device_state_check(cc, &record);
}

/* same_page -- 1 the same in guest RAM and cache, 0 not, or -errno.  A sparse image is read through its descriptor: through the mapping
 * a hole would be allocated, which on a full machine is a SIGBUS. */
static int same_page(const struct cc_block *block, uint64_t pfn)
{
    if (!block->sparse)
        return memcmp(cc_guest_page(block, pfn), cc_cache_page(block, pfn), block->page_size) == 0;
    char guest[CC_PAGE], cache[CC_PAGE];
    for (uint64_t at = pfn << block->page_shift; at < (pfn + 1) << block->page_shift; at += CC_PAGE) {
        errno = EIO; /* what a short read is */
        if (pread(block->guest.fd, guest, CC_PAGE, (off_t)(block->guest.offset + at)) != CC_PAGE ||
            pread(block->cache.fd, cache, CC_PAGE, (off_t)(block->cache.offset + at)) != CC_PAGE)
            return cc_fail_errno("reading a page of a sparse image");
        if (memcmp(guest, cache, CC_PAGE) != 0)
            return 0;
    }
    return 1;
}

/* check_no_svm_bits -- bounded: what the VM writes is private, so its bitmap stays empty */
static int check_no_svm_bits(const struct colocache *cc)
{
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (!cc_gone(&cc->blocks[i]) && cc_bitmap_count(&cc->blocks[i].bitmaps[COLOCACHE_BITMAP_SVM]))
            return cc_fail(COLOCACHE_E_CORRUPT, "block %s has pages in the SVM bitmap, which bounded memory does not use",
                           cc->blocks[i].name);
    }
    return 0;
}

/* compare_pages -- a page that nobody wrote since the last seal is the same in guest RAM and cache; a page that is sealed
 * and not flushed yet may differ */
static int compare_pages(struct colocache *cc)
{
    struct cc_record record;
    int rc = cc_commit_read(cc->region.control, &record);
    if (rc <= 0)
        return rc; /* before the first seal guest RAM is partial by design */
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        const struct cc_block *block = &cc->blocks[i];
        uint64_t at = cc_gone(block) ? block->len_bytes : 0, first, n_bytes;
        while (cc_sparse_next_data(block, at, &first, &n_bytes)) {
            for (uint64_t pfn = first >> block->page_shift; pfn < (first + n_bytes) >> block->page_shift; pfn++) {
                uint64_t dirty =
                    block->bitmaps[COLOCACHE_BITMAP_PVM].words[pfn / 64] | block->bitmaps[COLOCACHE_BITMAP_SVM].words[pfn / 64];
                if (!record.committed)
                    dirty |= block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET].words[pfn / 64];
                int same = dirty >> (pfn % 64) & 1 ? 1 : same_page(block, pfn);
                if (same < 0)
                    return same;
                if (!same)
                    return cc_fail(COLOCACHE_E_CORRUPT, "block %s: page %llu differs between guest RAM and cache, but is in no bitmap",
                                   block->name, (unsigned long long)pfn);
            }
            at = first + n_bytes;
        }
    }
    return 0;
}

int colocache_validate(struct colocache *cc, int with_pages)
{
    struct stat st;
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    if (fstat(cc->region.fd, &st) != 0)
        return cc_fail_errno("fstat of the control region");
    struct cc_control_values values;
    uint64_t end;
    int rc = cc_control_check(cc->region.control, (uint64_t)st.st_size, &values);
    if (rc == 0)
        rc = cc_block_check_table(cc->region.table, values.n_blocks, cc->region.head_bytes, (uint64_t)st.st_size, &end);
    if (rc == 0 && (values.n_blocks != cc->n_blocks || end != cc->region.end_bytes))
        rc = cc_fail(COLOCACHE_E_CORRUPT, "the region names %llu blocks that end at byte %llu, there are %u that end at %llu",
                     (unsigned long long)values.n_blocks, (unsigned long long)end, cc->n_blocks, (unsigned long long)cc->region.end_bytes);
    if (rc == 0)
        rc = cc_validate_bitmaps(cc, true);
    if (rc == 0)
        rc = validate_record(cc);
    if (rc == 0 && cc->bounded)
        return check_no_svm_bits(cc); /* there is no second copy of a page to compare it with */
    if (rc == 0 && with_pages)
        rc = compare_pages(cc);
    return rc;
}
