/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The system calls that the manual lists for run time are enough: a child under a seccomp filter with exactly those, and no other, goes
 * through whole epochs, several threads, a userfaultfd log, a socket, an abort, a failover.  Any other call ends it with SIGSYS.
 */
#define _GNU_SOURCE
#include "rig.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* As in colocache.h, "Processes and signals"; a C library may make its poll and fstat of either call.  write and exit_group are the
 * test's own. */
static const int allowed[] = {SYS_futex,    SYS_recvmsg,    SYS_sendmsg,    SYS_ioctl, SYS_fallocate,     SYS_lseek,
                              SYS_pwrite64, SYS_pread64,    SYS_newfstatat, SYS_fstat, SYS_clock_gettime, SYS_ppoll,
#ifdef SYS_poll
                              SYS_poll,
#endif
                              SYS_write,    SYS_exit_group, SYS_munmap,     SYS_close /* only when a block goes */};

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#else
#define ARCH AUDIT_ARCH_AARCH64
#endif

#define N_ALLOWED (sizeof allowed / sizeof allowed[0])

static void lock_in(bool a_block_goes)
{
    struct sock_filter code[N_ALLOWED + 6];
    const uint32_t n_allowed = a_block_goes ? N_ALLOWED : N_ALLOWED - 2;
    uint32_t n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (uint32_t i = 0; i < n_allowed; i++)
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)allowed[i], (uint8_t)(n_allowed - i), 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = (uint16_t)n, .filter = code};
    REQUIRE(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    /* of all threads: the flush's workers exist already */
    REQUIRE(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0);
}

static const uint64_t blocks[] = {300, 4096};

#define MUST(condition) \
    do { \
        if (!(condition)) { \
            dprintf(2, "    %s:%d: not true: %s (%s)\n", __FILE__, __LINE__, #condition, colocache_last_error()); \
            syscall(SYS_exit_group, 3); \
        } \
    } while (0)

/* live -- everything a secondary and a primary call at run time, in one process; never returns */
static void live(struct rig *rig, struct colocache_source *log, uint8_t *ram)
{
    struct colocache_sender *sender;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t n_pages = 0, epoch;
    uint32_t n_runs;
    void *state;
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0 && colocache_sender_create(&sender) == 0);
    for (uint32_t b = 0; b < 2; b++)
        MUST(colocache_sender_add_block(sender, b ? "boot" : "pc.ram", ram + b * (1 << 21), blocks[b] * 4096, 4096, NULL) == 0);
    struct colocache_status status = {.struct_size = sizeof status};
    struct colocache_run runs[4];
    struct iovec iov = {.iov_base = header, .iov_len = sizeof header};
    struct msghdr end_mark = {.msg_iov = &iov, .msg_iovlen = 1};
    lock_in(false);
    for (uint64_t n = 1; n <= 3; n++) {
        MUST(colocache_sender_mark_dirty(sender, 0, 10 * n, 3) == 0 && colocache_sender_send(sender, pair[0], 5000, n, 0, 1, 0, NULL) == 0);
        MUST(colocache_message_header(header, 7, n, 0, 0, 0) == 0 && sendmsg(pair[0], &end_mark, MSG_NOSIGNAL) == sizeof header);
        MUST(n == 1 ? colocache_receive_stream(rig->cc, pair[1], 5000, n, header, &n_pages) == 0
                    : colocache_receive_ready(rig->cc, pair[1], 5000, n, 0, header, &n_pages) == 0);
        MUST(colocache_receive_zero(rig->cc, n, 1, 0, 4096) == 0 && colocache_mark_dirty(rig->cc, 0, 1, 1) == 0);
        MUST(colocache_receive_page(rig->cc, n, 1, 5, ram, 4096) == 0);
        MUST(n > 1 || colocache_preflush(rig->cc, NULL) == 0);
        MUST(colocache_device_state_begin(rig->cc, n, 5000, &state) == 0);
        memset(state, (int)n, 5000);
        MUST(!log || (colocache_sync_dirty_log(rig->cc, log) == 0 && colocache_source_discard(log) == 0));
        struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = n, .n_pages = COLOCACHE_ANY_COUNT};
        MUST(colocache_seal(rig->cc, &args, NULL) == 0 && colocache_flush(rig->cc, NULL) == 0);
        MUST(colocache_loaded(rig->cc, 1) == 0 && colocache_validate(rig->cc, 1) == 0);
        MUST(colocache_get_status(rig->cc, &status) == 0 && status.sealed_epoch == n);
        MUST(colocache_give_back(rig->cc, 0, 10 * n, 2) == (rig->blocks[0].sparse ? 0 : COLOCACHE_E_UNSUPPORTED));
    }
    MUST(colocache_receive_ready(rig->cc, pair[1], 10, 4, 0, header, &n_pages) == COLOCACHE_READY_NOT);
    MUST(colocache_receive_stream(rig->cc, pair[1], 10, 4, header, &n_pages) == COLOCACHE_E_TIMEOUT);
    MUST(colocache_receive_zero(rig->cc, 4, 0, 0, 1) == 0 && colocache_abort(rig->cc, 4, "in a jail") == 0);
    MUST(colocache_sender_received(sender) == 0 && colocache_sender_resend(sender) == 0);
    MUST(colocache_sender_mark_all(sender) == 0 && colocache_sender_next(sender, 0, 1, 0, runs, 4, &n_runs) == 0 && n_runs == 2);
    MUST(colocache_dirty_log_lost(rig->cc) == 0 && colocache_failover(rig->cc, &epoch) == 0 && epoch == 3);
    syscall(SYS_exit_group, 42);
}

static void live_in_a_jail(bool sparse)
{
    pid_t child = fork();
    if (child == 0) { /* all threads and mappings are its own */
        struct rig rig;
        rig_open(&rig, 2, blocks, 4096, sparse);
        struct colocache_block_info info;
        REQUIRE(colocache_get_block(rig.cc, 0, &info) == 0);
        struct colocache_uffd_range range = {.block = 0, .n_pages = blocks[0], .addr = info.guest_addr};
        struct colocache_source *log = NULL;
        int rc = colocache_source_uffd(&range, 1, &log);
        REQUIRE(rc == 0 || rc == COLOCACHE_E_UNSUPPORTED);
        uint8_t *ram = aligned_alloc(4096, 20 << 20);
        REQUIRE(ram != NULL);
        memset(ram, 7, 20 << 20);
        live(&rig, log, ram);
    }
    int status = 0;
    REQUIRE(child > 0 && waitpid(child, &status, 0) == child);
    if (WIFSIGNALED(status))
        CHECK_SAY("killed by signal %d: a call that is not in the list (the kernel's log names it)", WTERMSIG(status));
    CHECK_EQ(42, WIFEXITED(status) ? WEXITSTATUS(status) : 0);
}

static void the_listed_system_calls_are_enough(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    SKIP("a sanitizer makes system calls of its own");
#endif
    live_in_a_jail(false);
    live_in_a_jail(true);
}

static void a_block_that_goes_takes_two_more(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    SKIP("a sanitizer makes system calls of its own");
#endif
    pid_t child = fork();
    if (child == 0) {
        struct rig rig;
        rig_open(&rig, 2, blocks, 4096, false);
        rig_checkpoint(&rig, 1, 0);
        MUST(colocache_device_state_begin(rig.cc, 2, 0, &(void *){NULL}) == 0);
        lock_in(true);
        struct colocache_seal_args args = rig_seal_args(2);
        MUST(colocache_remove_block(rig.cc, 1) == 0 && colocache_seal(rig.cc, &args, NULL) == 0);
        MUST(colocache_flush(rig.cc, NULL) == 0 && colocache_loaded(rig.cc, 1) == 0);
        MUST(colocache_mark_dirty(rig.cc, 1, 0, 1) == COLOCACHE_E_BLOCK);
        syscall(SYS_exit_group, 42);
    }
    int status = 0;
    REQUIRE(child > 0 && waitpid(child, &status, 0) == child);
    if (WIFSIGNALED(status))
        CHECK_SAY("killed by signal %d: a call that is not in the list (the kernel's log names it)", WTERMSIG(status));
    CHECK_EQ(42, WIFEXITED(status) ? WEXITSTATUS(status) : 0);
}

int main(void)
{
    RUN(the_listed_system_calls_are_enough);
    RUN(a_block_that_goes_takes_two_more);
    return DONE();
}
