/* SPDX-License-Identifier: Apache-2.0 */
/* spill.c -- the spill file of a bounded region.  What holds is in spill.h. */
#define _GNU_SOURCE
#include "internal.h"
#include "spill.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bitmap.h"
#include "checksum.h"
#include "error.h"
#include "fault.h"

#define RUNS_AT_ONCE (2 * CC_RUNS_MIN)

/* ---- the file and its places ---------------------------------------------------------------------------------------- */

int cc_spill_open(struct colocache *cc, int fd)
{
    struct stat st;
    cc->spill.fd = -1;
    if (fd == 0)
        return 0;
    if (!cc->bounded)
        return cc_fail(COLOCACHE_E_ARGUMENT, "spill_fd is %d: only bounded memory has a limit beyond which pages are spilled", fd);
    if (fstat(fd, &st) != 0)
        return cc_fail(-errno, "spill_fd is %d, which is no open descriptor", fd);
    if (!S_ISREG(st.st_mode) || (fcntl(fd, F_GETFL) & (O_ACCMODE | O_APPEND)) != O_RDWR)
        return cc_fail(COLOCACHE_E_ARGUMENT, "spill_fd is %d: it must be a regular file, opened for reading and writing", fd);
    cc->spill.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (cc->spill.fd < 0)
        return cc_fail_errno("duplicating the spill file's descriptor");
    cc->spill.used = st.st_size != 0; /* whose it is, is known when the region's lock is held: what is in it goes with the first epoch */
    (void)posix_fadvise(cc->spill.fd, 0, 0, POSIX_FADV_RANDOM); /* else the kernel reads ahead, into memory that counts */
    return 0;
}

void cc_spill_close(struct colocache *cc)
{
    if (cc_spill_may(cc))
        close(cc->spill.fd);
}

int cc_spill_open_block(struct colocache *cc, uint32_t index)
{
    struct cc_block *block = &cc->blocks[index];
    if (!cc_spill_may(cc))
        return 0;
    const uint64_t n_words = cc_words_for(block->n_pages);
    block->spilled = calloc(1, sizeof *block->spilled);
    block->spilled_words = calloc(n_words + cc_words_for(n_words), 8);
    if (!block->spilled || !block->spilled_words)
        return cc_fail(-ENOMEM, "no memory for the bitmap of spilled pages of block %s", block->name);
    cc_bitmap_init(block->spilled, block->spilled_words, block->spilled_words + n_words, block->n_pages);
    block->spill_offset = 0; /* removed ones keep their place, as they do in the table */
    for (uint32_t i = 0; i < index; i++) {
        const struct cc_block_entry *entry = &cc->region.table[i];
        block->spill_offset += cc_round_to_page(cc_words_for(entry->len_bytes / entry->page_size) * 8) + entry->len_bytes;
    }
    return 0;
}

void cc_spill_close_block(struct cc_block *block)
{
    free(block->spilled);
    free(block->spilled_words);
    block->spilled = NULL;
    block->spilled_words = NULL;
}

static uint64_t place_of(const struct cc_block *block, uint64_t pfn)
{
    return block->spill_offset + cc_round_to_page(block->spilled->n_words * 8) + (pfn << block->page_shift);
}

/* ---- bytes ---------------------------------------------------------------------------------------------------------- */

static int failed(const struct colocache *cc, const struct cc_block *block)
{
    if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)
        return cc_fail(COLOCACHE_E_NO_MEMORY,
                       "%llu bytes of pages are spilled, and the spill file has no room for a further page of block %s (%s): abort the "
                       "epoch, and free some of its file system or take checkpoints more often",
                       (unsigned long long)cc_observe(&cc->spill.n_bytes), block->name, colocache_strerror(-errno));
    return cc_fail_errno("writing a page into the spill file");
}

/* write_back -- all that waits, and out of memory with it.  An error of the disk is told here, before anything depends on the bytes. */
static int write_back(struct colocache *cc)
{
    const unsigned all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    int rc;
    do {
        rc = sync_file_range(cc->spill.fd, 0, 0, all);
    } while (rc != 0 && errno == EINTR);
    if (rc != 0)
        return -1;
    (void)posix_fadvise(cc->spill.fd, 0, 0, POSIX_FADV_DONTNEED);
    cc->spill.waiting = 0;
    return 0;
}

static int put(struct colocache *cc, uint64_t at, const void *data, uint64_t n_bytes)
{
    const uint8_t *from = data;
    cc->spill.used = true;
    while (n_bytes) {
        const uint64_t most = n_bytes < CC_SPILL_PART ? n_bytes : CC_SPILL_PART;
        const ssize_t n = pwrite(cc->spill.fd, from, most, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        from += n;
        at += (uint64_t)n;
        n_bytes -= (uint64_t)n;
        cc->spill.waiting += (uint64_t)n;
        if (cc->spill.waiting >= CC_SPILL_WINDOW - CC_SPILL_PART && write_back(cc) != 0)
            return -1;
    }
    return 0;
}

static int get(const struct colocache *cc, uint64_t at, void *to, uint64_t n_bytes)
{
    uint8_t *into = to;
    while (n_bytes) {
        const ssize_t n = pread(cc->spill.fd, into, n_bytes, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return cc_fail_errno("reading from the spill file");
        if (n == 0)
            return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "the spill file ends at byte %llu, where the epoch has %llu bytes more",
                           (unsigned long long)at, (unsigned long long)n_bytes);
        into += n;
        at += (uint64_t)n;
        n_bytes -= (uint64_t)n;
    }
    return 0;
}

/* ---- receiving ------------------------------------------------------------------------------------------------------ */

int cc_spill_write(struct colocache *cc, const struct cc_block *block, uint64_t first_pfn, uint64_t at, const void *data, uint64_t n_bytes)
{
    pthread_mutex_lock(&cc->spill.lock); /* so that all threads together keep the window */
    CC_CRASH_POINT("spill: before a page");
    const int rc = put(cc, place_of(block, first_pfn) + at, data, n_bytes) == 0 ? 0 : failed(cc, block);
    CC_CRASH_POINT("spill: after a page");
    pthread_mutex_unlock(&cc->spill.lock);
    return rc;
}

/* change -- these pages' bits, and the count of bytes */
static void change(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages, bool set)
{
    const uint64_t end = first_pfn + n_pages;
    uint64_t n_changed = 0;
    pthread_mutex_lock(&cc->spill.lock);
    for (uint64_t at = first_pfn, n; at < end; at += n) {
        n = 64 - at % 64 < end - at ? 64 - at % 64 : end - at;
        uint64_t *word = &block->spilled->words[at / 64], mine = cc_word_mask(at % 64, n), has = cc_observe(word) & mine;
        n_changed += (uint64_t)__builtin_popcountll(set ? mine & ~has : has);
        if (!set)
            cc_drop_bits(word, mine);
    }
    if (set)
        cc_bitmap_set(block->spilled, first_pfn, n_pages);
    const uint64_t n_bytes = n_changed << block->page_shift;
    cc_add(&cc->spill.n_bytes, set ? n_bytes : 0 - n_bytes);
    pthread_mutex_unlock(&cc->spill.lock);
}

void cc_spill_done(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    change(cc, block, first_pfn, n_pages, true);
}

void cc_spill_drop(struct colocache *cc, struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    if (block->spilled && cc_observe(&cc->spill.n_bytes))
        change(cc, block, first_pfn, n_pages, false);
}

void cc_spill_empty(struct colocache *cc)
{
    if (!cc->spill.used)
        return;
    for (uint32_t i = 0; i < cc_observe32(&cc->n_blocks); i++) {
        if (!cc_gone(&cc->blocks[i]))
            cc_bitmap_clear_all(cc->blocks[i].spilled);
    }
    cc_publish(&cc->spill.n_bytes, 0);
    CC_CRASH_POINT("spill: before the file is emptied");
    if (ftruncate(cc->spill.fd, 0) == 0) { /* else later: bytes without a bit mean nothing */
        cc->spill.used = false;
        cc->spill.waiting = 0;
    }
    CC_CRASH_POINT("spill: the file is empty");
}

/* ---- seal and attach -------------------------------------------------------------------------------------------------- */

/* told -- what the bitmaps of all blocks are, for a record */
static void told(const struct colocache *cc, struct cc_record *record)
{
    uint64_t sum = 0;
    record->spill_pages = record->spill_bytes = 0;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        const struct cc_block *block = &cc->blocks[i];
        if (cc_gone(block) || block->standing != CC_HERE)
            continue;
        const uint64_t n = cc_bitmap_count(block->spilled);
        record->spill_pages += n;
        record->spill_bytes += n << block->page_shift;
        sum += cc_checksum_term(cc_bitmap_checksum(block->spilled), i);
    }
    record->spill_checksum = cc_checksum_finish(sum);
}

int cc_spill_seal(struct colocache *cc, struct cc_record *record)
{
    struct stat st;
    if (!cc_spill_may(cc) || cc_observe(&cc->spill.n_bytes) == 0)
        return 0;
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        const struct cc_block *block = &cc->blocks[i];
        if (cc_gone(block) || block->standing != CC_HERE)
            continue;
        cc_bitmap_keep(block->spilled, &block->bitmaps[COLOCACHE_BITMAP_FLUSH_SET]); /* a page that broke off is in no set */
        CC_CRASH_POINT("seal: before the bitmap of spilled pages");
        if (put(cc, block->spill_offset, block->spilled->words, block->spilled->n_words * 8) != 0)
            return failed(cc, block);
    }
    CC_CRASH_POINT("seal: the bitmaps of spilled pages are in the file");
    if (write_back(cc) != 0 || fstat(cc->spill.fd, &st) != 0)
        return cc_fail_errno("writing the spill file");
    told(cc, record);
    if (record->spill_pages == 0) { /* all of them broke off */
        record->spill_checksum = 0;
        return 0;
    }
    record->spill_device = (uint64_t)st.st_dev;
    record->spill_inode = (uint64_t)st.st_ino;
    return 0;
}

/* find_block -- its bitmap, and that the file reaches to its last page */
static int find_block(const struct colocache *cc, const struct cc_block *block, uint64_t file_bytes)
{
    struct cc_bitmap *spilled = block->spilled;
    int rc = get(cc, block->spill_offset, spilled->words, spilled->n_words * 8);
    if (rc)
        return rc;
    cc_bitmap_rebuild_summary(spilled);
    uint64_t last = spilled->n_words;
    while (last && spilled->words[last - 1] == 0)
        last--;
    const uint64_t n_pages = last ? last * 64 - (uint64_t)__builtin_clzll(spilled->words[last - 1]) : 0;
    if (n_pages > block->n_pages || (n_pages && file_bytes < place_of(block, n_pages)))
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "the spill file has %llu bytes, and its pages of block %s end at %llu",
                       (unsigned long long)file_bytes, block->name, (unsigned long long)place_of(block, n_pages));
    return 0;
}

int cc_spill_find(struct colocache *cc, const struct cc_record *record)
{
    struct cc_record found = {0};
    struct stat st;
    if (record->committed || record->spill_pages == 0)
        return 0;
    const unsigned long long epoch = record->epoch, n_pages = record->spill_pages, inode = record->spill_inode;
    if (!cc_spill_may(cc))
        return cc_fail(
            COLOCACHE_E_FOREIGN_IMAGE,
            "epoch %llu was sealed with %llu pages in a spill file (inode %llu), and none was given: bring it back and attach again", epoch,
            n_pages, inode);
    if (fstat(cc->spill.fd, &st) != 0)
        return cc_fail_errno("looking at the spill file");
    if ((uint64_t)st.st_dev != record->spill_device || (uint64_t)st.st_ino != record->spill_inode)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE,
                       "epoch %llu was sealed with %llu pages in another spill file (inode %llu) than the one that was given (inode %llu)",
                       epoch, n_pages, inode, (unsigned long long)st.st_ino);
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < cc->n_blocks; i++)
        rc = cc_gone(&cc->blocks[i]) ? 0 : find_block(cc, &cc->blocks[i], (uint64_t)st.st_size);
    if (rc)
        return rc;
    told(cc, &found);
    if (found.spill_checksum != record->spill_checksum || found.spill_pages != record->spill_pages)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE,
                       "the spill file says that %llu pages of epoch %llu are in it, the commit record says %llu: something wrote into it",
                       (unsigned long long)found.spill_pages, epoch, n_pages);
    cc_publish(&cc->spill.n_bytes, found.spill_bytes);
    return 0;
}

/* ---- flush ---------------------------------------------------------------------------------------------------------- */

/* copy_run -- a window at a time: what was read is dropped from memory */
static int copy_run(struct colocache *cc, const struct cc_block *block, struct cc_bit_run run)
{
    const uint64_t len = run.n << block->page_shift;
    int rc = 0;
    for (uint64_t at = 0, n; rc == 0 && at < len; at += n) {
        n = len - at < CC_SPILL_WINDOW - cc->spill.waiting ? len - at : CC_SPILL_WINDOW - cc->spill.waiting;
        CC_CRASH_POINT("flush: before spilled pages");
        rc = get(cc, place_of(block, run.first) + at, block->guest.addr + (run.first << block->page_shift) + at, n);
        CC_CRASH_POINT("flush: after spilled pages");
        cc->spill.waiting += n;
        if (cc->spill.waiting >= CC_SPILL_WINDOW) {
            (void)posix_fadvise(cc->spill.fd, 0, 0, POSIX_FADV_DONTNEED);
            cc->spill.waiting = 0;
        }
    }
    return rc;
}

/* ask_for -- the disk may bring these runs in any order, or at once */
static void ask_for(const struct colocache *cc, const struct cc_block *block, const struct cc_bit_run *runs, uint32_t n)
{
    uint64_t asked = 0;
    for (uint32_t i = 0; i < n && asked < CC_SPILL_WINDOW; i++) {
        const uint64_t len = runs[i].n << block->page_shift;
        (void)posix_fadvise(cc->spill.fd, (off_t)place_of(block, runs[i].first), (off_t)(len < CC_SPILL_WINDOW ? len : CC_SPILL_WINDOW),
                            POSIX_FADV_WILLNEED);
        asked += len;
    }
}

void cc_spill_hide(const struct cc_block *block)
{
    const struct cc_bitmap *spilled = block->spilled;
    if (!spilled)
        return;
    for (uint64_t s = cc_bitmap_next_summary(spilled, 0); s < spilled->n_summary_words; s = cc_bitmap_next_summary(spilled, s + 1)) {
        for (uint64_t in_use = spilled->summary[s]; in_use; in_use &= in_use - 1) {
            const uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(in_use);
            block->staged->words[w] &= ~spilled->words[w];
        }
    }
}

int cc_spill_flush(struct colocache *cc, struct colocache_flush_result *out)
{
    struct cc_bit_run runs[RUNS_AT_ONCE];
    int rc = 0;
    if (cc_observe(&cc->spill.n_bytes) == 0)
        return 0;
    cc->spill.waiting = 0;
    for (uint32_t b = 0; rc == 0 && b < cc->n_blocks; b++) {
        const struct cc_block *block = &cc->blocks[b];
        uint64_t from = 0;
        uint32_t n = 0;
        while (rc == 0 && !cc_gone(block) && (n = cc_bitmap_runs(block->spilled, &from, block->n_pages, runs, RUNS_AT_ONCE)) != 0) {
            ask_for(cc, block, runs, n);
            for (uint32_t i = 0; rc == 0 && i < n; i++) {
                rc = copy_run(cc, block, runs[i]);
                out->n_pages += runs[i].n;
                out->n_runs++;
                out->n_bytes += runs[i].n << block->page_shift;
                out->spilled_pages += runs[i].n;
            }
        }
    }
    (void)posix_fadvise(cc->spill.fd, 0, 0, POSIX_FADV_DONTNEED);
    cc->spill.waiting = 0;
    return rc;
}
