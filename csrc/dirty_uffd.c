/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_uffd.c -- the kernel's log of writes to 4 KiB mappings of this process, or of another one.
 *
 * userfaultfd write-protect in its asynchronous form: the first write to a protected page clears the protection and nobody
 * waits; PAGEMAP_SCAN reports such pages and protects them again in one step, so there is no moment between get and clear.
 * Works without privilege (UFFD_USER_MODE_ONLY) and sees writes of kernel and KVM too.  On hugetlb the unit is 2 MiB.
 *
 * A userfaultfd acts on the memory of the process that made it, whoever holds the descriptor: that process hands it over, and everything
 * else is done from outside.
 *
 * Under KVM a scan that protects takes all of KVM's own mappings of the scanned range away, written or not, and the guest pays for each
 * page that it touches next (20 us where KVM shadows page tables).  There the written pages are looked for first, by a scan that changes
 * nothing, and only where some are is protected.  What is written between the two scans is in the second or stays for the next sync.
 */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bitmap.h"
#include "error.h"
#include "ioctl.h"
#include "pagemap.h"

/* Kernel interface of 6.7 (include/uapi/linux/userfaultfd.h), for builds against older headers */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif

#define REGIONS 4096u
#define DENSE 16u /* more than one written page in so many: one scan over all of them costs less than one for each run */

struct uffd_source {
    struct colocache_source base;
    int uffd, pagemap;
    bool foreign;                   /* memory of another process */
    struct cc_page_region *regions; /* REGIONS of them */
    struct cc_page_region *found;   /* as many, where pages are looked for first; else NULL */
    uint32_t n_ranges;
    struct colocache_uffd_range ranges[];
};

/* take_region -- pages [start, end) of a range were written: hand them on as words of ones, at most 4096 pages at a time */
static int take_region(const struct colocache_uffd_range *range, const struct cc_page_region *region, cc_take_fn *take, void *context)
{
    static const uint64_t ones[64] = {
        [0 ... 63] = ~0ull,
    };
    uint64_t base = (uint64_t)(uintptr_t)range->addr;
    uint64_t first = (region->start - base) / CC_SOURCE_PAGE, n = (region->end - region->start) / CC_SOURCE_PAGE;
    if (first >= range->n_pages) /* hugetlb: the last 2 MiB page may reach past the range */
        return 0;
    if (n > range->n_pages - first)
        n = range->n_pages - first;
    while (n) {
        uint64_t part = n < 4096 ? n : 4096;
        uint64_t last = cc_word_mask(0, part % 64 ? part % 64 : 64);
        int rc;
        if (part == 4096 || part % 64 == 0) {
            rc = take(context, range->block, range->first_pfn + first, part, ones);
        } else {
            uint64_t words[64];
            memcpy(words, ones, sizeof words);
            words[part / 64] = last;
            rc = take(context, range->block, range->first_pfn + first, part, words);
        }
        if (rc)
            return rc;
        first += part;
        n -= part;
    }
    return 0;
}

static int has_ended(void)
{
    return cc_fail(COLOCACHE_E_LOG_LOST, "the process whose memory is logged has ended");
}

/* still_there -- the process whose memory was scanned has it still, and so had it in all scans before.  Some kernels scan memory that is
 * gone as memory that nobody has written; a read of its pagemap has an end there in each. */
static int still_there(const struct uffd_source *source)
{
    uint64_t entry;
    const off_t at = (off_t)((uintptr_t)source->ranges[0].addr / CC_SOURCE_PAGE * sizeof entry);
    const ssize_t n = pread(source->pagemap, &entry, sizeof entry, at);
    if (n == (ssize_t)sizeof entry)
        return 0;
    return n == 0 || errno == ESRCH ? has_ended() : cc_source_lost("reading the pagemap");
}

/* scan -- the next regions with written pages in [*at, end), protected again if `protect`; moves *at to where it ended */
static int scan(const struct uffd_source *source, uint64_t *at, uint64_t end, struct cc_page_region *regions, bool protect)
{
    struct cc_scan_arg arg = {
        .size = sizeof arg,
        .flags = (protect ? CC_SCAN_WP_MATCHING : 0) | CC_SCAN_CHECK_WPASYNC,
        .start = *at,
        .end = end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .category_mask = CC_PAGE_IS_WRITTEN,
        .return_mask = CC_PAGE_IS_WRITTEN,
    };
    int n = cc_ioctl(source->pagemap, CC_PAGEMAP_SCAN, &arg);
    if (n < 0)
        return errno == ESRCH ? has_ended() : cc_source_lost("PAGEMAP_SCAN");
    *at = arg.walk_end > *at ? arg.walk_end : end;
    return n;
}

/* take_stretch -- get and clear [at, end) of a range */
static int take_stretch(const struct uffd_source *source, const struct colocache_uffd_range *range, uint64_t at, uint64_t end,
                        cc_take_fn *take, void *context)
{
    while (at < end) {
        int n = scan(source, &at, end, source->regions, true);
        if (n < 0)
            return n;
        for (int r = 0; r < n; r++) {
            if (take_region(range, &source->regions[r], take, context) != 0) /* the scan has protected the pages again */
                return cc_source_not_taken(source->foreign ? "the log of another process" : "the log of this process");
        }
    }
    return 0;
}

/* take_found -- get and clear [at, end) of a range, touching only where pages were written */
static int take_found(const struct uffd_source *source, const struct colocache_uffd_range *range, uint64_t at, uint64_t end,
                      cc_take_fn *take, void *context)
{
    while (at < end) {
        int n = scan(source, &at, end, source->found, false), rc = 0;
        if (n <= 0)
            return n;
        const struct cc_page_region *last = &source->found[n - 1];
        uint64_t n_bytes = 0;
        for (int r = 0; r < n; r++)
            n_bytes += source->found[r].end - source->found[r].start;
        if (n_bytes * DENSE > last->end - source->found->start)
            rc = take_stretch(source, range, source->found->start, last->end, take, context);
        else
            for (int r = 0; r < n && rc == 0; r++)
                rc = take_stretch(source, range, source->found[r].start, source->found[r].end, take, context);
        if (rc)
            return rc;
    }
    return 0;
}

static int uffd_sync(struct colocache_source *base, cc_take_fn *take, void *context)
{
    struct uffd_source *source = (struct uffd_source *)base;
    for (uint32_t i = 0; i < source->n_ranges; i++) {
        int rc = cc_source_fits(take, context, source->ranges[i].block, source->ranges[i].first_pfn, source->ranges[i].n_pages);
        if (rc)
            return rc;
    }
    for (uint32_t i = 0; i < source->n_ranges; i++) {
        const struct colocache_uffd_range *range = &source->ranges[i];
        uint64_t at = (uint64_t)(uintptr_t)range->addr, end = at + range->n_pages * CC_SOURCE_PAGE;
        int rc = (source->found ? take_found : take_stretch)(source, range, at, end, take, context);
        if (rc)
            return rc;
    }
    return source->foreign ? still_there(source) : 0;
}

static void uffd_close(struct colocache_source *base)
{
    struct uffd_source *source = (struct uffd_source *)base;
    for (uint32_t i = 0; source->foreign && source->uffd >= 0 && i < source->n_ranges; i++) { /* its maker's copy may stay open */
        struct uffdio_range range = {.start = (uint64_t)(uintptr_t)source->ranges[i].addr,
                                     .len = source->ranges[i].n_pages * CC_SOURCE_PAGE};
        ioctl(source->uffd, UFFDIO_UNREGISTER, &range);
    }
    if (source->uffd >= 0)
        close(source->uffd); /* unregisters and unprotects */
    if (source->pagemap >= 0)
        close(source->pagemap);
    free(source->regions);
    free(source->found);
    free(source);
}

static int use_uffd(int fd)
{
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
    if (cc_ioctl(fd, UFFDIO_API, &api) == 0)
        return 0;
    return cc_fail(COLOCACHE_E_UNSUPPORTED, "userfaultfd has no asynchronous write-protection (Linux 6.7 and newer do): %s",
                   colocache_strerror(-errno));
}

static int open_uffd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "userfaultfd is unavailable: %s", colocache_strerror(-errno));
    int rc = use_uffd(fd);
    if (rc)
        close(fd);
    return rc ? rc : fd;
}

static int own_copy(int fd, const char *what)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return copy >= 0 ? copy : cc_fail_errno(what);
}

/* arm -- register a range and protect all of it */
static int arm(const struct uffd_source *source, const struct colocache_uffd_range *range)
{
    uint64_t start = (uint64_t)(uintptr_t)range->addr, len = range->n_pages * CC_SOURCE_PAGE;
    struct uffdio_register registration = {.range = {.start = start, .len = len}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (cc_ioctl(source->uffd, UFFDIO_REGISTER, &registration) != 0)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "write-protection of %llu pages at %p can't be registered: %s",
                       (unsigned long long)range->n_pages, range->addr, colocache_strerror(-errno));
    struct uffdio_writeprotect protect = {.range = {.start = start, .len = len}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    int rc;
    do {
        rc = cc_ioctl(source->uffd, UFFDIO_WRITEPROTECT, &protect);
    } while (rc != 0 && errno == EAGAIN); /* the address space is just changing */
    return rc == 0 ? 0 : cc_fail_errno("write-protecting guest RAM");
}

/* make -- a source with its ranges checked and room for scans; no descriptors yet */
static int make(const struct colocache_uffd_range *ranges, uint32_t n_ranges, bool look_first, struct uffd_source **out)
{
    if (!ranges || !n_ranges || n_ranges > CC_SOURCE_PARTS_MAX)
        return cc_fail(COLOCACHE_E_ARGUMENT, "a userfaultfd log needs 1 to %u ranges", CC_SOURCE_PARTS_MAX);
    for (uint32_t i = 0; i < n_ranges; i++) {
        uint64_t addr = (uint64_t)(uintptr_t)ranges[i].addr;
        if (!ranges[i].n_pages || ranges[i].n_pages > CC_SOURCE_PAGES_MAX || addr % CC_SOURCE_PAGE ||
            addr > UINT64_MAX - ranges[i].n_pages * CC_SOURCE_PAGE)
            return cc_fail(COLOCACHE_E_ARGUMENT, "range %u: %llu pages at %p", i, (unsigned long long)ranges[i].n_pages, ranges[i].addr);
    }
    struct uffd_source *source = calloc(1, sizeof *source + n_ranges * sizeof ranges[0]);
    if (!source)
        return cc_fail(-ENOMEM, "no memory for %u ranges", n_ranges);
    cc_source_init(&source->base, uffd_sync, uffd_close, NULL);
    source->uffd = source->pagemap = -1;
    memcpy(source->ranges, ranges, n_ranges * sizeof ranges[0]);
    source->regions = calloc(REGIONS, sizeof *source->regions);
    source->found = look_first ? calloc(REGIONS, sizeof *source->found) : NULL;
    if (!source->regions || (look_first && !source->found)) {
        uffd_close(&source->base);
        return cc_fail(-ENOMEM, "no memory for scan results");
    }
    *out = source;
    return 0;
}

/* finish -- arm the ranges of a source that has its descriptors, or `rc` < 0: close it again */
static int finish(struct uffd_source *source, int rc, uint32_t n_ranges, struct colocache_source **out)
{
    for (uint32_t i = 0; rc == 0 && i < n_ranges; i++) {
        rc = arm(source, &source->ranges[i]);
        source->n_ranges = i + 1;
    }
    if (rc) {
        uffd_close(&source->base);
        return rc;
    }
    *out = &source->base;
    return 0;
}

int colocache_source_uffd(const struct colocache_uffd_range *ranges, uint32_t n_ranges, struct colocache_source **out)
{
    struct uffd_source *source;
    int rc = out ? make(ranges, n_ranges, false, &source) : cc_fail(COLOCACHE_E_ARGUMENT, "there is no place for the log");
    if (rc)
        return rc;
    rc = open_uffd();
    if (rc >= 0) {
        source->uffd = rc;
        source->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        rc = source->pagemap >= 0 ? 0 : cc_fail_errno("opening /proc/self/pagemap");
    }
    return finish(source, rc, n_ranges, out);
}

int colocache_source_uffd_process(int uffd, int pagemap_fd, int kvm_maps_it, const struct colocache_uffd_range *ranges, uint32_t n_ranges,
                                  struct colocache_source **out)
{
    struct uffd_source *source;
    int rc = out ? make(ranges, n_ranges, kvm_maps_it != 0, &source) : cc_fail(COLOCACHE_E_ARGUMENT, "there is no place for the log");
    if (rc)
        return rc;
    source->foreign = true;
    source->uffd = rc = own_copy(uffd, "taking the userfaultfd");
    if (rc >= 0)
        source->pagemap = rc = own_copy(pagemap_fd, "taking the pagemap");
    if (rc >= 0)
        rc = use_uffd(source->uffd);
    return finish(source, rc, n_ranges, out);
}
