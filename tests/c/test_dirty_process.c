/* SPDX-License-Identifier: Apache-2.0 */
/* dirty_uffd.c for the memory of another process: a child that writes shared memory on command, logged from here. */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define N_PAGES 9000u
#define BYTES (N_PAGES * 4096ull)
#define ROUNDS 2000
#define FLAT_OUT UINT64_MAX /* a command: write until told otherwise */

static struct {
    uint8_t *memory; /* shared with the child, and at another address there */
    struct colocache_source *log;
    pid_t pid;
    int uffd, pagemap, commands;
    uint8_t logged[N_PAGES];  /* taken from the log */
    uint8_t written[N_PAGES]; /* by the child, on command */
} world;

/* child -- writes the pages it is told; an answer of one byte each time */
static void child(int socket, uint8_t *memory)
{
    uint64_t page, n = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (read(socket, &page, sizeof page) == sizeof page) {
        if (page == FLAT_OUT) {
            struct dice dice = {5};
            char end;
            while (recv(socket, &end, 1, MSG_DONTWAIT | MSG_PEEK) != 1)
                for (int i = 0; i < 16; i++) /* few between two looks, so that most pages are clean when one of them is written */
                    *(volatile uint64_t *)(memory + below(&dice, N_PAGES) * 4096 + below(&dice, 512) * 8) = ++n;
        } else {
            memory[page * 4096 + 5]++;
        }
        if (write(socket, "", 1) != 1)
            break;
    }
    _exit(0);
}

static void hand_over(int socket)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    _Alignas(struct cmsghdr) char bytes[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec body = {.iov_base = &(char){fd >= 0}, .iov_len = 1};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = bytes, message.msg_controllen = sizeof bytes;
        *CMSG_FIRSTHDR(&message) = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &fd, sizeof fd);
    }
    if (sendmsg(socket, &message, 0) != 1)
        _exit(1);
}

static int receive_over(int socket)
{
    _Alignas(struct cmsghdr) char bytes[CMSG_SPACE(sizeof(int))];
    char any;
    struct iovec body = {.iov_base = &any, .iov_len = 1};
    struct msghdr message = {.msg_iov = &body, .msg_iovlen = 1, .msg_control = bytes, .msg_controllen = sizeof bytes};
    int fd = -1;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&message))
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static bool begin(int kvm_maps_it)
{
    int sockets[2], file = memfd_create("guest", MFD_CLOEXEC);
    REQUIRE(file >= 0 && posix_fallocate(file, 0, BYTES) == 0 && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    memset(world.logged, 0, sizeof world.logged);
    memset(world.written, 0, sizeof world.written);
    world.memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    REQUIRE(world.memory != MAP_FAILED);
    uint8_t *theirs; /* where the child maps it, told by the child */
    world.pid = fork();
    REQUIRE(world.pid >= 0);
    if (world.pid == 0) {
        uint8_t *mine = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        hand_over(sockets[1]);
        if (mine == MAP_FAILED || write(sockets[1], &mine, sizeof mine) != sizeof mine)
            _exit(1);
        child(sockets[1], mine);
    }
    close(sockets[1]);
    close(file);
    world.commands = sockets[0];
    world.uffd = receive_over(sockets[0]);
    REQUIRE(read(sockets[0], &theirs, sizeof theirs) == sizeof theirs);
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/pagemap", (int)world.pid);
    world.pagemap = open(path, O_RDONLY | O_CLOEXEC);
    const struct colocache_uffd_range ranges[] = {{.block = 0, .first_pfn = 0, .n_pages = 65, .addr = theirs},
                                                  {.block = 0, .first_pfn = 65, .n_pages = N_PAGES - 65, .addr = theirs + 65 * 4096}};
    int rc = world.uffd < 0 ? COLOCACHE_E_UNSUPPORTED
                            : colocache_source_uffd_process(world.uffd, world.pagemap, kvm_maps_it, ranges, 2, &world.log);
    if (rc == COLOCACHE_E_UNSUPPORTED)
        check_skip_reason = "userfaultfd write-protect-async is unavailable here (kernel before 6.7, or not allowed)";
    else
        REQUIRE(rc == 0);
    return rc == 0;
}

static void end(void)
{
    if (world.log)
        CHECK_RC(0, colocache_source_close(world.log));
    world.log = NULL;
    kill(world.pid, SIGKILL);
    waitpid(world.pid, NULL, 0);
    close(world.commands);
    close(world.pagemap);
    if (world.uffd >= 0)
        close(world.uffd);
    munmap(world.memory, BYTES);
}

static void answer(void)
{
    char byte;
    REQUIRE(read(world.commands, &byte, 1) == 1);
}

static void order(uint64_t page)
{
    REQUIRE(write(world.commands, &page, sizeof page) == sizeof page);
    if (page != FLAT_OUT) {
        answer();
        world.written[page] = 1;
    }
}

static int collect(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages, const uint64_t *words)
{
    (void)context;
    CHECK(block == 0 && first_pfn + n_pages <= N_PAGES);
    for (uint64_t i = 0; i < n_pages; i++)
        if (words[i / 64] >> i % 64 & 1)
            world.logged[first_pfn + i] = 1;
    return 0;
}

/* the log holds exactly what the child was told to write since the last look */
static void look(void)
{
    CHECK_RC(0, world.log->sync(world.log, collect, NULL));
    CHECK(memcmp(world.logged, world.written, N_PAGES) == 0);
    memset(world.logged, 0, N_PAGES);
    memset(world.written, 0, N_PAGES);
}

static void each_write_is_in_the_log_once(int kvm_maps_it)
{
    struct dice dice = {11};
    if (begin(kvm_maps_it)) {
        look();
        for (int round = 0; round < 12; round++) {
            /* few: run by run; many on few pages: one scan over all of them; the rest of memory must stay as it is in both */
            uint64_t n = round % 3 == 0 ? 3 : 400, reach = round % 3 == 2 ? 900 : N_PAGES;
            for (uint64_t i = 0; i < n; i++)
                order(below(&dice, reach));
            order(64); /* both sides of the ranges' edge */
            order(65);
            look();
            look(); /* nothing since: nothing more */
        }
        world.memory[7 * 4096] = 1; /* another process's write through the same file is not seen: said in the header */
        look();
    }
    end();
}

static void every_write_is_in_the_log_once(void)
{
    each_write_is_in_the_log_once(0);
}

static void every_write_is_in_the_log_once_where_kvm_maps_it(void)
{
    each_write_is_in_the_log_once(1);
}

static void no_write_is_lost(int kvm_maps_it)
{
    uint8_t *mirror = calloc(N_PAGES, 4096);
    REQUIRE(mirror);
    if (begin(kvm_maps_it)) {
        order(FLAT_OUT);
        for (int round = 0; round < ROUNDS; round++) {
            if (round == ROUNDS - 1) {
                REQUIRE(write(world.commands, &(uint64_t){0}, 8) == 8); /* ends the flat-out phase; is itself a command */
                answer();
                answer();
            }
            CHECK_RC(0, world.log->sync(world.log, collect, NULL));
            for (uint64_t p = 0; p < N_PAGES; p++) /* taken first, read then */
                if (world.logged[p])
                    memcpy(mirror + p * 4096, world.memory + p * 4096, 4096);
            memset(world.logged, 0, N_PAGES);
        }
        CHECK(memcmp(mirror, world.memory, BYTES) == 0);
    }
    end();
    free(mirror);
}

static void no_write_is_lost_while_the_log_is_taken(void)
{
    no_write_is_lost(0);
}

static void no_write_is_lost_while_the_log_is_taken_where_kvm_maps_it(void)
{
    no_write_is_lost(1);
}

static void the_log_of_a_process_that_has_ended_is_lost(void)
{
    for (int kvm_maps_it = 0; kvm_maps_it < 2; kvm_maps_it++) {
        if (begin(kvm_maps_it)) {
            order(9);
            kill(world.pid, SIGKILL);
            siginfo_t info;
            REQUIRE(waitid(P_PID, (id_t)world.pid, &info, WEXITED | WNOWAIT) == 0);
            CHECK_RC(COLOCACHE_E_LOG_LOST, world.log->sync(world.log, collect, NULL));
            CHECK(strstr(colocache_last_error(), "has ended") != NULL);
        }
        end();
    }
}

static void a_closed_log_leaves_the_process_as_it_was(void)
{
    if (begin(0)) {
        CHECK_RC(0, colocache_source_close(world.log));
        world.log = NULL;
        order(9); /* an unregistered range faults no more: the child goes on */
        char byte;
        CHECK(fcntl(world.uffd, F_GETFD) >= 0 && fcntl(world.pagemap, F_GETFD) >= 0); /* they stayed ours */
        CHECK(read(world.uffd, &byte, 1) < 0);
    }
    end();
}

static void wrong_arguments_are_refused(void)
{
    struct colocache_source *log = (void *)1;
    struct colocache_uffd_range range = {.n_pages = 1, .addr = (void *)4096};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd_process(0, 0, 0, NULL, 1, &log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd_process(0, 0, 0, &range, 0, &log));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd_process(0, 0, 0, &range, 1, NULL));
    CHECK_RC(-EBADF, colocache_source_uffd_process(-1, 0, 0, &range, 1, &log));
    range.addr = (void *)(UINTPTR_MAX - 4095); /* its end is past the last address */
    range.n_pages = 2;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_uffd_process(0, 0, 0, &range, 1, &log));
    int file = memfd_create("no userfaultfd", MFD_CLOEXEC);
    range = (struct colocache_uffd_range){.n_pages = 1, .addr = (void *)4096};
    CHECK_RC(-EBADF, colocache_source_uffd_process(file, -1, 0, &range, 1, &log));
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_source_uffd_process(file, file, 0, &range, 1, &log));
    close(file);
    CHECK(log == (void *)1);
}

int main(void)
{
    RUN(every_write_is_in_the_log_once);
    RUN(every_write_is_in_the_log_once_where_kvm_maps_it);
    RUN(no_write_is_lost_while_the_log_is_taken);
    RUN(no_write_is_lost_while_the_log_is_taken_where_kvm_maps_it);
    RUN(the_log_of_a_process_that_has_ended_is_lost);
    RUN(a_closed_log_leaves_the_process_as_it_was);
    RUN(wrong_arguments_are_refused);
    return DONE();
}
