/* SPDX-License-Identifier: Apache-2.0 */
/*
 * private.c -- a MAP_PRIVATE mapping of guest RAM: how much of it is private copies, and forgetting those.
 *
 * The first write to a page of such a mapping makes a copy that only this process sees; all other pages are the file's, and show at once
 * what is written to the file.  MADV_DONTNEED drops the copies, and the next access finds the file's page again.
 *
 * Forgetting, measured: one zap of everything is the cheapest on transparent huge pages (they are mapped again as huge pages, while a zap
 * run by run splits them); on 4 KiB pages the guest pays for each page that it has to map anew, so that up to about 6 % of private pages
 * are zapped run by run and the others stay mapped.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "colocache.h"
#include "error.h"
#include "ioctl.h"
#include "layout.h"
#include "pagemap.h"
#include "private.h"

#define REGIONS 256u    /* of one scan, on the stack */
#define ENTRIES 512u    /* of /proc/PID/pagemap at a time, on the stack */
#define RUNS_MAX 65536u /* that are remembered before any is zapped */
#define WHOLE_SHARE 16u /* more than one page in so many: zap everything */
#define PM_SWAPPED (1ull << 62)
#define PM_PRESENT (1ull << 63)
#define PM_FILE (1ull << 61) /* of a file, or shared */

/* ---- scanning -------------------------------------------------------------------------------------------------------- */

static int check_range(const void *addr, uint64_t len_bytes)
{
    const uint64_t at = (uint64_t)(uintptr_t)addr;
    if (!addr || at % CC_PAGE || len_bytes % CC_PAGE || len_bytes > COLOCACHE_BLOCK_BYTES_MAX || at > UINT64_MAX - len_bytes)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%llu bytes at %p: give a range of whole pages", (unsigned long long)len_bytes, addr);
    return 0;
}

static int open_pagemap(int pid)
{
    char path[64];
    snprintf(path, sizeof path, pid ? "/proc/%d/pagemap" : "/proc/self/pagemap", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : cc_fail_errno("opening a process's pagemap");
}

/* scan_present -- the next stretches of present or swapped pages from *at on, with the two categories that matter here; moves *at to where
 * the scan ended.  How many; -ENOTTY: this kernel has no PAGEMAP_SCAN. */
static int scan_present(int pagemap, uint64_t *at, uint64_t end, struct cc_page_region *regions)
{
    struct cc_scan_arg scan = {
        .size = sizeof scan,
        .start = *at,
        .end = end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .category_anyof_mask = CC_PAGE_IS_PRESENT | CC_PAGE_IS_SWAPPED,
        .return_mask = CC_PAGE_IS_FILE | CC_PAGE_IS_HUGE,
    };
    int n = cc_ioctl(pagemap, CC_PAGEMAP_SCAN, &scan);
    if (n < 0)
        return errno == ENOTTY || errno == EINVAL ? -ENOTTY : cc_fail_errno("PAGEMAP_SCAN");
    *at = scan.walk_end > *at ? scan.walk_end : end;
    return n;
}

static bool is_private(const struct cc_page_region *region)
{
    return !(region->categories & CC_PAGE_IS_FILE);
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
    struct cc_page_region regions[REGIONS];
    int rc = check_range(addr, len_bytes);
    if (rc)
        return rc;
    int pagemap = open_pagemap(pid);
    if (pagemap < 0)
        return pagemap;
    const uint64_t begin = (uint64_t)(uintptr_t)addr, end = begin + len_bytes;
    uint64_t at = begin;
    while (rc == 0 && at < end) {
        const int n = scan_present(pagemap, &at, end, regions);
        if (n < 0)
            rc = n; /* -ENOTTY only from the first */
        for (int i = 0; rc == 0 && i < n; i++)
            rc = is_private(&regions[i]) ? run(context, regions[i].start, regions[i].end) : 0;
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

/* ---- forgetting --------------------------------------------------------------------------------------------------------- */

static int zap(uint64_t start, uint64_t end)
{
    int rc;
    do {
        rc = madvise((void *)(uintptr_t)start, end - start, MADV_DONTNEED);
    } while (rc != 0 && errno == EAGAIN);
    return rc == 0 ? 0 : cc_fail_errno("forgetting private pages (MADV_DONTNEED; memory that is locked can't be forgotten)");
}

/* The private runs of a range, as long as zapping them one by one is the cheaper way. */
struct runs {
    struct cc_page_region *at;
    uint64_t n, n_bytes, room, most_bytes;
};

/* add_regions -- false: there are too many, or huge pages */
static bool add_regions(struct runs *runs, const struct cc_page_region *regions, int n)
{
    for (int i = 0; i < n; i++) {
        if (!is_private(&regions[i])) {
            if (regions[i].categories & CC_PAGE_IS_HUGE)
                return false;
            continue;
        }
        runs->n_bytes += regions[i].end - regions[i].start;
        if (runs->n_bytes > runs->most_bytes || runs->n == runs->room)
            return false;
        runs->at[runs->n++] = regions[i];
    }
    return true;
}

/* zap_runs -- run by run, if that is the cheaper way: 1 done, 0 zap the whole range instead */
static int zap_runs(int pagemap, uint64_t begin, uint64_t end)
{
    struct cc_page_region regions[REGIONS];
    struct runs runs = {.most_bytes = (end - begin) / WHOLE_SHARE};
    runs.room = runs.most_bytes / CC_PAGE < RUNS_MAX ? runs.most_bytes / CC_PAGE : RUNS_MAX;
    runs.at = malloc((runs.room ? runs.room : 1) * sizeof *runs.at);
    uint64_t at = begin;
    int rc = runs.at != NULL;
    while (rc == 1 && at < end) {
        int n = scan_present(pagemap, &at, end, regions);
        rc = n < 0 ? (n == -ENOTTY ? 0 : n) : add_regions(&runs, regions, n);
    }
    for (uint64_t i = 0; rc == 1 && i < runs.n; i++) {
        int zapped = zap(runs.at[i].start, runs.at[i].end);
        rc = zapped ? zapped : 1;
    }
    free(runs.at);
    return rc;
}

int colocache_private_forget(void *addr, uint64_t len_bytes)
{
    int rc = check_range(addr, len_bytes);
    if (rc || len_bytes == 0)
        return rc;
    const uint64_t begin = (uint64_t)(uintptr_t)addr, end = begin + len_bytes;
    int pagemap = open_pagemap(0);
    if (pagemap < 0)
        return pagemap;
    rc = zap_runs(pagemap, begin, end);
    close(pagemap);
    if (rc < 0)
        return rc;
    return rc == 1 ? 0 : zap(begin, end);
}
