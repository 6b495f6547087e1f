/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.c -- the control region: make it, open it, own it.  The only writer of magic, sizes, history id and owner.
 *
 * A region that exists is read and checked before it is mapped: anybody may have put anything there, holes included.
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
#include "checksum.h"
#include "clock.h"
#include "colocache.h"
#include "error.h"
#include "fault.h"
#include "map.h"
#include "word.h"

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
    CC_CRASH_POINT("history: an id, before its check");
    control->history_check = cc_checksum(id, sizeof id);
    CC_CRASH_POINT("history: an id and its check");
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
    *head_bytes = CC_DEVICES_OFFSET + 2 * cc_round_to_page(device_max);
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
            control->device_state_max_bytes = cc_word_make(device_max);
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

/* decode -- the words that have a value and its check */
static int decode(const struct cc_control *control, struct cc_control_values *out)
{
    int rc = cc_word_read("device-state bound", &control->device_state_max_bytes, &out->device_state_max_bytes);
    if (rc == 0)
        rc = cc_word_read("number of blocks", &control->n_blocks, &out->n_blocks);
    if (rc == 0)
        rc = cc_word_read("newest received epoch", &control->receiving, &out->receiving);
    if (rc == 0)
        rc = cc_word_read("takeover word", &control->taken_over, &out->taken_over);
    return rc;
}

int cc_control_check(const struct cc_control *control, uint64_t file_bytes, struct cc_control_values *out)
{
    if (cc_observe(&control->magic) != CC_MAGIC)
        return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "not a control region: magic is %016llx", (unsigned long long)control->magic);
    if (control->layout_version != CC_LAYOUT_VERSION || control->stamp != cc_layout_stamp())
        return cc_fail(COLOCACHE_E_LAYOUT, "control region has layout %u, stamp %016llx; this build has %u, %016llx",
                       control->layout_version, (unsigned long long)control->stamp, CC_LAYOUT_VERSION,
                       (unsigned long long)cc_layout_stamp());
    int rc = decode(control, out);
    if (rc)
        return rc;
    bool fits = out->device_state_max_bytes <= CC_DEVICE_STATE_LIMIT && out->n_blocks <= COLOCACHE_BLOCKS_MAX && out->taken_over <= 1 &&
                cc_control_head_bytes(out->device_state_max_bytes) <= file_bytes;
    if (!fits)
        return cc_fail(COLOCACHE_E_CORRUPT,
                       "control region of %llu bytes does not fit what its head says (%llu blocks, device states of %llu)",
                       (unsigned long long)file_bytes, (unsigned long long)out->n_blocks, (unsigned long long)out->device_state_max_bytes);
    uint64_t reserved = control->memory_mode != CC_MEMORY_MIRROR && control->memory_mode != CC_MEMORY_BOUNDED;
    for (size_t i = 0; i < sizeof control->reserved1 / 8; i++)
        reserved |= control->reserved1[i] | control->reserved2[i];
    for (size_t i = 0; i < sizeof control->reserved3 / 8; i++)
        reserved |= control->reserved3[i];
    if (reserved)
        return cc_fail(COLOCACHE_E_CORRUPT,
                       "the head of the control region has reserved bytes that are not zero, or a memory mode that is none");
    if (cc_observe(&control->commit_word) && control->history_check != cc_checksum(control->history_id, sizeof control->history_id))
        return cc_fail(COLOCACHE_E_CORRUPT, "the history id of the control region does not fit its check");
    return 0;
}

int cc_control_read(int fd, uint64_t offset, void *to, uint64_t n_bytes)
{
    uint64_t have = 0;
    while (have < n_bytes) {
        ssize_t n = pread(fd, (char *)to + have, n_bytes - have, (off_t)(offset + have));
        if (n == 0)
            return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "the control region ends at byte %llu, in the middle of what it says it has",
                           (unsigned long long)(offset + have));
        if (n < 0 && errno != EINTR)
            return cc_fail_errno("reading the control region");
        have += n > 0 ? (uint64_t)n : 0;
    }
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

/* check_existing -- by read(2): through a mapping a hole would be allocated, and on a full file system that is a SIGBUS.  Only then the
 * parts that are mapped next are made whole. */
static int check_existing(struct cc_region *region, uint64_t file_bytes, bool bounded)
{
    struct cc_control_values values;
    union {
        struct cc_control control;
        uint8_t bytes[CC_PAGE];
    } head;
    if (file_bytes == 0)
        return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "the control region is empty: create it, there is nothing to attach to");
    if (file_bytes < CC_DEVICES_OFFSET)
        return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "%llu bytes are too few for a control region", (unsigned long long)file_bytes);
    int rc = cc_control_read(region->fd, 0, &head, sizeof head);
    if (rc == 0)
        rc = cc_control_check(&head.control, file_bytes, &values);
    if (rc == 0)
        rc = check_mode(&head.control, bounded);
    if (rc == 0)
        rc = cc_map_reserve(region->fd, 0, CC_DEVICES_OFFSET, "the control region");
    if (rc == 0)
        region->head_bytes = cc_control_head_bytes(values.device_state_max_bytes);
    return rc;
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
        rc = check_existing(region, (uint64_t)st.st_size, bounded);
        if (rc)
            return rc;
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
    region->device_state_max_bytes = region->control->device_state_max_bytes & COLOCACHE_EPOCH_MAX; /* checked */
    region->end_bytes = region->head_bytes;
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
