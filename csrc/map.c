/* SPDX-License-Identifier: Apache-2.0 */
/*
 * map.c -- the only caller of mmap and munmap.
 *
 * What a caller maps is judged by the kernel's list of mappings and never by a store: a store into memory that is read-only or not
 * there would be the death of the process, and one into a private mapping would hide a page of the file for ever.
 */
#define _GNU_SOURCE
#include "map.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "colocache.h"
#include "error.h"

#ifndef MREMAP_DONTUNMAP /* Linux 5.7; of files 5.13 */
#define MREMAP_DONTUNMAP 4
#endif

static int map(int fd, uint64_t offset, uint64_t n_bytes, int access, int flags, void **out)
{
    void *addr = mmap(NULL, n_bytes, access, flags, fd, (off_t)offset);
    if (addr == MAP_FAILED) {
        if (errno == ENOMEM)
            return cc_fail(COLOCACHE_E_NO_MEMORY, "mmap of %llu bytes failed: too little memory, address space or huge pages",
                           (unsigned long long)n_bytes);
        return cc_fail_errno("mmap");
    }
    *out = addr;
    return 0;
}

int cc_map_file(int fd, uint64_t offset, uint64_t n_bytes, bool writable, void **out)
{
    return map(fd, offset, n_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, out);
}

int cc_map_private(int fd, uint64_t offset, uint64_t n_bytes, void **out)
{
    const uint64_t align = n_bytes < 1ull << 30 ? 2ull << 20 : 1ull << 30;
    uint8_t *reserved = mmap(NULL, n_bytes + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return map(fd, offset, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, out);
    uint8_t *at = reserved + (align - (uint64_t)(uintptr_t)reserved % align) % align, *end = reserved + n_bytes + align;
    void *addr = mmap(at, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, fd, (off_t)offset);
    const int rc = addr == MAP_FAILED ? cc_fail_errno("mmap") : 0;
    if (at > reserved)
        munmap(reserved, (uint64_t)(at - reserved));
    if (end > at + n_bytes)
        munmap(at + n_bytes, (uint64_t)(end - at) - n_bytes);
    *out = rc ? NULL : addr; /* what lies between after an error may be another thread's by now */
    return rc;
}

int cc_map_guarded(uint64_t n_bytes, void **out, uint64_t *map_bytes, uint8_t **end_out)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), room = (n_bytes + page - 1) / page * page;
    void *addr = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (addr == MAP_FAILED)
        return cc_fail(COLOCACHE_E_NO_MEMORY, "no memory for %llu bytes: %s", (unsigned long long)n_bytes, colocache_strerror(-errno));
    uint8_t *end = (uint8_t *)addr + room;
    if (mprotect(end, page, PROT_NONE) != 0) {
        int rc = cc_fail_errno("mprotect");
        munmap(addr, room + page);
        return rc;
    }
    *out = addr;
    *map_bytes = room + page;
    *end_out = end;
    return 0;
}

void *cc_map_aside(void *addr, uint64_t n_bytes, uint64_t align, uint8_t **moved_out, uint64_t *map_bytes)
{
    const uint64_t alike = (uint64_t)(uintptr_t)addr % align, room = n_bytes + align;
    void *reserved = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return NULL;
    uint64_t at = (uint64_t)(uintptr_t)reserved / align * align + alike;
    at += at < (uint64_t)(uintptr_t)reserved ? align : 0;
    /* DONTUNMAP: there is no moment in which another thread's mmap could get the address of guest RAM */
    void *moved = mremap(addr, n_bytes, n_bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, (void *)(uintptr_t)at);
    if (moved == MAP_FAILED) { /* the kernel may have freed the place before it failed, and another thread mapped something there */
        munmap(reserved, at - (uint64_t)(uintptr_t)reserved);
        munmap((void *)(uintptr_t)(at + n_bytes), (uint64_t)(uintptr_t)reserved + room - at - n_bytes);
        return NULL;
    }
    *moved_out = moved;
    *map_bytes = room;
    return reserved;
}

void cc_unmap(void *addr, uint64_t n_bytes)
{
    if (addr && n_bytes)
        munmap(addr, n_bytes);
}

int cc_map_reserve(int fd, uint64_t offset, uint64_t n_bytes, const char *what)
{
    int rc;
    do {
        rc = posix_fallocate(fd, (off_t)offset, (off_t)n_bytes);
    } while (rc == EINTR);
    if (rc == ENOSPC || rc == ENOMEM)
        return cc_fail(COLOCACHE_E_NO_MEMORY, "%s needs %llu bytes more than its file system has: enlarge it or free some", what,
                       (unsigned long long)n_bytes);
    if (rc) {
        errno = rc;
        return cc_fail_errno("posix_fallocate");
    }
    return 0;
}

/* ---- the caller's mappings --------------------------------------------------------------------------------------- */

struct mapping {
    uint64_t begin, end, offset, inode;
    char access[5]; /* "rw-s": read, write, execute, shared or private */
};

/* next_mapping -- in ascending order of addresses; false at the end of the list */
static bool next_mapping(FILE *list, struct mapping *out)
{
    char line[128], rest[128]; /* what matters stands in the first 73 columns, the path follows */
    if (!fgets(line, sizeof line, list))
        return false;
    for (const char *last = line; !strchr(last, '\n') && fgets(rest, sizeof rest, list);)
        last = rest;
    return sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %*x:%*x %" SCNu64, &out->begin, &out->end, out->access, &out->offset,
                  &out->inode) == 5;
}

static int check_one(const char *what, const struct mapping *one, uint64_t at, const struct stat *file, uint64_t offset, bool shared)
{
    if (one->access[0] != 'r' || one->access[1] != 'w')
        return cc_fail(COLOCACHE_E_ARGUMENT, "%s is mapped %s at %#" PRIx64 ": it must be readable and writable", what, one->access, at);
    if (file && (one->access[3] == 's') != shared)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%s is mapped %s at %#" PRIx64 ": map it with MAP_%s", what, shared ? "privately" : "shared",
                       at, shared ? "SHARED" : "PRIVATE");
    if (file && (one->inode != (uint64_t)file->st_ino || one->offset + (at - one->begin) != offset))
        return cc_fail(COLOCACHE_E_ARGUMENT,
                       "%s is no mapping of its descriptor at offset %" PRIu64 ": inode %" PRIu64 ", offset %" PRIu64 " is mapped there",
                       what, offset, one->inode, one->offset + (at - one->begin));
    return 0;
}

int cc_map_check(const char *what, const void *addr, uint64_t n_bytes, int fd, uint64_t offset, bool shared)
{
    const uint64_t begin = (uint64_t)(uintptr_t)addr, end = begin + n_bytes;
    struct stat file;
    struct mapping one;
    if (end < begin)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%s of %" PRIu64 " bytes does not fit behind %#" PRIx64, what, n_bytes, begin);
    if (fd >= 0 && fstat(fd, &file) != 0)
        return cc_fail_errno("fstat of an image");
    FILE *list = fopen("/proc/self/maps", "re");
    if (!list && errno == ENOENT)
        return cc_fail(-ENOENT, "%s can't be checked, /proc is not mounted: leave it out, and use the address that get_block tells", what);
    if (!list)
        return cc_fail(
            -errno, "%s can't be checked, /proc/self/maps does not open: mount /proc, or give no address and let the library map it", what);
    int rc = 0;
    uint64_t at = begin; /* up to here all is well */
    while (rc == 0 && at < end && next_mapping(list, &one) && one.begin <= at) {
        if (one.end <= at)
            continue;
        rc = check_one(what, &one, at, fd >= 0 ? &file : NULL, offset + (at - begin), shared);
        at = one.end;
    }
    fclose(list);
    if (rc == 0 && at < end)
        rc = cc_fail(COLOCACHE_E_ARGUMENT, "%s of %" PRIu64 " bytes is mapped only for its first %" PRIu64, what, n_bytes, at - begin);
    return rc;
}
