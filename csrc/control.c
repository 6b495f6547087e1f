/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.c -- the control region: make it, open it, own it; create and close.  The only caller of mmap and munmap.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fault.h"

#define DEVICE_STATE_DEFAULT (64ull << 20)
#define DEVICE_STATE_LIMIT (1ull << 40) /* keeps every sum of offsets far below 2^63 */

int cc_map_file(int fd, uint64_t offset, uint64_t n_bytes, bool writable, void **out)
{
    void *addr = mmap(NULL, n_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, (off_t)offset);
    if (addr == MAP_FAILED) {
        if (errno == ENOMEM)
            return cc_fail(COLOCACHE_E_NO_MEMORY, "mmap of %llu bytes failed: too little memory, address space or huge pages",
                           (unsigned long long)n_bytes);
        return cc_fail_errno("mmap");
    }
    *out = addr;
    return 0;
}

void cc_unmap(void *addr, uint64_t n_bytes)
{
    if (addr && n_bytes)
        munmap(addr, n_bytes);
}

/* cc_reserve -- allocate a range of a file now, so that touching it later can't be a SIGBUS */
int cc_reserve(int fd, uint64_t offset, uint64_t n_bytes, const char *what)
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

/* own_description -- a description of our own for the same file: OFD locks belong to descriptions, and the caller's
 * may be shared with other processes, whose living on would keep the lock after our death */
static int own_description(int fd)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return cc_fail(-errno, "control_fd is %d, which is no open descriptor", fd);
    if (!S_ISREG(st.st_mode)) /* POSIX shared memory and memfds are regular files too */
        return cc_fail(COLOCACHE_E_ARGUMENT, "descriptor %d is no regular or shared-memory file: it can't be a control region", fd);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int own = open(path, O_RDWR | O_CLOEXEC);
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

/* format -- lay out an empty region: sizes first, then the head; magic last, so that a half-made one is none */
static int format(int fd, uint64_t device_max, uint64_t *head_bytes)
{
    uint64_t area = (device_max + CC_PAGE - 1) / CC_PAGE * CC_PAGE;
    *head_bytes = CC_DEVICES_OFFSET + 2 * area;
    int rc = ftruncate(fd, (off_t)*head_bytes) == 0 ? 0 : cc_fail_errno("sizing the control region");
    CC_CRASH_POINT("create: sized");
    if (rc == 0)
        rc = cc_reserve(fd, 0, CC_DEVICES_OFFSET, "the control region");
    if (rc == 0) {
        void *head = NULL;
        rc = cc_map_file(fd, 0, CC_PAGE, true, &head);
        if (rc == 0) {
            struct cc_control *control = head;
            control->layout_version = CC_LAYOUT_VERSION;
            control->stamp = cc_layout_stamp();
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
    if (rc) { /* as before the call: empty */
        if (ftruncate(fd, 0) != 0)
            (void)cc_fail_errno("emptying the control region");
    }
    return rc;
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
    bool sizes_fit = control->device_state_max_bytes <= DEVICE_STATE_LIMIT && area % CC_PAGE == 0 &&
                     area >= control->device_state_max_bytes && area < control->device_state_max_bytes + CC_PAGE &&
                     CC_DEVICES_OFFSET + 2 * area <= control->bitmap_end && control->bitmap_end <= file_bytes &&
                     cc_observe(&control->n_blocks) <= COLOCACHE_BLOCKS_MAX;
    if (!sizes_fit)
        return cc_fail(COLOCACHE_E_CORRUPT, "control region of %llu bytes does not fit what its head says (%llu blocks, %llu bytes)",
                       (unsigned long long)file_bytes, (unsigned long long)control->n_blocks,
                       (unsigned long long)control->bitmap_end);
    uint64_t reserved = control->reserved0;
    for (size_t i = 0; i < 6; i++)
        reserved |= control->reserved1[i] | control->reserved2[i];
    for (size_t i = 0; i < 7; i++)
        reserved |= control->reserved3[i];
    if (reserved || control->taken_over > 1)
        return cc_fail(COLOCACHE_E_CORRUPT, "the head of the control region has reserved bytes that are not zero");
    return 0;
}

/* check_options -- fill in defaults */
static int check_options(const struct colocache_options *options, struct colocache_options *out)
{
    const struct colocache_options none = {.struct_size = sizeof none};
    int rc = cc_take_struct(out, sizeof *out, options ? options : &none, 16, "options");
    if (rc)
        return rc;
    if (out->device_state_max_bytes == 0)
        out->device_state_max_bytes = DEVICE_STATE_DEFAULT;
    if (out->device_state_max_bytes > DEVICE_STATE_LIMIT)
        return cc_fail(COLOCACHE_E_TOO_LARGE, "device_state_max_bytes is %llu, the most is %llu",
                       (unsigned long long)out->device_state_max_bytes, (unsigned long long)DEVICE_STATE_LIMIT);
    return cc_fault_refuse();
}

/* map_head -- open, lock and map an existing or a fresh region */
static int map_head(struct colocache *cc, int control_fd, bool create, uint64_t device_max)
{
    int rc = own_description(control_fd);
    if (rc < 0)
        return rc;
    cc->control_fd = rc;
    rc = take_lock(cc->control_fd);
    if (rc)
        return rc;
    struct stat st;
    if (fstat(cc->control_fd, &st) != 0)
        return cc_fail_errno("fstat of the control region");
    if (create) {
        if (st.st_size != 0)
            return cc_fail(COLOCACHE_E_EXISTS, "the control region has %lld bytes already: attach to it, or remove it",
                           (long long)st.st_size);
        rc = format(cc->control_fd, device_max, &cc->head_bytes);
        if (rc)
            return rc;
    } else {
        if (st.st_size == 0)
            return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "the control region is empty: create it, there is nothing to attach to");
        if ((uint64_t)st.st_size < CC_DEVICES_OFFSET)
            return cc_fail(COLOCACHE_E_NOT_COLOCACHE, "%lld bytes are too few for a control region", (long long)st.st_size);
        void *page = NULL;
        rc = cc_map_file(cc->control_fd, 0, CC_PAGE, false, &page);
        if (rc)
            return rc;
        rc = cc_control_check(page, (uint64_t)st.st_size);
        cc->head_bytes = CC_DEVICES_OFFSET + 2 * ((struct cc_control *)page)->device_area_bytes;
        cc_unmap(page, CC_PAGE);
        if (rc)
            return rc;
    }
    void *head = NULL;
    rc = cc_map_file(cc->control_fd, 0, cc->head_bytes, true, &head);
    if (rc && create && ftruncate(cc->control_fd, 0) != 0) /* as before the call: empty, so that create can be called again */
        cc_log(cc, COLOCACHE_LOG_WARN, "could not empty the control region after an error");
    if (rc)
        return rc;
    cc->control = head;
    cc->table = (struct cc_block_entry *)(void *)((uint8_t *)head + CC_TABLE_OFFSET);
    cc->devices = (uint8_t *)head + CC_DEVICES_OFFSET;
    cc->control->owner_pid = getpid();
    CC_CRASH_POINT("create or attach: owner");
    return 0;
}

/* cc_control_open -- a handle over a fresh or an existing region, without its blocks */
int cc_control_open(int control_fd, bool create, const struct colocache_options *options, struct colocache **out)
{
    if (!out)
        return cc_fail(COLOCACHE_E_ARGUMENT, "out is NULL");
    *out = NULL;
    struct colocache_options opts;
    int rc = check_options(options, &opts);
    if (rc)
        return rc;
    struct cc_copy copy;
    if (!cc_copy_pick((int)opts.copy_variant, &copy))
        return cc_fail(COLOCACHE_E_UNSUPPORTED, "copy variant %u is not supported by this CPU or build: use COLOCACHE_COPY_AUTO",
                       opts.copy_variant);

    struct colocache *cc = NULL;
    if (posix_memalign((void **)&cc, _Alignof(struct colocache), sizeof *cc) != 0)
        return cc_fail(-ENOMEM, "no memory for a handle");
    memset(cc, 0, sizeof *cc);
    cc->control_fd = -1;
    cc->copy = copy;
    cc->log = opts.log;
    cc->log_context = opts.log_context;
    pthread_mutex_init(&cc->opening, NULL);
    cc->blocks = calloc(COLOCACHE_BLOCKS_MAX, sizeof *cc->blocks);
    rc = cc->blocks ? cc_pool_create(opts.n_threads, &cc->pool) : -ENOMEM;
    if (rc)
        (void)cc_fail(rc, "no memory or threads for a handle with %u threads: %s", opts.n_threads, colocache_strerror(rc));
    else
        rc = map_head(cc, control_fd, create, opts.device_state_max_bytes);
    if (rc) {
        cc_control_free(cc);
        return rc;
    }
    *out = cc;
    return 0;
}

/* cc_control_free -- give back everything a handle holds, however far its making came */
void cc_control_free(struct colocache *cc)
{
    cc_pool_destroy(cc->pool);
    for (uint32_t i = 0; i < cc->n_blocks; i++)
        cc_block_release(&cc->blocks[i]);
    free(cc->blocks);
    cc_unmap(cc->control, cc->head_bytes);
    if (cc->control_fd >= 0)
        close(cc->control_fd); /* the lock goes with the description */
    pthread_mutex_destroy(&cc->opening);
    free(cc);
}

int colocache_create(int control_fd, const struct colocache_options *options, struct colocache **out)
{
    int rc = cc_control_open(control_fd, true, options, out);
    if (rc == 0)
        cc_log(*out, COLOCACHE_LOG_INFO, "control region created, %u threads", cc_pool_size((*out)->pool));
    return rc;
}

int colocache_close(struct colocache *cc)
{
    if (!cc)
        return 0;
    cc_control_free(cc);
    return 0;
}
