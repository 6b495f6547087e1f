/* SPDX-License-Identifier: Apache-2.0 */
/*
 * private.c -- a MAP_PRIVATE mapping of guest RAM: which of its pages are private copies.
 *
 * The first write to a page of such a mapping makes a copy that only this process sees; all other pages are the file's, and show at once
 * what is written to the file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#include "colocache.h"
#include "error.h"
#include "ioctl.h"
#include "layout.h"
#include "pagemap.h"
#include "private.h"

#define ENTRIES 512u /* of /proc/PID/pagemap at a time, on the stack */
#define PM_SWAPPED (1ull << 62)
#define PM_PRESENT (1ull << 63)
#define PM_FILE (1ull << 61) /* of a file, or shared */

/* ---- scanning -------------------------------------------------------------------------------------------------------- */

int cc_private_check_range(const void *addr, uint64_t len_bytes)
{
    const uint64_t at = (uint64_t)(uintptr_t)addr;
    if (!addr || at % CC_PAGE || len_bytes % CC_PAGE || len_bytes > COLOCACHE_BLOCK_BYTES_MAX || at > UINT64_MAX - len_bytes)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%llu bytes at %p: give a range of whole pages", (unsigned long long)len_bytes, addr);
    return 0;
}

int cc_private_open(int pid)
{
    char path[64];
    snprintf(path, sizeof path, pid ? "/proc/%d/pagemap" : "/proc/self/pagemap", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : cc_fail_errno("opening a process's pagemap");
}

int cc_private_scan(int pagemap, uint64_t *at, uint64_t end, struct cc_page_region regions[CC_PRIVATE_REGIONS])
{
    struct cc_scan_arg scan = {
        .size = sizeof scan,
        .start = *at,
        .end = end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = CC_PRIVATE_REGIONS,
        .category_anyof_mask = CC_PAGE_IS_PRESENT | CC_PAGE_IS_SWAPPED,
        .return_mask = CC_PAGE_IS_FILE | CC_PAGE_IS_HUGE,
    };
    int n = cc_ioctl(pagemap, CC_PAGEMAP_SCAN, &scan);
    if (n < 0)
        return errno == ENOTTY || errno == EINVAL ? -ENOTTY : cc_fail_errno("PAGEMAP_SCAN");
    *at = scan.walk_end > *at ? scan.walk_end : end;
    return n;
}

/* scan_entries -- the same without PAGEMAP_SCAN: 8 bytes a page, by file position */
static int scan_entries(int pagemap, uint64_t at, uint64_t end, cc_private_run_fn *run, void *context)
{
    uint64_t entries[ENTRIES], start = at; /* private pages from `start` to where we are */
    int rc = 0;
    while (rc == 0 && at < end) {
        uint64_t wanted = (end - at) / CC_PAGE < ENTRIES ? (end - at) / CC_PAGE : ENTRIES;
        ssize_t n = pread(pagemap, entries, wanted * 8, (off_t)(at / CC_PAGE * 8));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return cc_fail_errno("reading a process's pagemap");
        if (n < 8)
            break; /* past the end of its address space */
        for (ssize_t i = 0; rc == 0 && i < n / 8; i++, at += CC_PAGE) {
            if ((entries[i] & (PM_PRESENT | PM_SWAPPED)) && !(entries[i] & PM_FILE))
                continue;
            rc = start < at ? run(context, start, at) : 0;
            start = at + CC_PAGE;
        }
    }
    return rc == 0 && start < at ? run(context, start, at) : rc;
}

int cc_private_runs(int pid, const void *addr, uint64_t len_bytes, cc_private_run_fn *run, void *context)
{
    struct cc_page_region regions[CC_PRIVATE_REGIONS];
    int rc = cc_private_check_range(addr, len_bytes);
    if (rc)
        return rc;
    int pagemap = cc_private_open(pid);
    if (pagemap < 0)
        return pagemap;
    const uint64_t begin = (uint64_t)(uintptr_t)addr, end = begin + len_bytes;
    uint64_t at = begin;
    while (rc == 0 && at < end) {
        const int n = cc_private_scan(pagemap, &at, end, regions);
        if (n < 0)
            rc = n; /* -ENOTTY only from the first */
        for (int i = 0; rc == 0 && i < n; i++)
            rc = cc_is_private(&regions[i]) ? run(context, regions[i].start, regions[i].end) : 0;
    }
    if (rc == -ENOTTY)
        rc = scan_entries(pagemap, begin, end, run, context);
    close(pagemap);
    return rc;
}

static int count_run(void *context, uint64_t start, uint64_t end)
{
    *(uint64_t *)context += end - start;
    return 0;
}

int colocache_private_bytes(int pid, const void *addr, uint64_t len_bytes, uint64_t *n_bytes_out)
{
    uint64_t n_bytes = 0;
    if (!n_bytes_out || pid < 0)
        return cc_fail(COLOCACHE_E_ARGUMENT, "n_bytes_out is NULL, or pid is %d", pid);
    int rc = cc_private_runs(pid, addr, len_bytes, count_run, &n_bytes);
    if (rc == 0)
        *n_bytes_out = n_bytes;
    return rc;
}
