/* SPDX-License-Identifier: Apache-2.0 */
/* test_fold.c -- after a takeover the VM's private pages become the image's, part by part, and the VM never misses one. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define PAGE 4096u
#define PAGES 600u
#define LEN ((uint64_t)PAGES * PAGE)
#define OFFSET (3 * PAGE) /* of the image in its file */

static int control_fd, guest_fd, cache_fd;
static uint8_t *image, *vm; /* as everybody sees it; as the VM does */
static uint8_t oracle[LEN]; /* what the VM must find */
static struct colocache *cc;

static int file(const char *name, uint64_t n_bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0);
    return fd;
}

static void vm_writes(uint64_t pfn, uint8_t value)
{
    memset(vm + pfn * PAGE, value, PAGE);
    memset(oracle + pfn * PAGE, value, PAGE);
}

/* setup -- epoch 1 is loaded, and the VM has written every third page and one long run */
static void setup(uint32_t memory_mode)
{
    struct colocache_options options = {
        .struct_size = sizeof options, .n_threads = 1, .device_state_max_bytes = PAGE, .memory_mode = memory_mode};
    control_fd = file("control", 0);
    guest_fd = file("guest", LEN + OFFSET);
    cache_fd = file("cache", LEN);
    image = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, guest_fd, OFFSET);
    REQUIRE(image != MAP_FAILED);
    struct colocache_images ram = {.struct_size = sizeof ram,
                                   .name = "ram",
                                   .len_bytes = LEN,
                                   .page_size = PAGE,
                                   .guest_fd = guest_fd,
                                   .guest_offset = OFFSET,
                                   .cache_fd = cache_fd};
    REQUIRE(colocache_create(control_fd, &options, &cc) == 0 && colocache_add_block(cc, &ram, NULL) == 0);
    struct colocache_block_info info;
    REQUIRE(colocache_get_block(cc, 0, &info) == 0);
    vm = info.guest_addr;
    for (uint64_t pfn = 0; pfn < PAGES; pfn++) {
        memset(oracle + pfn * PAGE, (int)(pfn % 100 + 1), PAGE);
        REQUIRE(colocache_receive_page(cc, 1, 0, pfn, oracle + pfn * PAGE, PAGE) == 0);
    }
    void *state;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = 1, .n_pages = COLOCACHE_ANY_COUNT};
    REQUIRE(colocache_device_state_begin(cc, 1, 0, &state) == 0 && colocache_seal(cc, &args, NULL) == 0);
    REQUIRE(colocache_flush(cc, NULL) == 0 && colocache_loaded(cc, 1) == 0);
    for (uint64_t pfn = 0; pfn < PAGES; pfn += 3)
        vm_writes(pfn, 0xa5);
    for (uint64_t pfn = 300; pfn < 450; pfn++)
        vm_writes(pfn, 0x5a);
}

static void teardown(void)
{
    colocache_close(cc);
    munmap(image, LEN);
    close(control_fd);
    close(guest_fd);
    close(cache_fd);
}

static uint64_t private_pages(void)
{
    uint64_t n = 99;
    CHECK_RC(0, colocache_private_bytes(0, vm, LEN, &n));
    return n / PAGE;
}

static void take_over(void)
{
    CHECK_RC(0, colocache_failover(cc, NULL));
}

static void a_machine_that_took_over_goes_on_on_one_image(void)
{
    setup(COLOCACHE_MEMORY_BOUNDED);
    take_over();
    uint64_t folded = 0, private = private_pages();
    for (uint64_t first = 0, n; first < PAGES; first += n) {
        uint64_t n_bytes = 99;
        n = PAGES - first < 70 ? PAGES - first : 70;
        CHECK_RC(0, colocache_fold(cc, 0, first, n, &n_bytes));
        folded += n_bytes / PAGE;
        CHECK(memcmp(vm, oracle, LEN) == 0); /* at every moment, folded or not yet */
        CHECK_EQ(private - n_bytes / PAGE, private_pages());
        vm_writes(first, 0x77); /* the VM runs in between, here and there */
        if (first + n < PAGES)
            vm_writes(first + n, 0x78);
        private = private_pages();
    }
    CHECK(folded >= PAGES / 3);
    CHECK_EQ(0, private_pages());
    CHECK(memcmp(image, oracle, LEN) == 0);
    vm_writes(5, 0x33);
    CHECK_EQ(0x33, image[5 * PAGE]);
    CHECK_EQ(0, private_pages());
    teardown();
}

static void the_newest_epoch_is_not_written_over_before_a_takeover(void)
{
    setup(COLOCACHE_MEMORY_BOUNDED);
    uint64_t n_bytes = 99;
    CHECK_RC(COLOCACHE_E_ORDER, colocache_fold(cc, 0, 0, PAGES, &n_bytes));
    CHECK_EQ(0, n_bytes);
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        REQUIRE(image[pfn * PAGE] == pfn % 100 + 1);
    CHECK(memcmp(vm, oracle, LEN) == 0);
    teardown();
}

static void an_image_that_takes_no_more_costs_the_machine_nothing(void)
{
    setup(COLOCACHE_MEMORY_BOUNDED);
    take_over();
    const uint64_t before = private_pages();
    REQUIRE(fcntl(guest_fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0);
    uint64_t n_bytes = 99;
    CHECK_RC(-EPERM, colocache_fold(cc, 0, 0, PAGES, &n_bytes));
    CHECK_EQ(0, n_bytes);
    CHECK_EQ(before, private_pages());
    CHECK(memcmp(vm, oracle, LEN) == 0);
    vm_writes(7, 0x11);
    teardown();
}

static void pages_of_another_process_are_written_back(void)
{
    int ready[2];
    setup(COLOCACHE_MEMORY_BOUNDED);
    REQUIRE(pipe(ready) == 0);
    pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        memset(vm, 0xcc, 2 * PAGE); /* its own from now on */
        memset(vm + 500 * PAGE, 0xcd, 100 * PAGE);
        (void)!write(ready[1], "x", 1);
        for (;;)
            pause();
    }
    char byte;
    uint64_t n_bytes = 0, theirs = 0;
    REQUIRE(read(ready[0], &byte, 1) == 1);
    CHECK_RC(0, colocache_private_bytes((int)pid, vm, LEN, &theirs));
    CHECK_RC(0, colocache_private_write_back((int)pid, vm, LEN, guest_fd, OFFSET, &n_bytes));
    CHECK_EQ(theirs, n_bytes);
    memset(oracle, 0xcc, 2 * PAGE);
    memset(oracle + 500 * PAGE, 0xcd, 100 * PAGE);
    CHECK(memcmp(image, oracle, LEN) == 0);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    CHECK_RC(-ENOENT, colocache_private_write_back((int)pid, vm, LEN, guest_fd, OFFSET, &n_bytes));
    close(ready[0]);
    close(ready[1]);
    teardown();
}

static void what_can_t_be_folded_is_refused(void)
{
    uint64_t n;
    setup(COLOCACHE_MEMORY_BOUNDED);
    take_over();
    CHECK_RC(COLOCACHE_E_RANGE, colocache_fold(cc, 0, 1, PAGES, &n));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_fold(cc, 1, 0, 1, &n));
    CHECK_RC(0, colocache_fold(cc, 0, 5, 0, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_write_back(0, vm, LEN, guest_fd, OFFSET, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_write_back(-1, vm, LEN, guest_fd, OFFSET, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_write_back(0, vm, LEN, -1, OFFSET, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_write_back(0, vm, LEN, guest_fd, UINT64_MAX, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_private_write_back(0, vm + 1, LEN, guest_fd, OFFSET, &n));
    teardown();
    setup(COLOCACHE_MEMORY_MIRROR);
    take_over();
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_fold(cc, 0, 0, PAGES, &n));
    teardown();
}

int main(void)
{
    RUN(a_machine_that_took_over_goes_on_on_one_image);
    RUN(the_newest_epoch_is_not_written_over_before_a_takeover);
    RUN(an_image_that_takes_no_more_costs_the_machine_nothing);
    RUN(pages_of_another_process_are_written_back);
    RUN(what_can_t_be_folded_is_refused);
    return DONE();
}
