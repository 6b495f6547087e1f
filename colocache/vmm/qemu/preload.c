/* SPDX-License-Identifier: Apache-2.0 */
/*
 * preload.c -- what runs inside a QEMU of ours, by LD_PRELOAD: five things that can't be done from outside.
 *
 *   - it dies with the thread that started it;
 *   - it makes a userfaultfd of its own memory and hands it out, so that another process can log its writes;
 *   - it punches no hole into guest memory.  A balloon or free page reporting gives memory back by holes in the *file*,
 *     private mapping or not: in a secondary that would change the image that must stay the newest epoch;
 *   - after a takeover, when its private copies were written into the image and while it stands, it maps the image shared;
 *   - it says where QEMU's RAM blocks lie, which QEMU tells its monitor only from version 8 on.
 *
 * COLOCACHE_QEMU in the environment says how, and is removed: "SOCKET PARENT DEVICE INODE", the descriptor of a
 * connected stream socket to hand out through, the process that must still be the parent, and the file of guest memory.
 * Without it, as in a program that QEMU starts, the library does nothing.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* QEMU's own, of every version so far, where it exports what its modules and plugins need; else NULL. */
typedef struct RAMBlock RAMBlock;
int qemu_ram_foreach_block(int (*)(RAMBlock *, void *), void *) __attribute__((weak));
const char *qemu_ram_get_idstr(RAMBlock *) __attribute__((weak));
void *qemu_ram_get_host_addr(RAMBlock *) __attribute__((weak));
uint64_t qemu_ram_get_used_length(RAMBlock *) __attribute__((weak));

static bool guarding;
static unsigned long long image_device, image_inode;

/* hand_out -- {errno or 0} and, if 0, the descriptor; false if the other side is gone */
static bool hand_out(int socket, int fd, int32_t error)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    memset(&control, 0, sizeof control);
    struct iovec body = {.iov_base = &error, .iov_len = sizeof error};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1};
    if (!error) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(head), &fd, sizeof fd);
    }
    ssize_t sent;
    do {
        sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent == (ssize_t)sizeof error;
}

static bool is_image(int fd)
{
    struct stat file;
    return fstat(fd, &file) == 0 && file.st_dev == image_device && file.st_ino == image_inode;
}

/* take_order -- an address, a length, an offset and the image, or a length of 0 for the RAM blocks; false: nobody asks any more */
static bool take_order(int socket, uint64_t order[3], int *fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec body = {.iov_base = order, .iov_len = 3 * sizeof order[0]};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t came;
    do {
        came = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
    } while (came < 0 && errno == EINTR);
    struct cmsghdr *head = came > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    *fd = -1;
    if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS && head->cmsg_len == CMSG_LEN(sizeof *fd))
        memcpy(fd, CMSG_DATA(head), sizeof *fd);
    return came == (ssize_t)body.iov_len;
}

struct listing {
    size_t n_bytes;
    char text[1 << 16];
};

static int list_block(RAMBlock *block, void *context)
{
    struct listing *list = context;
    size_t room = sizeof list->text - list->n_bytes;
    int n = snprintf(list->text + list->n_bytes, room, "%" PRIx64 " %" PRIxPTR " %s\n", qemu_ram_get_used_length(block),
                     (uintptr_t)qemu_ram_get_host_addr(block), qemu_ram_get_idstr(block));
    if (n < 0 || (size_t)n >= room)
        return -1;
    list->n_bytes += (size_t)n;
    return 0;
}

static bool send_all(int socket, const void *data, size_t n_bytes)
{
    while (n_bytes > 0) {
        ssize_t sent = send(socket, data, n_bytes, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return false;
        if (sent > 0) {
            data = (const char *)data + sent;
            n_bytes -= (size_t)sent;
        }
    }
    return true;
}

/* tell_blocks -- {errno or 0}, {bytes}, a line for each: bytes used, address, name. None comes or goes while it runs. */
static bool tell_blocks(int socket)
{
    static struct listing list;
    list.n_bytes = 0;
    bool told = qemu_ram_foreach_block && qemu_ram_get_idstr && qemu_ram_get_host_addr && qemu_ram_get_used_length;
    int32_t head[2] = {told ? 0 : ENOSYS, 0};
    if (told && qemu_ram_foreach_block(list_block, &list) != 0)
        head[0] = EOVERFLOW;
    head[1] = head[0] ? 0 : (int32_t)list.n_bytes;
    return send_all(socket, head, sizeof head) && send_all(socket, list.text, (size_t)head[1]);
}

/* serve -- a thread that waits for orders and does nothing else: no lock, no memory of QEMU's allocator */
static void *serve(void *context)
{
    const int socket = (int)(intptr_t)context;
    uint64_t order[3];
    int fd;
    bool asked;
    do {
        asked = take_order(socket, order, &fd);
        if (asked && fd < 0 && !order[1]) {
            asked = tell_blocks(socket);
            continue;
        }
        int32_t error = !asked || !is_image(fd) ? EINVAL : 0;
        if (!error && mmap((void *)(uintptr_t)order[0], order[1], PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd,
                           (off_t)order[2]) == MAP_FAILED)
            error = errno;
        if (fd >= 0)
            close(fd);
        asked = asked && send(socket, &error, sizeof error, MSG_NOSIGNAL) == sizeof error;
    } while (asked);
    close(socket);
    return NULL;
}

/* start_serving -- signals are QEMU's, whose threads choose which of them each takes */
static bool start_serving(int socket)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    if (fcntl(socket, F_SETFD, FD_CLOEXEC) != 0 || pthread_sigmask(SIG_SETMASK, &all, &before) != 0)
        return false;
    bool begun = pthread_create(&thread, NULL, serve, (void *)(intptr_t)socket) == 0 && pthread_detach(thread) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return begun;
}

__attribute__((constructor)) static void start(void)
{
    const char *order = getenv("COLOCACHE_QEMU");
    int socket;
    long parent;
    if (!order)
        return;
    if (sscanf(order, "%d %ld %llu %llu", &socket, &parent, &image_device, &image_inode) != 4)
        _exit(127);
    unsetenv("COLOCACHE_QEMU");
    guarding = true;
    /* Asked for first, then checked: a parent that died before is no parent any more, one that dies from now on is told of. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
        _exit(127);
    /* Faults of user mode suffice: what the kernel or KVM writes is seen by the asynchronous form all the same. */
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    bool told = hand_out(socket, uffd, uffd < 0 ? errno : 0);
    if (uffd >= 0)
        close(uffd);
    if (!told || !start_serving(socket))
        _exit(127);
}

/* Anything that changes what the file holds; to allocate is fine. */
static bool makes_holes(int fd, int mode)
{
    return guarding && (mode & ~FALLOC_FL_KEEP_SIZE) != 0 && is_image(fd);
}

__attribute__((visibility("default"))) int fallocate(int fd, int mode, off_t offset, off_t len)
{
    if (makes_holes(fd, mode)) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return (int)syscall(SYS_fallocate, fd, mode, offset, len);
}

/* On 64-bit machines off_t and off64_t are the same type, and glibc has both names. */
__attribute__((visibility("default"))) int fallocate64(int fd, int mode, off64_t offset, off64_t len)
{
    return fallocate(fd, mode, offset, len);
}
