/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fold.c -- after a takeover on bounded memory: the VM's private pages become the image's.
 *
 * Until then the image is the newest epoch, and what the VM writes must never reach it.  When this machine is the one the world sees there is
 * no epoch any more that could be gone back to: region and machine die together, as with mirrored memory.  The private copies would grow
 * to a second image for ever, so they are written into the file, and the VM goes on over a shared mapping of it.
 *
 * Each page is written whole before its mapping changes, so at every moment the VM has all of its bytes: as a private copy, or, from the one
 * mmap on, in the file.  An error leaves what was not mapped yet as it was.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "block.h"
#include "epoch.h"
#include "error.h"
#include "private.h"

#define BUFFER_BYTES (1u << 20) /* for the pages of another process */

struct copier {
    int memory;      /* of another process; -1: this one's */
    uint8_t *buffer; /* for it */
    int fd;          /* where byte `addr` of the mapping is byte `offset` */
    uint64_t addr, offset, n_bytes;
};

static int write_all(const struct copier *copier, const uint8_t *from, uint64_t n_bytes, uint64_t at)
{
    while (n_bytes) {
        ssize_t n = pwrite(copier->fd, from, n_bytes, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == ENOSPC)
            return cc_fail(COLOCACHE_E_NO_MEMORY, "the file system of the guest image is full: %llu bytes could not be folded into it",
                           (unsigned long long)n_bytes);
        if (n <= 0)
            return n < 0 ? cc_fail_errno("writing private pages into the guest image") : cc_fail(-EIO, "the guest image took no byte");
        from += n;
        at += (uint64_t)n;
        n_bytes -= (uint64_t)n;
    }
    return 0;
}

static int read_all(const struct copier *copier, uint64_t at, uint64_t n_bytes)
{
    uint64_t done = 0;
    while (done < n_bytes) {
        ssize_t n = pread(copier->memory, copier->buffer + done, n_bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? cc_fail_errno("reading the memory of another process") : cc_fail(-ESRCH, "that process is gone");
        done += (uint64_t)n;
    }
    return 0;
}

static int copy_run(void *context, uint64_t start, uint64_t end)
{
    struct copier *copier = context;
    int rc = 0;
    while (rc == 0 && start < end) {
        const uint64_t n = copier->memory < 0 || end - start < BUFFER_BYTES ? end - start : BUFFER_BYTES;
        const uint8_t *from = copier->buffer;
        if (copier->memory < 0)
            from = (const uint8_t *)(uintptr_t)start;
        else
            rc = read_all(copier, start, n);
        if (rc == 0)
            rc = write_all(copier, from, n, start - copier->addr + copier->offset);
        start += n;
        copier->n_bytes += rc == 0 ? n : 0;
    }
    return rc;
}

static int open_memory(int pid)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd >= 0 ? fd : cc_fail_errno("opening the memory of another process");
}

int colocache_private_write_back(int pid, const void *addr, uint64_t len_bytes, int fd, uint64_t offset, uint64_t *n_bytes_out)
{
    struct copier copier = {.memory = -1, .fd = fd, .addr = (uint64_t)(uintptr_t)addr, .offset = offset};
    int rc = 0;
    if (!n_bytes_out || pid < 0 || fd < 0 || offset > COLOCACHE_BLOCK_BYTES_MAX)
        return cc_fail(COLOCACHE_E_ARGUMENT, "n_bytes_out is NULL, pid is %d, fd is %d, or the offset %llu", pid, fd,
                       (unsigned long long)offset);
    if (pid) {
        copier.buffer = malloc(BUFFER_BYTES);
        copier.memory = open_memory(pid);
        rc = copier.memory < 0 ? copier.memory : copier.buffer ? 0 : cc_fail(-ENOMEM, "no memory for the pages of another process");
    }
    if (rc == 0)
        rc = cc_private_runs(pid, addr, len_bytes, copy_run, &copier);
    if (copier.memory >= 0)
        close(copier.memory);
    free(copier.buffer);
    *n_bytes_out = copier.n_bytes;
    return rc;
}

static int check_state(const struct colocache *cc, const struct cc_block *block)
{
    if (!cc->bounded)
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "block %s is in mirrored memory, where the VM's mapping is shared from the beginning",
                       block->name);
    if (cc_epoch_state(cc) != CC_FAILED_OVER)
        return cc_fail(COLOCACHE_E_ORDER, "block %s is folded after a takeover: until then its image is the newest epoch", block->name);
    return 0;
}

int colocache_fold(struct colocache *cc, uint32_t index, uint64_t first_pfn, uint64_t n_pages, uint64_t *n_bytes_out)
{
    struct cc_block *block;
    uint64_t n_bytes = 0;
    int rc = cc_block_get(cc, index, &block);
    if (rc == 0)
        rc = cc_block_range(block, first_pfn, n_pages);
    if (rc == 0)
        rc = check_state(cc, block);
    if (rc == 0 && n_pages) {
        const uint64_t at = first_pfn << block->page_shift, len_bytes = n_pages << block->page_shift;
        uint8_t *const addr = block->guest.vm_addr + at;
        rc = colocache_private_write_back(0, addr, len_bytes, block->guest.fd, block->guest.offset + at, &n_bytes);
        if (rc == 0 && mmap(addr, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, block->guest.fd,
                            (off_t)(block->guest.offset + at)) == MAP_FAILED)
            rc = cc_fail_errno("mapping guest RAM shared");
    }
    if (n_bytes_out)
        *n_bytes_out = n_bytes;
    return rc;
}
