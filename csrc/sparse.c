/* SPDX-License-Identifier: Apache-2.0 */
#include "internal.h"
#include "sparse.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "error.h"
#include "fault.h"
#include "map.h"
#include "page_copy.h"

#define WINDOW (2u << 20) /* of a stretch; a multiple of every page size */

int cc_sparse_allocate(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    if (!block->sparse)
        return 0;
    for (uint64_t pfn = first_pfn; pfn < first_pfn + n_pages; pfn++) {
        uint64_t bit = 1ull << (pfn % 64);
        if (cc_observe(&block->allocated[pfn / 64]) & bit)
            continue;
        for (int i = 0; i < (block->staged ? 1 : 2); i++) { /* a staged page gets its memory with its bytes */
            const struct cc_image *image = i ? &block->cache : &block->guest;
            uint64_t begin = (pfn << block->page_shift) / image->granule * image->granule;
            uint64_t bytes = block->page_size > image->granule ? block->page_size : image->granule;
            int rc = cc_map_reserve(image->fd, image->offset + begin, bytes, block->name);
            if (rc)
                return rc;
        }
        cc_set_bits(&block->allocated[pfn / 64], bit);
    }
    return 0;
}

static uint64_t next_data(const struct cc_image *image, uint64_t from, uint64_t len_bytes)
{
    off_t at = lseek(image->fd, (off_t)(image->offset + from), SEEK_DATA);
    if (at < 0)
        return errno == ENXIO ? len_bytes : from; /* ENXIO: only a hole is left; else the file system can't tell: all is data */
    uint64_t data = (uint64_t)at - image->offset;
    return data < len_bytes ? data : len_bytes;
}

static uint64_t next_hole(const struct cc_image *image, uint64_t from, uint64_t len_bytes)
{
    off_t at = lseek(image->fd, (off_t)(image->offset + from), SEEK_HOLE);
    uint64_t hole = at < 0 ? len_bytes : (uint64_t)at - image->offset;
    return hole < len_bytes ? hole : len_bytes;
}

int cc_sparse_punch(const struct cc_image *image, uint64_t at, uint64_t n_bytes)
{
    int rc;
    do {
        rc = fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(image->offset + at), (off_t)n_bytes);
    } while (rc != 0 && errno == EINTR);
    return rc == 0 ? 0 : cc_fail_errno("punching a hole into an image");
}

int cc_sparse_can_punch(const struct cc_image *image, bool *can_out)
{
    struct stat st;
    *can_out = false;
    if (image->fd < 0 || image->granule != CC_PAGE)
        return 0;
    if (fstat(image->fd, &st) != 0)
        return cc_fail_errno("looking at an image");
    const uint64_t behind = cc_round_to_page((uint64_t)st.st_size) - image->offset;
    int rc = cc_sparse_punch(image, behind, CC_PAGE);
    *can_out = rc == 0;
    return rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EPERM ? 0 : rc; /* the file system's no, a seal's, a jail's */
}

/* first_run -- of the bits of a word that is not 0 */
static uint64_t first_run(uint64_t bits, uint64_t *n_out)
{
    const uint64_t first = (uint64_t)__builtin_ctzll(bits), rest = bits >> first;
    *n_out = ~rest ? (uint64_t)__builtin_ctzll(~rest) : 64;
    return first;
}

static int punch_pages(const struct cc_block *block, const struct cc_image *image, uint64_t first_pfn, uint64_t n_pages)
{
    return cc_sparse_punch(image, first_pfn << block->page_shift, n_pages << block->page_shift);
}

/* punch_unknown -- what is not known to be there; the rest is filled */
static int punch_unknown(const struct cc_block *block, const struct cc_image *image, uint64_t first_pfn, uint64_t n_pages)
{
    const uint64_t end = first_pfn + n_pages;
    int rc = 0;
    for (uint64_t at = first_pfn, in_word; rc == 0 && at < end; at += in_word) {
        in_word = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        const uint64_t mine = cc_word_mask(at % 64, in_word), base = at / 64 * 64;
        const uint64_t there = cc_observe(&block->allocated[at / 64]) & mine;
        uint64_t first, n;
        for (uint64_t left = there; left; left &= ~cc_word_mask(first, n)) {
            first = first_run(left, &n);
            memset(image->addr + ((base + first) << block->page_shift), 0, n << block->page_shift);
        }
        for (uint64_t left = mine & ~there; rc == 0 && left; left &= ~cc_word_mask(first, n)) {
            first = first_run(left, &n);
            rc = punch_pages(block, image, base + first, n);
        }
    }
    return rc;
}

/* set_or_drop -- these pages' bits in a bitmap of this process */
static void set_or_drop(uint64_t *words, uint64_t first_pfn, uint64_t n_pages, bool set)
{
    const uint64_t end = first_pfn + n_pages;
    for (uint64_t at = first_pfn, n; at < end; at += n) {
        n = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        if (set)
            cc_set_bits(&words[at / 64], cc_word_mask(at % 64, n));
        else
            cc_drop_bits(&words[at / 64], cc_word_mask(at % 64, n));
    }
}

int cc_sparse_zero(struct cc_block *block, const struct cc_image *image, uint64_t first_pfn, uint64_t n_pages, bool keep)
{
    if (n_pages == 0)
        return 0;
    CC_CRASH_POINT("receive: before the hole of a page of zeros");
    if (!keep)
        set_or_drop(block->allocated, first_pfn, n_pages, false);
    int rc = keep ? punch_unknown(block, image, first_pfn, n_pages) : punch_pages(block, image, first_pfn, n_pages);
    CC_CRASH_POINT("receive: the hole of a page of zeros is there");
    return rc;
}

int cc_sparse_punch_guest(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    set_or_drop(block->punched, first_pfn, n_pages, true);
    CC_CRASH_POINT("guest RAM: before a hole");
    int rc = punch_pages(block, &block->guest, first_pfn, n_pages);
    CC_CRASH_POINT("guest RAM: a hole is there");
    return rc;
}
/* has_bytes -- any that is not zero in [at, at + n_bytes)?  A hole reads as zeros and stays one. */
static bool has_bytes(const struct cc_image *image, uint64_t at, uint64_t n_bytes)
{
    uint8_t part[16384];
    for (uint64_t done = 0; done < n_bytes; done += sizeof part) {
        const uint64_t n = n_bytes - done < sizeof part ? n_bytes - done : sizeof part;
        if (pread(image->fd, part, n, (off_t)(image->offset + at + done)) != (ssize_t)n || !cc_is_zero(part, n))
            return true; /* what can't be read counts as data: it is looked at through the mapping, as everything else */
    }
    return false;
}

/* next_bytes -- hugetlbfs does not tell where its holes are, so the bytes themselves are looked at.  Pages that are zero in both images
 * are the same whether they are there or not. */
static bool next_bytes(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    for (uint64_t at = from, n; at < block->len_bytes; at += n) {
        n = WINDOW - at % WINDOW;
        n = block->len_bytes - at < n ? block->len_bytes - at : n;
        if (has_bytes(&block->guest, at, n) || has_bytes(&block->cache, at, n)) {
            *first = at;
            *n_bytes = n;
            return true;
        }
    }
    return false;
}

bool cc_sparse_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    if (from >= block->len_bytes)
        return false;
    if (block->sparse && (block->guest.granule != CC_PAGE || block->cache.granule != CC_PAGE))
        return next_bytes(block, from, first, n_bytes);
    uint64_t start = from, end = block->len_bytes;
    if (block->sparse) {
        uint64_t guest = next_data(&block->guest, from, block->len_bytes), cache = next_data(&block->cache, from, block->len_bytes);
        start = guest < cache ? guest : cache;
        if (start >= block->len_bytes)
            return false;
        uint64_t guest_end = guest == start ? next_hole(&block->guest, start, block->len_bytes) : 0;
        uint64_t cache_end = cache == start ? next_hole(&block->cache, start, block->len_bytes) : 0;
        end = guest_end > cache_end ? guest_end : cache_end;
        end = (end + block->page_size - 1) / block->page_size * block->page_size;
        start -= start % block->page_size;
    }
    *first = start;
    *n_bytes = end - start < WINDOW ? end - start : WINDOW;
    return true;
}

bool cc_sparse_next_staged(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    uint64_t start = from < block->len_bytes ? next_data(&block->cache, from, block->len_bytes) : block->len_bytes;
    if (start >= block->len_bytes)
        return false;
    uint64_t end = next_hole(&block->cache, start, block->len_bytes);
    *first = start - start % block->page_size;
    *n_bytes = (end + block->page_size - 1) / block->page_size * block->page_size - *first;
    return true;
}

/* allocate_data -- pages that the cache has, of a stretch that is not known to be there */
static int allocate_data(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    const uint64_t end = (first_pfn + n_pages) << block->page_shift;
    uint64_t at = first_pfn << block->page_shift, first, n_bytes;
    int rc = 0;
    while (rc == 0 && at < end && (first = next_data(&block->cache, at, block->len_bytes)) < end) {
        const uint64_t hole = next_hole(&block->cache, first, block->len_bytes), until = hole < end ? hole : end;
        first -= first % block->page_size;
        n_bytes = (until - first + block->page_size - 1) / block->page_size * block->page_size;
        rc = cc_sparse_allocate(block, first >> block->page_shift, n_bytes >> block->page_shift);
        at = first + n_bytes;
    }
    return rc;
}

int cc_sparse_prepare(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    if (!block->keeps_holes)
        return cc_sparse_allocate(block, first_pfn, n_pages);
    const uint64_t end = first_pfn + n_pages;
    int rc = 0;
    for (uint64_t at = first_pfn, in_word; rc == 0 && at < end; at += in_word) {
        in_word = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        const uint64_t mine = cc_word_mask(at % 64, in_word), gone = cc_observe(&block->punched[at / 64]) & mine;
        if (gone) {
            cc_drop_bits(&block->allocated[at / 64], gone);
            cc_drop_bits(&block->punched[at / 64], gone);
        }
        uint64_t first, n;
        for (uint64_t left = mine & ~cc_observe(&block->allocated[at / 64]); rc == 0 && left; left &= ~cc_word_mask(first, n)) {
            first = first_run(left, &n);
            rc = allocate_data(block, at / 64 * 64 + first, n);
        }
    }
    return rc;
}

uint64_t cc_sparse_to_copy(const struct cc_block *block, uint64_t word)
{
    return block->keeps_holes ? cc_observe(&block->allocated[word]) & ~cc_observe(&block->punched[word]) : ~0ull;
}

int cc_sparse_write_guest(const struct cc_block *block, uint64_t pfn)
{
    const uint8_t *from = block->cache.addr + (pfn << block->page_shift);
    uint64_t at = pfn << block->page_shift, left = block->page_size;
    CC_CRASH_POINT("preflush: before a page of a sparse block");
    while (left) {
        ssize_t n = pwrite(block->guest.fd, from, left, (off_t)(block->guest.offset + at));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == ENOSPC || errno == ENOMEM
                       ? cc_fail(COLOCACHE_E_NO_MEMORY, "%s needs a page more than its file system has: enlarge it or free some",
                                 block->name)
                       : cc_fail_errno("writing a page into guest RAM");
        from += n;
        at += (uint64_t)n;
        left -= (uint64_t)n;
    }
    CC_CRASH_POINT("preflush: a page of a sparse block");
    return 0;
}
