/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.c -- the control region: make it, open it, own it.  Its only writer of magic, sizes, history id and owner.
 */
#define _GNU_SOURCE /* OFD locks, fallocate */
#include "control.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "atomics.h"
#include "clock.h"
#include "colocache.h"
#include "error.h"
#include "fault.h"
#include "map.h"

/* own_description -- a description of our own for the same file: OFD locks belong to descriptions, and the caller's may be shared with
 * other processes, whose living on would keep the lock after our death.  A caller without /proc brings one (lock_fd, not 0). */
static int own_description(int fd, int lock_fd)
{
    struct stat st, of_lock;
    if (fstat(fd, &st) != 0)
        return cc_fail(-errno, "control_fd is %d, which is no open descriptor", fd);
    if (!S_ISREG(st.st_mode)) /* POSIX shared memory and memfds are regular files too */
        return cc_fail(COLOCACHE_E_ARGUMENT, "descriptor %d is no regular or shared-memory file: it can't be a control region", fd);
    if (lock_fd) {
        if (fstat(lock_fd, &of_lock) != 0)
            return cc_fail(-errno, "lock_fd is %d, which is no open descriptor", lock_fd);
        if (st.st_dev != of_lock.st_dev || st.st_ino != of_lock.st_ino || (fcntl(lock_fd, F_GETFL) & O_ACCMODE) != O_RDWR)
            return cc_fail(COLOCACHE_E_ARGUMENT, "lock_fd %d is not the control region (descriptor %d) opened for reading and writing",
                           lock_fd, fd);
        int own = fcntl(lock_fd, F_DUPFD_CLOEXEC, 3);
        return own >= 0 ? own : cc_fail_errno("duplicating lock_fd");
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int own = open(path, O_RDWR | O_CLOEXEC);
    if (own < 0 && errno == ENOENT)
        return cc_fail(
            -ENOENT,
            "the control region can't be opened again, /proc is not mounted: open it twice and give the second descriptor as lock_fd");
    return own >= 0 ? own : cc_fail_errno("opening the control region again through /proc/self/fd");
}

static int take_lock(int own_fd)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(own_fd, F_OFD_SETLK, &lock) == 0)
        return 0;
    if (errno != EAGAIN && errno != EACCES)
        return cc_fail_errno("locking the control region");
    int64_t pid = 0;
    if (pread(own_fd, &pid, sizeof pid, offsetof(struct cc_control, owner_pid)) != sizeof pid)
        pid = 0; /* its owner is just creating it */
    if (pid == getpid())
        return cc_fail(COLOCACHE_E_BUSY, "the control region is owned by this process (%lld): close its other handle first",
                       (long long)pid);
    if (pid > 0 && kill((pid_t)pid, 0) != 0 && errno == ESRCH)
        return cc_fail(COLOCACHE_E_BUSY,
                       "the control region is locked, but its owner, process %lld, is not there: it forked a child that keeps the lock, or "
                       "lives in another PID namespace",
                       (long long)pid);
    return cc_fail(COLOCACHE_E_BUSY, "the control region is owned by process %lld: wait for it or stop it", (long long)pid);
}

void cc_control_new_history(struct cc_control *control)
{
    uint8_t id[16];
    size_t have = 0;
    while (have < sizeof id) {
        ssize_t n = getrandom(id + have, sizeof id - have, 0);
        if (n > 0)
            have += (size_t)n;
        else if (n < 0 && errno != EINTR) { /* no entropy source at all: time and pid still tell pairs apart */
            uint64_t mix[2] = {cc_now_ns() * 0x9E3779B97F4A7C15ull, (uint64_t)getpid() ^ cc_now_ns()};
            memcpy(id, mix, sizeof id);
            break;
        }
    }
    CC_HALF(control->history_id, id, sizeof id, "history: half an id");
    memcpy(control->history_id, id, sizeof id);
}

/* empty_again -- as before the call, so that create can be called again */
static void empty_again(int fd)
{
    if (ftruncate(fd, 0) != 0)
        return; /* the caller has its error already; the next create says that the file is not empty */
}

/* format -- lay out an empty region: sizes first, then the head; magic last, so that a half-made one is none */
static int format(int fd, uint64_t device_max, bool bounded, uint64_t *head_bytes)
{
    uint64_t area = cc_round_to_page(device_max);
    *head_bytes = CC_DEVICES_OFFSET + 2 * area;
    int rc = ftruncate(fd, (off_t)*head_bytes) == 0 ? 0 : cc_fail_errno("sizing the control region");
    CC_CRASH_POINT("create: sized");
    if (rc == 0)
        rc = cc_map_reserve(fd, 0, CC_DEVICES_OFFSET, "the control region");
    if (rc == 0) {
        void *head = NULL;
        rc = cc_map_file(fd, 0, CC_PAGE, true, &head);
        if (rc == 0) {
            struct cc_control *control = head;
            control->layout_version = CC_LAYOUT_VERSION;
            control->stamp = cc_layout_stamp();
            control->memory_mode = bounded ? CC_MEMORY_BOUNDED : CC_MEMORY_MIRROR;
            control->device_area_bytes = area;
            control->device_state_max_bytes = device_max;
            control->bitmap_end = *head_bytes;
            control->owner_pid = getpid();
            cc_control_new_history(control);
            CC_CRASH_POINT("create: before the magic");
            cc_publish(&control->magic, CC_MAGIC);
            CC_CRASH_POINT("create: after the magic");
            cc_unmap(head, CC_PAGE);
        }
    }
    if (rc)
        empty_again(fd);
    return rc;
}

int cc_control_read(int fd, void *to, uint64_t n_bytes, uint64_t offset)
{
    for (uint64_t have = 0; have < n_bytes;) {
        ssize_t n = pread(fd, (uint8_t *)to + have, n_bytes - have, (off_t)(offset + have));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return cc_fail_errno("reading the control region");
        if (n == 0)
            return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "the control region ends after %llu bytes", (unsigned long long)(offset + have));
        have += (uint64_t)n;
    }
    return 0;
}

/* cc_control_check -- is this a region of ours that fits its file?  Reads only what `file_bytes` is long enough for. */
int cc_control_check(const struct cc_control *control, uint64_t file_bytes)
{
    if (cc_observe(&control->magic) != CC_MAGIC)
        return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "not a control region: magic is %016llx", (unsigned long long)control->magic);
    if (control->layout_version != CC_LAYOUT_VERSION || control->stamp != cc_layout_stamp())
        return cc_fail(COLOCACHE_E_LAYOUT, "control region has layout %u, stamp %016llx; this build has %u, %016llx",
                       control->layout_version, (unsigned long long)control->stamp, CC_LAYOUT_VERSION,
                       (unsigned long long)cc_layout_stamp());
    uint64_t area = control->device_area_bytes;
    bool sizes_fit = control->device_state_max_bytes <= CC_DEVICE_STATE_LIMIT && area % CC_PAGE == 0 &&
                     area >= control->device_state_max_bytes && area < control->device_state_max_bytes + CC_PAGE &&
                     CC_DEVICES_OFFSET + 2 * area <= control->bitmap_end && control->bitmap_end <= file_bytes &&
                     cc_observe(&control->n_blocks) <= COLOCACHE_BLOCKS_MAX;
    if (!sizes_fit)
        return cc_fail(COLOCACHE_E_CORRUPT, "control region of %llu bytes does not fit what its head says (%llu blocks, %llu bytes)",
                       (unsigned long long)file_bytes, (unsigned long long)control->n_blocks, (unsigned long long)control->bitmap_end);
    uint64_t reserved = control->memory_mode != CC_MEMORY_MIRROR && control->memory_mode != CC_MEMORY_BOUNDED;
    for (size_t i = 0; i < 6; i++)
        reserved |= control->reserved1[i] | control->reserved2[i];
    for (size_t i = 0; i < 7; i++)
        reserved |= control->reserved3[i];
    if (reserved || control->taken_over > 1)
        return cc_fail(COLOCACHE_E_CORRUPT,
                       "the head of the control region has reserved bytes that are not zero, or a memory mode that is none");
    return 0;
}

/* check_mode -- whoever attaches says in which mode it maps guest RAM: a VM on a shared mapping of a bounded region would write the only
 * copy of the epoch, and one on a private mapping of a mirrored region would run on memory that nobody flushes */
static int check_mode(const struct cc_control *control, bool bounded)
{
    static const char *const names[] = {"mirror", "bounded"};
    bool made_bounded = control->memory_mode == CC_MEMORY_BOUNDED;
    if (made_bounded == bounded)
        return 0;
    return cc_fail(COLOCACHE_E_MEMORY_MODE, "the control region was made with memory mode %s, %s was asked for: attach with %s",
                   names[made_bounded], names[bounded], names[made_bounded]);
}

/* cc_control_open -- open, lock and map an existing or a fresh region; whatever came of it, cc_control_close */
int cc_control_open(struct cc_region *region, int control_fd, int lock_fd, bool create, uint64_t device_max, bool bounded)
{
    int rc = own_description(control_fd, lock_fd);
    if (rc < 0)
        return rc;
    region->fd = rc;
    rc = take_lock(region->fd);
    if (rc)
        return rc;
    struct stat st;
    if (fstat(region->fd, &st) != 0)
        return cc_fail_errno("fstat of the control region");
    if (create) {
        if (st.st_size != 0)
            return cc_fail(COLOCACHE_E_EXISTS, "the control region has %lld bytes already: attach to it, or remove it",
                           (long long)st.st_size);
        rc = format(region->fd, device_max, bounded, &region->head_bytes);
        if (rc)
            return rc;
    } else {
        if (st.st_size == 0)
            return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "the control region is empty: create it, there is nothing to attach to");
        if ((uint64_t)st.st_size < CC_DEVICES_OFFSET)
            return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "%lld bytes are too few for a control region", (long long)st.st_size);
        struct cc_control found;
        rc = cc_control_read(region->fd, &found, sizeof found, 0);
        if (rc == 0)
            rc = cc_control_check(&found, (uint64_t)st.st_size);
        if (rc == 0)
            rc = check_mode(&found, bounded);
        if (rc == 0) /* a hole in it could be filled by nobody while the file system is full */
            rc = cc_map_reserve(region->fd, 0, CC_DEVICES_OFFSET, "the control region");
        if (rc)
            return rc;
        region->head_bytes = CC_DEVICES_OFFSET + 2 * found.device_area_bytes;
    }
    void *head = NULL;
    rc = cc_map_file(region->fd, 0, region->head_bytes, true, &head);
    if (rc) {
        if (create)
            empty_again(region->fd);
        return rc;
    }
    region->control = head;
    region->table = (struct cc_block_entry *)(void *)((uint8_t *)head + CC_TABLE_OFFSET);
    region->devices = (uint8_t *)head + CC_DEVICES_OFFSET;
    region->control->owner_pid = getpid();
    CC_CRASH_POINT("create or attach: owner");
    return 0;
}

void cc_control_unlock(struct cc_region *region)
{
    struct flock unlock = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    if (region->fd < 0)
        return;
    (void)fcntl(region->fd, F_OFD_SETLK, &unlock); /* a mapping keeps the description, and so the lock, alive */
    close(region->fd);
    region->fd = -1;
}

void cc_control_close(struct cc_region *region)
{
    cc_unmap(region->control, region->head_bytes);
    cc_control_unlock(region);
}
