/* SPDX-License-Identifier: Apache-2.0 */
/* test_private.c -- private copies of pages: counted as the kernel counts, and forgotten whole or run by run. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "forget.h"

#define PAGE 4096u
#define PAGES 2048u
#define LEN ((uint64_t)PAGES * PAGE)

static int file_fd;
static uint8_t *file_at, *private_at;

static uint8_t *map(int access, int flags, uint64_t len, uint64_t offset)
{
    void *at = mmap(NULL, len, access, flags, file_fd, (off_t)offset);
    REQUIRE(at != MAP_FAILED);
    return at;
}

static void setup(bool huge)
{
    file_fd = memfd_create("image", MFD_CLOEXEC);
    REQUIRE(file_fd >= 0 && ftruncate(file_fd, LEN) == 0);
    file_at = map(PROT_READ | PROT_WRITE, MAP_SHARED, LEN, 0);
    private_at = map(PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, LEN, 0);
    if (huge) {
        madvise(file_at, LEN, MADV_HUGEPAGE);
        madvise(private_at, LEN, MADV_HUGEPAGE);
    }
    for (uint64_t i = 0; i < PAGES; i++)
        file_at[i * PAGE] = (uint8_t)(i + 1);
}

static void teardown(void)
{
    munmap(file_at, LEN);
    munmap(private_at, LEN);
    close(file_fd);
}

static uint64_t private_pages(void)
{
    uint64_t n = 99;
    CHECK_RC(0, colocache_private_bytes(0, private_at, LEN, &n));
    return n / PAGE;
}

static uint64_t sum_of(const uint8_t *at)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < PAGES; i++)
        sum += ((const volatile uint8_t *)at)[i * PAGE] * (i + 1);
    return sum;
}

/* write_some -- every step-th page privately; how many */
static uint64_t write_some(uint64_t step)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i < PAGES; i += step, n++)
        private_at[i * PAGE] ^= 0x55;
    return n;
}

static void forget_shows_the_file_again(uint64_t step, bool huge)
{
    setup(huge);
    (void)sum_of(private_at); /* mapped, not copied */
    CHECK_EQ(0, private_pages());
    uint64_t n = write_some(step);
    CHECK_EQ(n, private_pages());
    CHECK(sum_of(private_at) != sum_of(file_at));
    file_at[0] = 77; /* hidden by a private copy until it is forgotten */
    CHECK(private_at[0] != 77);
    CHECK_RC(0, colocache_private_forget(private_at, LEN));
    CHECK_EQ(0, private_pages());
    CHECK_EQ(sum_of(file_at), sum_of(private_at));
    CHECK_EQ(77, private_at[0]);
    teardown();
}

static void few_private_pages_are_forgotten(void)
{
    forget_shows_the_file_again(64, false);
}

static void many_private_pages_are_forgotten(void)
{
    forget_shows_the_file_again(1, false);
    forget_shows_the_file_again(3, false);
}

static void private_pages_over_huge_pages_are_forgotten(void)
{
    forget_shows_the_file_again(64, true);
    forget_shows_the_file_again(2, true);
}

/* What the guest has mapped and not written stays mapped if few pages are private: on 4 KiB pages each would cost it a fault. */
static void few_are_forgotten_run_by_run(void)
{
    setup(false);
    (void)sum_of(private_at);
    (void)write_some(64);
    CHECK_RC(0, colocache_private_forget(private_at, LEN));
    uint64_t entries[PAGES], mapped = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    REQUIRE(pread(fd, entries, sizeof entries, (off_t)((uintptr_t)private_at / PAGE * 8)) == sizeof entries);
    close(fd);
    for (uint64_t i = 0; i < PAGES; i++)
        mapped += entries[i] >> 63;
    CHECK(mapped == PAGES - PAGES / 64 || mapped == 0); /* 0: a kernel without PAGEMAP_SCAN zaps everything */
    teardown();
}

static void another_process_is_counted(void)
{
    int ready[2];
    setup(false);
    REQUIRE(pipe(ready) == 0);
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        (void)write_some(10);
        (void)!write(ready[1], "x", 1);
        for (;;)
            pause();
    }
    char byte;
    uint64_t n = 0;
    REQUIRE(read(ready[0], &byte, 1) == 1);
    CHECK_RC(0, colocache_private_bytes((int)pid, private_at, LEN, &n));
    CHECK_EQ((PAGES + 9) / 10, n / PAGE);
    CHECK_EQ(0, private_pages()); /* they are its own, not ours */
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    CHECK_RC(-ENOENT, colocache_private_bytes((int)pid, private_at, LEN, &n));
    close(ready[0]);
    close(ready[1]);
    teardown();
}

static void wrong_arguments_are_refused(void)
{
    uint64_t n;
    setup(false);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_bytes(0, private_at, LEN, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_bytes(-1, private_at, LEN, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_bytes(0, private_at + 1, LEN, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_bytes(0, private_at, LEN - 1, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_bytes(0, NULL, LEN, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_forget(private_at + 7, LEN));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_forget((void *)(UINTPTR_MAX - PAGE + 1), 2 * PAGE));
    CHECK_RC(0, colocache_private_forget(private_at, 0));
    teardown();
}

static void locked_memory_is_told(void)
{
    setup(false);
    if (syscall(SYS_mlock, private_at, PAGE) != 0) { /* the system call: a sanitizer makes mlock do nothing */
        teardown();
        SKIP("mlock is not allowed here");
    }
    private_at[0] = 1;
    CHECK_RC(-EINVAL, colocache_private_forget(private_at, LEN));
    CHECK(strstr(colocache_last_error(), "locked") != NULL);
    teardown();
}

/* ---- forgetting in a pause ------------------------------------------------------------------------------------------- */

static struct cc_forget forget;

static uint64_t aside_pages(void)
{
    uint64_t n = 0;
    if (forget.aside)
        CHECK_RC(0, colocache_private_bytes(0, forget.used, LEN, &n));
    return n / PAGE;
}

/* The guest maps everything if touches_all, writes each step-th page, and stands. */
static void one_epoch(bool touches_all, uint64_t step)
{
    if (touches_all)
        (void)sum_of(private_at);
    const uint64_t n = write_some(step);
    CHECK_EQ(n, private_pages());
    file_at[0]++; /* what a flush copies */
    CHECK_RC(0, cc_forget(&forget, private_at, LEN));
    CHECK_EQ(0, private_pages());
    CHECK_EQ(sum_of(file_at), sum_of(private_at));
}

static void what_is_put_aside_is_freed_when_the_guest_runs(void)
{
    setup(false);
    forget = (struct cc_forget){.whole = true};
    one_epoch(false, 3);
    CHECK_EQ((PAGES + 2) / 3 - 1, aside_pages()); /* the first is zapped, to see if memory is locked */
    uint8_t *const used = forget.used;
    cc_forget_rest(&forget);
    CHECK(!forget.aside);
    uint8_t in_core;
    CHECK(mincore(used, PAGE, &in_core) != 0 && errno == ENOMEM); /* nothing is mapped there any more */
    one_epoch(false, 2);
    one_epoch(false, 2); /* nobody freed the rest between them */
    CHECK(aside_pages() <= PAGES / 2);
    cc_forget_rest(&forget);
    cc_forget_rest(&forget); /* nothing is left to do */
    teardown();
}

static void a_guest_that_writes_most_of_what_it_touches_is_put_aside(void)
{
    setup(false);
    forget = (struct cc_forget){0};
    for (int epoch = 0; epoch < 3; epoch++) {
        CHECK_RC(0, madvise(private_at, LEN, MADV_DONTNEED)); /* the sums have mapped all of it */
        one_epoch(false, 3);
        CHECK(aside_pages() > 0);
        cc_forget_rest(&forget);
    }
    teardown();
}

/* What it only reads would be mapped anew, page by page. */
static void a_guest_that_reads_much_keeps_what_it_has_mapped(void)
{
    setup(false);
    forget = (struct cc_forget){0};
    one_epoch(true, 256);
    if (aside_pages()) {
        cc_forget_rest(&forget);
        teardown();
        SKIP("this kernel has no PAGEMAP_SCAN, and all is put aside always");
    }
    for (int epoch = 0; epoch < 20; epoch++) {
        one_epoch(true, 256);
        CHECK(!forget.whole && !forget.aside);
    }
    teardown();
}

static void locked_memory_is_told_and_stays_locked(void)
{
    setup(false);
    forget = (struct cc_forget){.whole = true};
    if (syscall(SYS_mlock, private_at, LEN) != 0) {
        teardown();
        SKIP("mlock is not allowed here");
    }
    CHECK_RC(-EINVAL, cc_forget(&forget, private_at, LEN));
    CHECK(!forget.aside);
    CHECK(madvise(private_at, PAGE, MADV_DONTNEED) != 0); /* still */
    teardown();
}

int main(void)
{
    RUN(few_private_pages_are_forgotten);
    RUN(many_private_pages_are_forgotten);
    RUN(private_pages_over_huge_pages_are_forgotten);
    RUN(few_are_forgotten_run_by_run);
    RUN(another_process_is_counted);
    RUN(wrong_arguments_are_refused);
    RUN(locked_memory_is_told);
    RUN(what_is_put_aside_is_freed_when_the_guest_runs);
    RUN(a_guest_that_writes_most_of_what_it_touches_is_put_aside);
    RUN(a_guest_that_reads_much_keeps_what_it_has_mapped);
    RUN(locked_memory_is_told_and_stays_locked);
    return DONE();
}
