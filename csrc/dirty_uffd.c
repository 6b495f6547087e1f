/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dirty_uffd.c -- the kernel's log of writes to 4 KiB mappings of this process.
 *
 * userfaultfd write-protect in its asynchronous form: the first write to a protected page clears the protection and nobody
 * waits; PAGEMAP_SCAN reports such pages and protects them again in one step, so there is no moment between get and clear.
 * Works without privilege (UFFD_USER_MODE_ONLY) and sees writes of kernel and KVM too.  On hugetlb the unit is 2 MiB.
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

struct uffd_source {
    struct colocache_source base;
    int uffd, pagemap;
    struct cc_page_region *regions;
    uint32_t n_ranges;
    struct colocache_uffd_range ranges[];
};

/* take_region -- pages [start, end) of a range were written: hand them on as words of ones, at most 4096 pages at a time */
static int take_region(const struct colocache_uffd_range *range, const struct cc_page_region *region,
                       cc_take_fn *take, void *context)
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
        while (at < end) {
            struct cc_scan_arg scan = {
                .size = sizeof scan,
                .flags = CC_SCAN_WP_MATCHING | CC_SCAN_CHECK_WPASYNC,
                .start = at,
                .end = end,
                .vec = (uint64_t)(uintptr_t)source->regions,
                .vec_len = REGIONS,
                .category_mask = CC_PAGE_IS_WRITTEN,
                .return_mask = CC_PAGE_IS_WRITTEN,
            };
            int n = cc_source_ioctl(source->pagemap, CC_PAGEMAP_SCAN, &scan);
            if (n < 0)
                return cc_source_lost("PAGEMAP_SCAN");
            for (int r = 0; r < n; r++) {
                if (take_region(range, &source->regions[r], take, context) != 0)
                    return cc_source_not_taken("the log of this process"); /* the scan has protected the pages again */
            }
            if (scan.walk_end <= at && n == 0)
                break;
            at = scan.walk_end;
        }
    }
    return 0;
}

static void uffd_close(struct colocache_source *base)
{
    struct uffd_source *source = (struct uffd_source *)base;
    if (source->uffd >= 0)
        close(source->uffd); /* unregisters and unprotects */
    if (source->pagemap >= 0)
        close(source->pagemap);
    free(source->regions);
    free(source);
}

static int open_uffd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "userfaultfd is not to be had: %s", colocache_strerror(-errno));
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
    if (cc_source_ioctl(fd, UFFDIO_API, &api) != 0) {
        int saved = errno;
        close(fd);
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "userfaultfd has no asynchronous write-protection (Linux 6.7 and newer do): %s",
                       colocache_strerror(-saved));
    }
    return fd;
}

/* arm -- register a range and protect all of it */
static int arm(const struct uffd_source *source, const struct colocache_uffd_range *range)
{
    uint64_t start = (uint64_t)(uintptr_t)range->addr, len = range->n_pages * CC_SOURCE_PAGE;
    struct uffdio_register registration = {.range = {.start = start, .len = len}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (cc_source_ioctl(source->uffd, UFFDIO_REGISTER, &registration) != 0)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "write-protection of %llu pages at %p can't be registered: %s",
                       (unsigned long long)range->n_pages, range->addr, colocache_strerror(-errno));
    struct uffdio_writeprotect protect = {.range = {.start = start, .len = len}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    int rc;
    do {
        rc = cc_source_ioctl(source->uffd, UFFDIO_WRITEPROTECT, &protect);
    } while (rc != 0 && errno == EAGAIN); /* the address space is just changing */
    return rc == 0 ? 0 : cc_fail_errno("write-protecting guest RAM");
}

int colocache_source_uffd(const struct colocache_uffd_range *ranges, uint32_t n_ranges, struct colocache_source **out)
{
    if (!ranges || !n_ranges || n_ranges > CC_SOURCE_PARTS_MAX || !out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "a userfaultfd log needs 1 to %u ranges and a place for the result", CC_SOURCE_PARTS_MAX);
    for (uint32_t i = 0; i < n_ranges; i++) {
        if (!ranges[i].n_pages || ranges[i].n_pages > CC_SOURCE_PAGES_MAX || (uintptr_t)ranges[i].addr % CC_SOURCE_PAGE)
            return cc_fail(COLOCACHE_E_ARGUMENT, "range %u: %llu pages at %p", i, (unsigned long long)ranges[i].n_pages, ranges[i].addr);
    }
    struct uffd_source *source = calloc(1, sizeof *source + n_ranges * sizeof ranges[0]);
    if (!source)
        return cc_fail(-ENOMEM, "no memory for %u ranges", n_ranges);
    source->base = (struct colocache_source){.sync = uffd_sync, .close = uffd_close};
    source->uffd = source->pagemap = -1;
    source->n_ranges = n_ranges;
    memcpy(source->ranges, ranges, n_ranges * sizeof ranges[0]);
    source->regions = calloc(REGIONS, sizeof *source->regions);
    int rc = source->regions ? open_uffd() : cc_fail(-ENOMEM, "no memory for scan results");
    if (rc >= 0) {
        source->uffd = rc;
        source->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        rc = source->pagemap >= 0 ? 0 : cc_fail_errno("opening /proc/self/pagemap");
    }
    for (uint32_t i = 0; rc == 0 && i < n_ranges; i++)
        rc = arm(source, &source->ranges[i]);
    if (rc) {
        uffd_close(&source->base);
        return rc;
    }
    *out = &source->base;
    return 0;
}
