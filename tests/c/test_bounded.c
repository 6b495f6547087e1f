/* SPDX-License-Identifier: Apache-2.0 */
/* test_bounded.c -- bounded memory: one image and the pages of the open epoch; what the VM writes is private until it is forgotten. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

#define PAGE 4096u
#define PAGES 200u
#define LEN ((uint64_t)PAGES * PAGE)

static int control_fd, guest_fd, cache_fd;
static uint8_t *image; /* guest RAM, as everybody but the VM sees it */
static uint8_t *vm;    /* where the library says the VM has it */
static struct colocache *cc;
static struct colocache_recovery report;

static int file(const char *name, uint64_t n_bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0);
    return fd;
}

static struct colocache_options options(uint32_t memory_mode)
{
    return (struct colocache_options){
        .struct_size = sizeof(struct colocache_options), .n_threads = 2, .device_state_max_bytes = PAGE, .memory_mode = memory_mode};
}

static struct colocache_images images(uint32_t page_size)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = "ram",
                                     .len_bytes = LEN,
                                     .page_size = page_size,
                                     .guest_fd = guest_fd,
                                     .cache_fd = cache_fd};
}

static void find_vm(void)
{
    struct colocache_block_info info;
    REQUIRE(colocache_get_block(cc, 0, &info) == 0);
    vm = info.guest_addr;
}

static void files(void)
{
    control_fd = file("control", 0);
    guest_fd = file("guest", LEN);
    cache_fd = file("cache", LEN);
    image = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, guest_fd, 0);
    REQUIRE(image != MAP_FAILED);
}

static void setup(uint32_t page_size)
{
    struct colocache_options bounded = options(COLOCACHE_MEMORY_BOUNDED);
    files();
    struct colocache_images ram = images(page_size);
    REQUIRE(colocache_create(control_fd, &bounded, &cc) == 0);
    REQUIRE(colocache_add_block(cc, &ram, NULL) == 0);
    find_vm();
}

static int attach(uint32_t memory_mode)
{
    struct colocache_options opts = options(memory_mode);
    struct colocache_images ram = images(PAGE);
    colocache_close(cc);
    cc = NULL;
    int rc = colocache_attach(control_fd, &opts, &ram, 1, &report, &cc);
    if (rc == 0)
        find_vm();
    return rc;
}

static void teardown(void)
{
    colocache_close(cc);
    cc = NULL;
    munmap(image, LEN);
    close(control_fd);
    close(guest_fd);
    close(cache_fd);
}

static uint64_t blocks_of(int fd)
{
    struct stat st;
    REQUIRE(fstat(fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512 / PAGE;
}

static uint64_t staged(void)
{
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(cc, &status));
    CHECK_EQ(blocks_of(cache_fd) * PAGE, status.staged_bytes);
    CHECK_EQ(COLOCACHE_MEMORY_BOUNDED, status.memory_mode);
    return status.staged_bytes / PAGE;
}

static uint64_t private_pages(void)
{
    uint64_t n_bytes = 0;
    CHECK_RC(0, colocache_private_bytes(0, vm, LEN, &n_bytes));
    return n_bytes / PAGE;
}

static void receive(uint64_t epoch, uint64_t pfn, int byte)
{
    static uint8_t page[PAGE];
    memset(page, byte, sizeof page);
    CHECK_RC(0, colocache_receive_page(cc, epoch, 0, pfn, page, PAGE));
}

/* holds -- both halves of a page: what the image has and what the VM sees */
static void holds(uint64_t pfn, int byte)
{
    for (int half = 0; half < 2; half++) {
        uint64_t at = pfn * PAGE + (half ? PAGE - 1 : 0);
        CHECK_EQ(byte, image[at]);
        CHECK_EQ(byte, vm[at]);
    }
}

static int try_seal(uint64_t epoch, int (*check)(void *, const void *, uint64_t), struct colocache_seal_result *out)
{
    void *state;
    CHECK_RC(0, colocache_device_state_begin(cc, epoch, 0, &state));
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT, .check = check};
    return colocache_seal(cc, &args, out);
}

static uint64_t checkpoint(uint64_t epoch)
{
    struct colocache_seal_result sealed = {.struct_size = sizeof sealed};
    struct colocache_flush_result flushed = {.struct_size = sizeof flushed};
    CHECK_RC(0, try_seal(epoch, NULL, &sealed));
    CHECK_RC(0, colocache_flush(cc, &flushed));
    CHECK_EQ(sealed.flush_pages, flushed.n_pages);
    CHECK_EQ(sealed.flush_pages * PAGE, flushed.n_bytes);
    CHECK_EQ(0, sealed.svm_pages + sealed.both_pages);
    CHECK(flushed.forget_ns > 0);
    CHECK_RC(0, colocache_validate(cc, 1));
    CHECK_RC(0, colocache_loaded(cc, 1));
    CHECK_EQ(0, private_pages());
    return sealed.flush_pages;
}

static void initial(void)
{
    setup(PAGE);
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        receive(1, pfn, 1);
    checkpoint(1);
}

/* ---- the promises ------------------------------------------------------------------------------------------------ */

static void the_initial_copy_takes_no_second_image(void)
{
    uint64_t n = 99, words[4];
    setup(PAGE);
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        receive(1, pfn, 1);
    CHECK_RC(0, colocache_receive_zero(cc, 1, 0, 3, 2));
    CHECK_EQ(0, staged());
    CHECK_RC(0, colocache_get_bitmap(cc, 0, COLOCACHE_BITMAP_PVM, words, 4));
    CHECK_EQ(0, words[0] | words[1] | words[2] | words[3]);
    CHECK_RC(0, colocache_preflush(cc, &n));
    CHECK_EQ(0, n);
    CHECK_EQ(0, checkpoint(1));
    holds(2, 1);
    holds(3, 0);
    holds(4, 0);
    CHECK_EQ(0, staged());
    teardown();
}

static void a_page_takes_memory_only_until_its_epoch_is_committed(void)
{
    initial();
    receive(2, 5, 2);
    receive(2, 5, 3); /* the same once more */
    receive(2, 77, 2);
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 100, 90));
    CHECK_EQ(2, staged());
    CHECK_EQ(92, checkpoint(2));
    CHECK_EQ(2, staged());
    CHECK_RC(0, colocache_free_staged(cc));
    CHECK_EQ(0, staged());
    CHECK_RC(0, colocache_free_staged(cc)); /* nothing left to do */
    holds(5, 3);
    holds(100, 0);
    holds(189, 0);
    holds(190, 1);
    receive(3, 6, 4);
    CHECK_RC(0, colocache_free_staged(cc)); /* an epoch is open: it is not touched */
    CHECK_EQ(1, staged());
    checkpoint(3);
    holds(6, 4);
    teardown();
}

static void the_next_epoch_finds_an_empty_cache(void)
{
    initial();
    for (uint64_t pfn = 0; pfn < 50; pfn++)
        receive(2, pfn, 2);
    checkpoint(2);
    CHECK_RC(0, colocache_receive_zero(cc, 3, 0, 7, 1)); /* page 7 of epoch 2 must not show under its bit */
    CHECK_EQ(0, staged());
    CHECK_EQ(1, checkpoint(3));
    holds(7, 0);
    holds(8, 2);
    teardown();
}

static void zeros_and_bytes_of_one_page_in_any_order(void)
{
    initial();
    receive(2, 10, 5);
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 9, 3));
    receive(2, 11, 6);
    CHECK_EQ(3, checkpoint(2));
    CHECK_EQ(1, staged()); /* no hole was filled by reading it */
    holds(9, 0);
    holds(10, 0);
    holds(11, 6);
    teardown();
}

static void what_the_vm_writes_never_reaches_the_image(void)
{
    initial();
    for (uint64_t pfn = 0; pfn < PAGES; pfn += 3)
        vm[pfn * PAGE] = 0xEE;
    CHECK_RC(0, colocache_mark_dirty(cc, 0, 0, PAGES)); /* nothing to remember */
    uint64_t words[4] = {~0ull, ~0ull, ~0ull, 0xff};
    CHECK_RC(0, colocache_sync_words(cc, 0, 0, PAGES, words));
    CHECK_RC(COLOCACHE_E_RANGE, colocache_mark_dirty(cc, 0, PAGES, 1));
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        CHECK_EQ(1, image[pfn * PAGE]);
    CHECK_EQ((PAGES + 2) / 3, private_pages());
    receive(2, 1, 2);
    receive(2, 3, 2); /* both wrote page 3 */
    CHECK_EQ(1, image[3 * PAGE]);
    CHECK_EQ(2, checkpoint(2));
    holds(0, 1);
    holds(1, 2);
    holds(3, 2);
    holds(6, 1);
    teardown();
}

static int refuse(void *context, const void *state, uint64_t len_bytes)
{
    (void)context, (void)state, (void)len_bytes;
    return 1;
}

static void an_epoch_given_up_leaves_nothing(void)
{
    initial();
    vm[20 * PAGE] = 9;
    receive(2, 5, 2);
    CHECK_RC(0, colocache_abort(cc, 2, "test"));
    CHECK_EQ(0, staged());
    receive(3, 6, 3);
    CHECK_RC(COLOCACHE_E_VETO, try_seal(3, refuse, NULL));
    CHECK_EQ(0, staged());
    CHECK_EQ(9, vm[20 * PAGE]); /* the VM goes on as it was */
    CHECK_EQ(1, image[20 * PAGE]);
    receive(4, 7, 4);
    CHECK_EQ(1, checkpoint(4));
    holds(5, 1);
    holds(6, 1);
    holds(7, 4);
    holds(20, 1);
    teardown();
}

static void whenever_it_dies_it_restarts_from_the_newest_epoch(void)
{
    initial();
    vm[8 * PAGE] = 9;
    receive(2, 5, 2);
    CHECK_RC(0, attach(COLOCACHE_MEMORY_BOUNDED)); /* pages of a newer epoch had come */
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, report.action);
    CHECK_EQ(1, report.epoch);
    CHECK_EQ(2, report.receiving_epoch);
    CHECK_EQ(0, report.n_pages);
    CHECK_EQ(0, staged());
    holds(5, 1);
    holds(8, 1);
    receive(3, 5, 3);
    CHECK_RC(0, colocache_receive_zero(cc, 3, 0, 6, 1));
    CHECK_RC(0, try_seal(3, NULL, NULL));
    CHECK_RC(0, attach(COLOCACHE_MEMORY_BOUNDED)); /* sealed, not flushed */
    CHECK_EQ(COLOCACHE_RECOVERED_REPLAYED, report.action);
    CHECK_EQ(2, report.n_pages);
    holds(5, 3);
    holds(6, 0);
    CHECK_EQ(0, staged());
    uint64_t epoch;
    CHECK_RC(0, colocache_failover(cc, &epoch));
    CHECK_EQ(3, epoch);
    CHECK_RC(COLOCACHE_E_FAILED_OVER, attach(COLOCACHE_MEMORY_BOUNDED));
    teardown();
}

static void nothing_sealed_begins_again(void)
{
    setup(PAGE);
    receive(1, 5, 2);
    CHECK_RC(0, attach(COLOCACHE_MEMORY_BOUNDED));
    CHECK_EQ(COLOCACHE_RECOVERED_NOTHING, report.action);
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        receive(2, pfn, 4);
    checkpoint(2);
    holds(5, 4);
    teardown();
}

static void each_memory_mode_is_attached_to_as_itself(void)
{
    initial();
    CHECK_RC(COLOCACHE_E_MEMORY_MODE, attach(COLOCACHE_MEMORY_MIRROR));
    CHECK(strstr(colocache_last_error(), "attach with bounded") != NULL);
    CHECK_RC(0, attach(COLOCACHE_MEMORY_BOUNDED));
    CHECK_RC(COLOCACHE_E_ARGUMENT, attach(7));
    teardown();
}

/* A VMM that maps guest RAM itself: what it gave is kept and forgotten, and must be of the right kind. */
static void a_mapping_of_the_vmm_is_taken_if_it_is_private(void)
{
    struct colocache_options bounded = options(COLOCACHE_MEMORY_BOUNDED);
    files();
    uint8_t *own = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE, guest_fd, 0);
    REQUIRE(own != MAP_FAILED);
    struct colocache_images ram = images(PAGE);
    REQUIRE(colocache_create(control_fd, &bounded, &cc) == 0);
    ram.guest_addr = image;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &ram, NULL));
    CHECK(strstr(colocache_last_error(), "MAP_PRIVATE") != NULL);
    ram.guest_addr = own;
    CHECK_RC(0, colocache_add_block(cc, &ram, NULL));
    find_vm();
    CHECK(vm == own);
    CHECK_EQ(0, private_pages()); /* asking made no copy */
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        receive(1, pfn, 1);
    checkpoint(1);
    own[0] = 7;
    receive(2, 1, 2);
    checkpoint(2);
    holds(0, 1);
    holds(1, 2);
    teardown();
    CHECK_EQ(1, own[0]); /* still mapped: it is the caller's */
    munmap(own, LEN);
}

static void what_can_not_be_bounded_is_refused_with_the_reason(void)
{
    struct colocache_options bounded = options(COLOCACHE_MEMORY_BOUNDED);
    static uint8_t memory[2][PAGE] __attribute__((aligned(PAGE)));
    files();
    REQUIRE(colocache_create(control_fd, &bounded, &cc) == 0);
    struct colocache_images ram = images(PAGE);
    ram.flags = COLOCACHE_IMAGES_SHARED_ELSEWHERE;
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_add_block(cc, &ram, NULL));
    CHECK(strstr(colocache_last_error(), "another process") != NULL);
    ram = images(PAGE);
    ram.guest_fd = ram.cache_fd = -1;
    ram.guest_addr = memory[0];
    ram.cache_addr = memory[1];
    ram.len_bytes = PAGE;
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_add_block(cc, &ram, NULL));
    CHECK(strstr(colocache_last_error(), "by address") != NULL);
    ram = images(PAGE);
    ram.len_bytes = LEN / 2;
    ram.cache_fd = guest_fd;
    ram.cache_offset = LEN / 2;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &ram, NULL));
    CHECK(strstr(colocache_last_error(), "file of its own") != NULL);
    teardown();
}

static void hugetlb_is_refused_with_the_reason(void)
{
    struct colocache_options bounded = options(COLOCACHE_MEMORY_BOUNDED);
    files();
    int huge = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
    if (huge < 0 || ftruncate(huge, 2 << 20) != 0) {
        close(huge);
        teardown();
        SKIP("this kernel has no hugetlb");
    }
    REQUIRE(colocache_create(control_fd, &bounded, &cc) == 0);
    struct colocache_images ram = images(PAGE);
    ram.guest_fd = huge;
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_add_block(cc, &ram, NULL));
    CHECK(strstr(colocache_last_error(), "hugetlb") != NULL);
    close(huge);
    teardown();
}

static void larger_pages_are_staged_whole(void)
{
    enum { LARGE = 16384 };
    static uint8_t page[LARGE];
    setup(LARGE);
    for (uint64_t pfn = 0; pfn < LEN / LARGE; pfn++) {
        memset(page, 1, sizeof page);
        CHECK_RC(0, colocache_receive_page(cc, 1, 0, pfn, page, LARGE));
    }
    CHECK_RC(0, try_seal(1, NULL, NULL));
    CHECK_RC(0, colocache_flush(cc, NULL));
    CHECK_RC(0, colocache_loaded(cc, 1));
    memset(page, 2, sizeof page);
    CHECK_RC(0, colocache_receive_page(cc, 2, 0, 3, page, LARGE));
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 4, 1));
    CHECK_EQ(LARGE / PAGE, staged());
    CHECK_RC(0, try_seal(2, NULL, NULL));
    CHECK_RC(0, colocache_flush(cc, NULL));
    CHECK_RC(0, colocache_loaded(cc, 1));
    holds(3 * LARGE / PAGE - 1, 1);
    holds(3 * LARGE / PAGE, 2);
    holds(4 * LARGE / PAGE - 1, 2);
    holds(4 * LARGE / PAGE, 0);
    holds(5 * LARGE / PAGE, 1);
    teardown();
}

/* An older program's struct of images, which ends before `flags`. */
static void images_of_an_older_program_are_taken(void)
{
    struct colocache_options mirror = options(COLOCACHE_MEMORY_MIRROR);
    files();
    REQUIRE(colocache_create(control_fd, &mirror, &cc) == 0);
    struct colocache_images ram = images(PAGE);
    ram.struct_size = offsetof(struct colocache_images, flags);
    ram.flags = 0xffffffff;
    CHECK_RC(0, colocache_add_block(cc, &ram, NULL));
    teardown();
}

int main(void)
{
    RUN(the_initial_copy_takes_no_second_image);
    RUN(a_page_takes_memory_only_until_its_epoch_is_committed);
    RUN(the_next_epoch_finds_an_empty_cache);
    RUN(zeros_and_bytes_of_one_page_in_any_order);
    RUN(what_the_vm_writes_never_reaches_the_image);
    RUN(an_epoch_given_up_leaves_nothing);
    RUN(whenever_it_dies_it_restarts_from_the_newest_epoch);
    RUN(nothing_sealed_begins_again);
    RUN(each_memory_mode_is_attached_to_as_itself);
    RUN(a_mapping_of_the_vmm_is_taken_if_it_is_private);
    RUN(what_can_not_be_bounded_is_refused_with_the_reason);
    RUN(hugetlb_is_refused_with_the_reason);
    RUN(larger_pages_are_staged_whole);
    RUN(images_of_an_older_program_are_taken);
    return DONE();
}
