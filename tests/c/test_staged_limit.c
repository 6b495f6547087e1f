/* SPDX-License-Identifier: Apache-2.0 */
/* test_staged_limit.c -- bounded memory: staged pages take what they may and no more, whichever way they come. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

#define PAGE 4096u
#define PAGES 200u
#define LEN ((uint64_t)PAGES * PAGE)

static int control_fd, guest_fd, cache_fd;
static struct colocache *cc;

static int file(const char *name, uint64_t n_bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0);
    return fd;
}

static void setup(uint32_t memory_mode)
{
    control_fd = file("control", 0);
    guest_fd = file("guest", LEN);
    cache_fd = file("cache", LEN);
    const struct colocache_options opts = {
        .struct_size = sizeof opts, .n_threads = 2, .device_state_max_bytes = PAGE, .memory_mode = memory_mode};
    const struct colocache_images ram = {
        .struct_size = sizeof ram, .name = "ram", .len_bytes = LEN, .page_size = PAGE, .guest_fd = guest_fd, .cache_fd = cache_fd};
    REQUIRE(colocache_create(control_fd, &opts, &cc) == 0);
    REQUIRE(colocache_add_block(cc, &ram, NULL) == 0);
}

static void teardown(void)
{
    colocache_close(cc);
    close(control_fd);
    close(guest_fd);
    close(cache_fd);
}

/* staged -- pages, as the kernel counts them */
static uint64_t staged(void)
{
    struct stat st;
    REQUIRE(fstat(cache_fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512 / PAGE;
}

static void commit(uint64_t epoch)
{
    const struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT};
    void *state;
    CHECK_RC(0, colocache_device_state_begin(cc, epoch, 0, &state));
    CHECK_RC(0, colocache_seal(cc, &args, NULL));
    CHECK_RC(0, colocache_flush(cc, NULL));
    CHECK_RC(0, colocache_loaded(cc, 1));
}

static int receive_page(uint64_t epoch, uint64_t pfn)
{
    static const uint8_t page[PAGE] = {1};
    return colocache_receive_page(cc, epoch, 0, pfn, page, PAGE);
}

/* stream_pages -- the pages from `first` on as a packet, through a socket */
static int stream_pages(uint64_t epoch, uint64_t first, uint64_t n)
{
    uint8_t *memory = calloc(PAGES, PAGE);
    struct colocache_sender *sender;
    int pair[2];
    uint8_t header[COLOCACHE_HEADER_BYTES];
    REQUIRE(memory && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    memset(memory, 9, LEN);
    REQUIRE(colocache_sender_create(&sender) == 0);
    REQUIRE(colocache_sender_add_block(sender, "ram", memory, LEN, PAGE, NULL) == 0);
    REQUIRE(colocache_sender_mark_dirty(sender, 0, first, n) == 0);
    REQUIRE(colocache_sender_send(sender, pair[0], 1000, epoch, 0, 1, 0, NULL) == 0);
    close(pair[0]);
    int rc = colocache_receive_stream(cc, pair[1], 1000, epoch, header, NULL);
    close(pair[1]);
    colocache_sender_close(sender);
    free(memory);
    return rc;
}

static void a_limit_refuses_the_page_that_would_pass_it(void)
{
    void *addr;
    setup(COLOCACHE_MEMORY_BOUNDED);
    CHECK_RC(0, colocache_limit_staged(cc, PAGE)); /* the initial copy stages nothing */
    for (uint64_t pfn = 0; pfn < PAGES; pfn++)
        CHECK_RC(0, receive_page(1, pfn));
    commit(1);
    CHECK_RC(0, colocache_limit_staged(cc, 3 * PAGE));
    for (uint64_t pfn = 62; pfn < 65; pfn++)
        CHECK_RC(0, receive_page(2, pfn));
    CHECK_RC(0, receive_page(2, 63)); /* again: it takes nothing more */
    CHECK_RC(COLOCACHE_E_NO_MEMORY, receive_page(2, 65));
    CHECK_RC(COLOCACHE_E_NO_MEMORY, colocache_receive_begin(cc, 2, 0, 65, 2, &addr));
    CHECK_RC(COLOCACHE_E_NO_MEMORY, stream_pages(2, 64, 2));
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 100, 50));
    CHECK_EQ(3, staged());
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 63, 1)); /* a page of zeros gives its place to another */
    CHECK_RC(0, receive_page(2, 65));
    CHECK_RC(COLOCACHE_E_NO_MEMORY, receive_page(2, 66));
    CHECK_EQ(3, staged());
    CHECK_RC(0, colocache_abort(cc, 2, "the limit")); /* gives all of it back */
    CHECK_EQ(0, staged());
    for (uint64_t pfn = 0; pfn < 3; pfn++)
        CHECK_RC(0, receive_page(3, pfn));
    CHECK_RC(COLOCACHE_E_NO_MEMORY, receive_page(3, 3));
    commit(3);
    CHECK_RC(0, receive_page(4, 7)); /* so does a committed epoch */
    CHECK_RC(COLOCACHE_E_NO_MEMORY, colocache_receive_begin(cc, 4, 0, 8, 3, &addr));
    CHECK_EQ(1, staged());
    CHECK_RC(0, colocache_limit_staged(cc, 0));
    CHECK_RC(0, colocache_receive_begin(cc, 4, 0, 8, 3, &addr));
    CHECK_RC(0, colocache_receive_done(cc, 4, 0, 8, 3, 1));
    CHECK_EQ(4, staged());
    teardown();
}

static void a_mirror_has_no_such_limit(void)
{
    setup(COLOCACHE_MEMORY_MIRROR);
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_limit_staged(cc, PAGE));
    teardown();
}

int main(void)
{
    RUN(a_limit_refuses_the_page_that_would_pass_it);
    RUN(a_mirror_has_no_such_limit);
    return DONE();
}
