/* SPDX-License-Identifier: Apache-2.0 */
/* fail_calls.c -- wrappers (ld --wrap) around what csrc imports; tests/c/run_faults.sh has the same list. */
#define _GNU_SOURCE
#include "fail_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

#include "layout.h"
#include <unistd.h>

#include "pagemap.h"

#ifndef KVM_RESET_DIRTY_RINGS
#define KVM_RESET_DIRTY_RINGS _IO(KVMIO, 0xc7)
#endif

const char *const call_names[N_CALLS] = {
    "mmap",    "munmap",         "ftruncate", "posix_fallocate", "open",   "fcntl",          "fstat",
    "fstatfs", "getrandom",      "recvmsg",   "sendmsg",         "poll",   "ioctl",          "pthread_create",
    "calloc",  "posix_memalign", "fopen",     "pread",           "lseek",  "syscall",        "sched_getaffinity",
    "madvise", "fallocate",      "pwrite",    "mprotect",        "mremap", "sync_file_range"};
unsigned long call_counts[N_CALLS];
unsigned call_moves;
struct failure failure;
bool failure_happened, counting, attaching, tidying;
static bool owner_unnamed, counted_otherwise, punched_later, emptied_later, only_slower;
uint64_t kvm_log_words;
struct kvm_ring_entry kvm_ring[256];

static const int errors[N_CALLS][8] = {
    [MMAP] = {ENOMEM, EAGAIN, EPERM},
    [MUNMAP] = {ENOMEM},
    [FTRUNCATE] = {EFBIG, EIO, EPERM},
    [POSIX_FALLOCATE] = {ENOSPC, ENOMEM, EINTR, EFBIG, EIO},
    [OPEN] = {EMFILE, ENFILE, ENOENT, EACCES},
    [FCNTL] = {EMFILE, EINVAL, ENOLCK},
    [FSTAT] = {EIO, EOVERFLOW},
    [FSTATFS] = {EIO, ENOSYS},
    [GETRANDOM] = {EINTR, ENOSYS, EIO},
    [RECVMSG] = {ECONNRESET, ENOMEM, EINTR, EAGAIN, EIO, END_OF_FILE, SHORT},
    [SENDMSG] = {EPIPE, ECONNRESET, ENOBUFS, EINTR, EAGAIN, ETIMEDOUT, SHORT},
    [POLL] = {EINTR, ENOMEM, TIMES_OUT},
    [IOCTL] = {ENOMEM, EFAULT, EINTR, ENOTTY},
    [PTHREAD_CREATE] = {EAGAIN, EPERM},
    [CALLOC] = {ENOMEM},
    [POSIX_MEMALIGN] = {ENOMEM},
    [FOPEN] = {EMFILE, ENOMEM},
    [PREAD] = {EIO},
    [LSEEK] = {EINVAL, EIO},
    [SYSCALL] = {ENOSYS, EPERM, EMFILE},
    [SCHED_GETAFFINITY] = {EINVAL, EPERM},
    [MADVISE] = {EAGAIN, EINVAL, ENOMEM},
    [FALLOCATE] = {EINTR, EIO, ENOSPC},
    [PWRITE] = {EINTR, EIO, ENOSPC, SHORT},
    [MPROTECT] = {ENOMEM, EACCES},
    [MREMAP] = {ENOMEM, EINVAL, EFAULT},
    [SYNC_FILE_RANGE] = {EIO, ENOSPC, EINTR},
};

const int *errors_of(enum call call)
{
    return errors[call];
}

bool is_absorbed(enum call call, int error)
{
    if (call == MUNMAP || call == GETRANDOM || call == SCHED_GETAFFINITY || call == LSEEK || (call == PREAD && owner_unnamed))
        return true; /* nothing to undo; other entropy; one thread; all counts as data */
    if ((call == FALLOCATE && punched_later) || (call == FTRUNCATE && emptied_later)) /* left to the next epoch */
        return true;
    if (call == IOCTL && error == ENOTTY && counted_otherwise) /* private pages, on a kernel without PAGEMAP_SCAN */
        return true;
    if (call == MREMAP || only_slower) /* private pages are zapped instead, or by another rule; pages are mapped later */
        return true;
    return error == EINTR || error == SHORT || (error == EAGAIN && (call == RECVMSG || call == SENDMSG || call == MADVISE));
}

const char *error_name(int error)
{
    return error == END_OF_FILE ? "end of file"
           : error == SHORT     ? "half the bytes"
           : error == TIMES_OUT ? "timeout"
                                : strerrorname_np(error);
}

/* happens -- does this call fail?  Then errno is set. */
static bool happens(enum call call)
{
    if (!counting || ++call_counts[call] != failure.index || failure.call != call)
        return false;
    failure_happened = true;
    only_slower = tidying && (call == OPEN || call == IOCTL);
    errno = failure.error > 0 ? failure.error : 0;
    return true;
}

#define WRAP(type, name, parameters, arguments, call, failed) \
    type __real_##name parameters; \
    type __wrap_##name parameters; \
    type __wrap_##name parameters \
    { \
        return happens(call) ? (failed) : __real_##name arguments; \
    }

WRAP(int, sync_file_range, (int fd, off_t offset, off_t n, unsigned flags), (fd, offset, n, flags), SYNC_FILE_RANGE, -1)
WRAP(int, posix_fallocate, (int fd, off_t offset, off_t n), (fd, offset, n), POSIX_FALLOCATE, failure.error)
WRAP(int, fstat, (int fd, struct stat *st), (fd, st), FSTAT, -1)
WRAP(int, fstatfs, (int fd, struct statfs *st), (fd, st), FSTATFS, -1)
WRAP(ssize_t, getrandom, (void *buffer, size_t n, unsigned flags), (buffer, n, flags), GETRANDOM, -1)
WRAP(int, poll, (struct pollfd * fds, nfds_t n, int timeout_ms), (fds, n, timeout_ms), POLL, failure.error == TIMES_OUT ? 0 : -1)
WRAP(int, pthread_create, (pthread_t * thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg), (thread, attr, start, arg),
     PTHREAD_CREATE, failure.error)
WRAP(void *, calloc, (size_t n, size_t size), (n, size), CALLOC, NULL)
WRAP(int, posix_memalign, (void **out, size_t alignment, size_t n), (out, alignment, n), POSIX_MEMALIGN, failure.error)
WRAP(FILE *, fopen, (const char *path, const char *mode), (path, mode), FOPEN, NULL)
WRAP(off_t, lseek, (int fd, off_t offset, int whence), (fd, offset, whence), LSEEK, -1)
WRAP(int, mprotect, (void *addr, size_t n, int access), (addr, n, access), MPROTECT, -1)

/* as the library calls it: with all five */
void *__real_mremap(void *addr, size_t n, size_t new_n, int flags, void *to);
void *__wrap_mremap(void *addr, size_t n, size_t new_n, int flags, void *to);
void *__wrap_mremap(void *addr, size_t n, size_t new_n, int flags, void *to)
{
    return happens(MREMAP) ? MAP_FAILED : __real_mremap(addr, n, new_n, flags, to);
}

int __real_madvise(void *addr, size_t n, int advice);
int __wrap_madvise(void *addr, size_t n, int advice);
int __wrap_madvise(void *addr, size_t n, int advice)
{
    if (!happens(MADVISE))
        return __real_madvise(addr, n, advice);
    only_slower = advice == MADV_POPULATE_READ;
    return -1;
}

void *__real_mmap(void *addr, size_t n, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *addr, size_t n, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *addr, size_t n, int access, int flags, int fd, off_t offset)
{
    if (!happens(MMAP))
        return __real_mmap(addr, n, access, flags, fd, offset);
    only_slower = access == PROT_NONE; /* room for tables that are moved, or a boundary where they move fast */
    return MAP_FAILED;
}

WRAP(int, sched_getaffinity, (pid_t pid, size_t n, cpu_set_t *set), (pid, n, set), SCHED_GETAFFINITY, -1)

/* the pid of an owner that can't be read leaves it unnamed; a page that can't be read is an error */
ssize_t __real_pread(int fd, void *buffer, size_t n, off_t offset);
ssize_t __wrap_pread(int fd, void *buffer, size_t n, off_t offset);
ssize_t __wrap_pread(int fd, void *buffer, size_t n, off_t offset)
{
    if (!happens(PREAD))
        return __real_pread(fd, buffer, n, offset);
    owner_unnamed = offset == offsetof(struct cc_control, owner_pid);
    return -1;
}

int __real_fallocate(int fd, int mode, off_t offset, off_t n);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t n);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t n)
{
    if (!happens(FALLOCATE))
        return __real_fallocate(fd, mode, offset, n);
    punched_later = attaching && bounded && n > 4096; /* a cache is emptied; asking whether a file can be punched takes a page */
    return -1;
}

/* advice: of a regular file it can't fail */
int __real_posix_fadvise(int fd, off_t offset, off_t n, int advice);
int __wrap_posix_fadvise(int fd, off_t offset, off_t n, int advice);
int __wrap_posix_fadvise(int fd, off_t offset, off_t n, int advice)
{
    return __real_posix_fadvise(fd, offset, n, advice);
}

/* a spill file that keeps bytes without bits */
int __real_ftruncate(int fd, off_t n);
int __wrap_ftruncate(int fd, off_t n);
int __wrap_ftruncate(int fd, off_t n)
{
    if (!happens(FTRUNCATE))
        return __real_ftruncate(fd, n);
    emptied_later = n == 0;
    return -1;
}

/* a short write is no error */
ssize_t __real_pwrite(int fd, const void *buffer, size_t n, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *buffer, size_t n, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *buffer, size_t n, off_t offset)
{
    if (!happens(PWRITE))
        return __real_pwrite(fd, buffer, n, offset);
    return failure.error == SHORT ? __real_pwrite(fd, buffer, n / 2, offset) : -1;
}

/* munmap fails for want of a map entry; what was mapped stays: nothing the library could do, so the test takes it back */
int __real_munmap(void *addr, size_t n);
int __wrap_munmap(void *addr, size_t n);
int __wrap_munmap(void *addr, size_t n)
{
    int rc = __real_munmap(addr, n);
    return happens(MUNMAP) ? -1 : rc;
}

static bool would_block(void)
{
    bool blocks = counting && ++call_moves % 5 == 0;
    if (blocks)
        errno = EAGAIN;
    return blocks;
}

/* halved -- the first half of the bytes of the first iovec that has two or more */
static struct msghdr halved(const struct msghdr *msg, struct iovec *one)
{
    struct msghdr less = *msg;
    *one = msg->msg_iov[0];
    one->iov_len = one->iov_len > 1 ? one->iov_len / 2 : 1;
    less.msg_iov = one;
    less.msg_iovlen = 1;
    return less;
}

ssize_t __real_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int fd, struct msghdr *msg, int flags)
{
    if (!happens(RECVMSG))
        return would_block() ? -1 : __real_recvmsg(fd, msg, flags);
    struct iovec one;
    struct msghdr less = halved(msg, &one);
    return failure.error == SHORT ? __real_recvmsg(fd, &less, flags) : failure.error == END_OF_FILE ? 0 : -1;
}

ssize_t __real_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *msg, int flags)
{
    if (!happens(SENDMSG))
        return would_block() ? -1 : __real_sendmsg(fd, msg, flags);
    struct iovec one;
    struct msghdr less = halved(msg, &one);
    return failure.error == SHORT ? __real_sendmsg(fd, &less, flags) : -1;
}

/* ---- those with variable arguments ------------------------------------------------------------------------------------ */

static void *argument(va_list args)
{
    return va_arg(args, void *); /* an int travels in the same register */
}

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...)
{
    const bool cgroup = strstr(path, "cgroup") != NULL;              /* how many threads: one that can't be read has no quota */
    return !cgroup && happens(OPEN) ? -1 : __real_open(path, flags); /* the library never creates files */
}

int __real_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...)
{
    va_list args;
    va_start(args, command);
    void *arg = argument(args);
    va_end(args);
    if (command == F_OFD_SETLK && ((const struct flock *)arg)->l_type == F_UNLCK)
        return __real_fcntl(fd, command, arg); /* a lock that is held can be let go */
    return happens(FCNTL) ? -1 : __real_fcntl(fd, command, arg);
}

/* KVM's requests are answered here, so that no KVM is needed */
int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    va_start(args, request);
    void *arg = argument(args);
    va_end(args);
    if (happens(IOCTL)) {
        counted_otherwise = request == CC_PAGEMAP_SCAN && ((struct cc_scan_arg *)arg)->flags == 0;
        return -1;
    }
    if (request == KVM_GET_DIRTY_LOG) {
        memcpy(((struct kvm_dirty_log *)arg)->dirty_bitmap, &kvm_log_words, sizeof kvm_log_words);
    } else if (request == KVM_CLEAR_DIRTY_LOG) {
        kvm_log_words = 0;
    } else if (request == KVM_RESET_DIRTY_RINGS) {
        for (unsigned i = 0; i < sizeof kvm_ring / sizeof *kvm_ring; i++)
            kvm_ring[i].flags = kvm_ring[i].flags == 2 ? 0 : kvm_ring[i].flags;
    } else {
        return __real_ioctl(fd, request, arg);
    }
    return 0;
}

/* futex waits are looked at again by every caller whatever they return; only userfaultfd can fail here */
long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);
long __wrap_syscall(long number, ...)
{
    va_list args;
    va_start(args, number);
    void *a[6];
    for (int i = 0; i < 6; i++)
        a[i] = argument(args);
    va_end(args);
    if (number == SYS_userfaultfd && happens(SYSCALL))
        return -1;
    return __real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
