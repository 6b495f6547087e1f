/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forget.c -- private copies of a VM's pages are dropped: its mapping shows the file again.
 *
 * Three ways.  Run by run (MADV_DONTNEED): pages that were not written stay mapped.  All at once: the same for the whole range.  Put aside:
 * mremap moves the page tables to another address and leaves the mapping empty; the pages are freed when the VM runs again.
 *
 * Measured on 4 KiB pages: scanning takes 50 ns for each page that is mapped, a run 1 us, a private page 0.25 us; moving the page tables of
 * a gibibyte at its boundary 10 us, of 2 MiB 0.2 us, whatever is in them.  But after the second and the third way the guest maps each
 * page anew that it touches, written or not.
 *
 * So the engine weighs: a microsecond of the pause counts as much as four of the guest's.  What was put aside is counted before it is freed,
 * which tells how much the guest touches in an epoch.  Where pages stay mapped they may be of any age, and the guest may have lost interest
 * in them; so now and then it puts them aside to look.  Transparent huge pages always are: run by run they would be split.
 */
#define _GNU_SOURCE
#include "forget.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "colocache.h"
#include "error.h"
#include "layout.h"
#include "map.h"
#include "private.h"

#define SCAN_NS 50u    /* a mapped page */
#define RUN_NS 1000u   /* one madvise */
#define FREE_NS 250u   /* a private page */
#define REMAP_NS 250u  /* a mapped page: a fault takes 1 us, and maps up to 16 pages around the one that is touched */
#define MOVE_NS 10000u /* a gibibyte, and once for the call */
#define MOVE_2M_NS 200u
#define PAUSE_WEIGHT 4u         /* a nanosecond of the pause against one of the guest */
#define DEAR_NS 500000u         /* a pause in which it is worth looking for another way */
#define TRY_EVERY 8u            /* then, after so many epochs */
#define RUNS_MAX 65536u         /* that are remembered before any is zapped */
#define WHOLE_SHARE 16u         /* colocache_private_forget: more than one page in so many is zapped all at once */
#define MOVE_ALIGN (1ull << 30) /* addresses that are alike below this: whole tables move, not entries */

static int zap(uint64_t start, uint64_t end)
{
    int rc;
    do {
        rc = madvise((void *)(uintptr_t)start, end - start, MADV_DONTNEED);
    } while (rc != 0 && errno == EAGAIN);
    return rc == 0 ? 0 : cc_fail_errno("forgetting private pages (MADV_DONTNEED; memory that is locked can't be forgotten)");
}

/* ---- what is mapped ------------------------------------------------------------------------------------------------- */

struct mapped {
    struct cc_page_region *runs; /* private ones; NULL: they are only counted */
    uint64_t room, most_private; /* of runs; more is given up */
    uint64_t n_runs, n_private, n_shared;
    bool huge;
};

/* look -- 1 all is seen, 0 there are too many private pages or runs, or huge pages, -errno; -ENOTTY: this kernel can't tell */
static int look(int pagemap, uint64_t at, uint64_t end, struct mapped *out)
{
    struct cc_page_region regions[CC_PRIVATE_REGIONS];
    while (at < end) {
        const int n = cc_private_scan(pagemap, &at, end, regions);
        if (n < 0)
            return n;
        for (int i = 0; i < n; i++) {
            const uint64_t n_pages = (regions[i].end - regions[i].start) / CC_PAGE;
            out->huge |= (regions[i].categories & CC_PAGE_IS_HUGE) != 0;
            if (!cc_is_private(&regions[i])) {
                out->n_shared += n_pages;
            } else {
                if (out->runs && out->n_runs < out->room)
                    out->runs[out->n_runs] = regions[i];
                out->n_runs++;
                out->n_private += n_pages;
            }
            if (out->runs && (out->huge || out->n_runs > out->room || out->n_private > out->most_private))
                return 0;
        }
    }
    return 1;
}

/* look_for_runs -- 1 and all the private runs of the range, to be freed by the caller; 0 they were too many to be zapped one by one, -errno */
static int look_for_runs(uint64_t begin, uint64_t end, uint64_t most_private, struct mapped *out)
{
    *out = (struct mapped){.most_private = most_private, .room = most_private < RUNS_MAX ? most_private : RUNS_MAX};
    int pagemap = cc_private_open(0);
    if (pagemap < 0)
        return pagemap;
    out->runs = malloc((out->room ? out->room : 1) * sizeof *out->runs);
    int rc = out->runs ? look(pagemap, begin, end, out) : 0;
    close(pagemap);
    return rc == -ENOTTY ? 0 : rc;
}

static int zap_runs(const struct mapped *mapped)
{
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && i < mapped->n_runs; i++)
        rc = zap(mapped->runs[i].start, mapped->runs[i].end);
    return rc;
}

int colocache_private_forget(void *addr, uint64_t len_bytes)
{
    int rc = cc_private_check_range(addr, len_bytes);
    if (rc || len_bytes == 0)
        return rc;
    const uint64_t begin = (uint64_t)(uintptr_t)addr, end = begin + len_bytes;
    struct mapped mapped;
    rc = look_for_runs(begin, end, len_bytes / CC_PAGE / WHOLE_SHARE, &mapped);
    if (rc >= 0)
        rc = rc == 1 ? zap_runs(&mapped) : zap(begin, end);
    free(mapped.runs);
    return rc;
}

/* ---- the engine's way ----------------------------------------------------------------------------------------------- */

static uint64_t pause_of(const struct mapped *mapped)
{
    return mapped->n_runs * RUN_NS + mapped->n_private * FREE_NS + (mapped->n_private + mapped->n_shared) * SCAN_NS;
}

/* moving -- what it takes to move the page tables of [begin, end): whole gibibytes at their boundaries, the rest by 2 MiB */
static uint64_t moving(uint64_t begin, uint64_t end)
{
    const uint64_t first = (begin + MOVE_ALIGN - 1) / MOVE_ALIGN, last = end / MOVE_ALIGN, n_gib = last > first ? last - first : 0;
    return MOVE_NS * (1 + n_gib) + (end - begin - n_gib * MOVE_ALIGN) / (2u << 20) * MOVE_2M_NS;
}

/* worth_it -- to put [begin, end) aside, for a guest that has touched so much since it was put aside before */
static bool worth_it(const struct mapped *mapped, uint64_t begin, uint64_t end)
{
    const uint64_t pause = pause_of(mapped), move = moving(begin, end);
    return mapped->huge || (pause > move && mapped->n_shared * REMAP_NS <= (pause - move) * PAUSE_WEIGHT);
}

/* put_aside -- false: not on this kernel, or no address space, and all is as it was */
static bool put_aside(struct cc_forget *forget, void *addr, uint64_t len_bytes)
{
    if (forget->cannot)
        return false;
    forget->aside = cc_map_aside(addr, len_bytes, MOVE_ALIGN, &forget->used, &forget->aside_bytes);
    forget->cannot = forget->aside == NULL;
    forget->used_bytes = forget->aside ? len_bytes : 0;
    return forget->aside != NULL;
}

int cc_forget(struct cc_forget *forget, void *addr, uint64_t len_bytes)
{
    int rc = cc_private_check_range(addr, len_bytes);
    if (rc || len_bytes == 0)
        return rc;
    const uint64_t begin = (uint64_t)(uintptr_t)addr, end = begin + len_bytes;
    cc_forget_drop(forget);           /* nobody did since the last epoch */
    rc = zap(begin, begin + CC_PAGE); /* of locked memory an error, before mremap would unlock it */
    if (rc == 0 && !forget->whole) {
        struct mapped mapped;
        rc = look_for_runs(begin, end, len_bytes / CC_PAGE, &mapped);
        const bool by_runs = rc == 1 && !worth_it(&mapped, begin, end) && forget->in_a_row < TRY_EVERY;
        if (by_runs) {
            rc = zap_runs(&mapped);
            forget->in_a_row = pause_of(&mapped) > DEAR_NS ? forget->in_a_row + 1 : 0;
        }
        free(mapped.runs);
        if (by_runs || rc < 0)
            return rc;
    }
    if (rc < 0)
        return rc;
    forget->in_a_row = 0;
    return put_aside(forget, addr, len_bytes) ? 0 : zap(begin, end);
}

void cc_forget_drop(struct cc_forget *forget)
{
    if (forget->aside)
        cc_unmap(forget->aside, forget->aside_bytes);
    forget->aside = NULL;
}

void cc_forget_rest(struct cc_forget *forget)
{
    const uint64_t begin = (uint64_t)(uintptr_t)forget->used, end = begin + forget->used_bytes;
    struct mapped mapped = {0};
    int pagemap = forget->aside ? cc_private_open(0) : -1;
    if (pagemap >= 0) {
        forget->whole = look(pagemap, begin, end, &mapped) == 1 && worth_it(&mapped, begin, end);
        close(pagemap);
    }
    cc_forget_drop(forget);
}
