/* SPDX-License-Identifier: Apache-2.0 */
/* test_spill.c -- bounded memory: what the limit of staged pages has no room for lies in a file, whichever way it came, and comes back. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"

#define PAGE 4096u
#define PAGES 300u
#define LEN ((uint64_t)PAGES * PAGE)
#define LIMIT 8u

static int control_fd, guest_fd, cache_fd, spill_fd;
static struct colocache *cc;
static uint8_t ram[PAGES][PAGE]; /* what the primary has */

static int file(const char *name, uint64_t n_bytes)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    REQUIRE(fd >= 0 && ftruncate(fd, (off_t)n_bytes) == 0);
    return fd;
}

static struct colocache_options options(int spill)
{
    return (struct colocache_options){.struct_size = sizeof(struct colocache_options),
                                      .n_threads = 2,
                                      .device_state_max_bytes = PAGE,
                                      .memory_mode = COLOCACHE_MEMORY_BOUNDED,
                                      .spill_fd = spill};
}

static struct colocache_images images(void)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = "ram",
                                     .len_bytes = LEN,
                                     .page_size = PAGE,
                                     .guest_fd = guest_fd,
                                     .cache_fd = cache_fd};
}

static int attach(int spill)
{
    const struct colocache_options opts = options(spill);
    const struct colocache_images ram_images = images();
    int rc = colocache_attach(control_fd, &opts, &ram_images, 1, NULL, &cc);
    return rc ? rc : colocache_limit_staged(cc, LIMIT * PAGE);
}

static int seal(uint64_t epoch)
{
    const struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch, .n_pages = COLOCACHE_ANY_COUNT};
    void *state;
    CHECK_RC(0, colocache_device_state_begin(cc, epoch, 0, &state));
    return colocache_seal(cc, &args, NULL);
}

static void commit(uint64_t epoch, uint64_t spilled)
{
    struct colocache_flush_result flushed = {.struct_size = sizeof flushed};
    CHECK_RC(0, seal(epoch));
    CHECK_RC(0, colocache_flush(cc, &flushed));
    CHECK_EQ(spilled, flushed.spilled_pages);
    CHECK_RC(0, colocache_loaded(cc, 1));
}

static uint64_t spilled(void)
{
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(cc, &status));
    return status.spilled_bytes / PAGE;
}

/* staged -- pages in memory, as the kernel counts them */
static uint64_t staged(void)
{
    struct stat st;
    REQUIRE(fstat(cache_fd, &st) == 0);
    return (uint64_t)st.st_blocks * 512 / PAGE;
}

static void write_ram(uint64_t first, uint64_t n, int byte)
{
    for (uint64_t pfn = first; pfn < first + n; pfn++)
        memset(ram[pfn], byte + (int)(pfn % 7), PAGE);
}

static int receive(uint64_t epoch, uint64_t first, uint64_t n)
{
    uint64_t pfns[PAGES];
    for (uint64_t i = 0; i < n; i++)
        pfns[i] = first + i;
    return colocache_receive_pages(cc, epoch, 0, pfns, n, ram[first], n * PAGE);
}

/* stream -- the pages from `first` on through a socket, by somebody who needs no reader: what is sent fits the socket */
static int stream(uint64_t epoch, uint64_t first, uint64_t n)
{
    struct colocache_sender *sender;
    int pair[2], room = 4 << 20;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    REQUIRE(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof room) == 0);
    REQUIRE(colocache_sender_create(&sender) == 0);
    REQUIRE(colocache_sender_add_block(sender, "ram", ram, LEN, PAGE, NULL) == 0);
    for (uint64_t i = 0; i < n; i += 3) /* runs of two */
        REQUIRE(colocache_sender_mark_dirty(sender, 0, first + i, 2) == 0);
    REQUIRE(colocache_sender_send(sender, pair[0], 1000, epoch, 0, 1, 0, NULL) == 0);
    colocache_message_header(header, 1, epoch, 0, 0, 0);
    REQUIRE(send(pair[0], header, sizeof header, 0) == sizeof header);
    int rc = colocache_receive_stream(cc, pair[1], 1000, epoch, header, NULL);
    close(pair[0]);
    close(pair[1]);
    colocache_sender_close(sender);
    return rc;
}

static void guest_is_ram(void)
{
    struct colocache_block_info info;
    REQUIRE(colocache_get_block(cc, 0, &info) == 0);
    CHECK_EQ(0, memcmp(info.guest_addr, ram, LEN));
}

static void setup(void)
{
    char path[] = "/tmp/colocache-spill-XXXXXX";
    control_fd = file("control", 0);
    guest_fd = file("guest", LEN);
    cache_fd = file("cache", LEN);
    spill_fd = mkstemp(path);
    REQUIRE(spill_fd >= 0 && unlink(path) == 0);
    const struct colocache_options opts = options(spill_fd);
    const struct colocache_images ram_images = images();
    REQUIRE(colocache_create(control_fd, &opts, &cc) == 0);
    REQUIRE(colocache_add_block(cc, &ram_images, NULL) == 0);
    CHECK_RC(0, colocache_limit_staged(cc, LIMIT * PAGE));
    write_ram(0, PAGES, 1);
    CHECK_RC(0, receive(1, 0, PAGES));
    CHECK_EQ(0, spilled()); /* the initial copy goes to guest RAM */
    commit(1, 0);
}

static void teardown(void)
{
    colocache_close(cc);
    close(control_fd);
    close(guest_fd);
    close(cache_fd);
    close(spill_fd);
}

static void an_epoch_larger_than_the_limit_is_spilled_and_loses_no_page(void)
{
    setup();
    write_ram(0, 200, 40);
    for (uint64_t pfn = 0; pfn < 100; pfn++)
        CHECK_RC(0, receive(2, pfn, 1));
    CHECK_EQ(LIMIT, staged());
    CHECK_EQ(100 - LIMIT, spilled());
    CHECK_RC(0, stream(2, 100, 99));
    CHECK_RC(0, receive(2, 100, 100)); /* what the stream left out, and the rest again */
    CHECK_EQ(LIMIT, staged());
    CHECK_EQ(200 - LIMIT, spilled());
    commit(2, 200 - LIMIT);
    guest_is_ram();
    CHECK_RC(0, colocache_free_staged(cc));
    CHECK_EQ(0, staged() + spilled());
    CHECK_EQ(0, lseek(spill_fd, 0, SEEK_END));
    teardown();
}

static void the_newest_bytes_of_a_page_win_wherever_older_ones_are(void)
{
    setup();
    write_ram(0, 20, 50);
    CHECK_RC(0, receive(2, 0, LIMIT));  /* in memory */
    CHECK_RC(0, receive(2, LIMIT, 12)); /* in the file */
    write_ram(4, 8, 90);
    CHECK_RC(0, receive(2, 4, 8)); /* half of it is in memory: it goes into the file */
    memset(ram[0], 0, 2 * PAGE);
    memset(ram[15], 0, PAGE);
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 0, 2));
    CHECK_RC(0, colocache_receive_zero(cc, 2, 0, 15, 1));
    write_ram(19, 1, 77);
    CHECK_RC(0, receive(2, 19, 1)); /* there is room in memory again */
    write_ram(10, 1, 78);
    CHECK_RC(0, stream(2, 10, 1));
    commit(2, 14);
    guest_is_ram();
    teardown();
}

static void what_is_received_in_place_is_not_spilled(void)
{
    void *addr;
    setup();
    CHECK_RC(COLOCACHE_E_NO_MEMORY, colocache_receive_begin(cc, 2, 0, 3, LIMIT + 1, &addr));
    write_ram(20, 1, 60);
    CHECK_RC(0, receive(2, 0, LIMIT + 2));
    CHECK_EQ(LIMIT + 2, spilled()); /* a run is not cut */
    CHECK_RC(0, colocache_receive_begin(cc, 2, 0, 3, 2, &addr));
    write_ram(3, 2, 61);
    memcpy(addr, ram[3], 2 * PAGE);
    CHECK_RC(0, colocache_receive_done(cc, 2, 0, 3, 2, 1)); /* newer than what is in the file */
    CHECK_RC(0, receive(2, 20, 1));
    commit(2, LIMIT);
    guest_is_ram();
    teardown();
}

static void an_epoch_that_is_given_up_leaves_nothing_in_the_file(void)
{
    setup();
    uint8_t before[PAGE];
    memcpy(before, ram[0], PAGE);
    write_ram(0, 30, 70);
    CHECK_RC(0, receive(2, 0, 30));
    CHECK_RC(0, colocache_abort(cc, 2, "test"));
    CHECK_EQ(0, spilled());
    CHECK_EQ(0, lseek(spill_fd, 0, SEEK_END));
    CHECK_RC(0, receive(3, 0, 30));
    commit(3, 30);
    guest_is_ram();
    teardown();
}

static void a_file_that_is_full_costs_the_epoch_and_nothing_else(void)
{
    const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY}, full = {20 * PAGE, RLIM_INFINITY};
    setup();
    write_ram(0, 60, 80);
    REQUIRE(signal(SIGXFSZ, SIG_IGN) != SIG_ERR && setrlimit(RLIMIT_FSIZE, &full) == 0); /* EFBIG, as from a disk without room */
    CHECK_RC(0, receive(2, 0, LIMIT));
    CHECK_RC(0, receive(2, LIMIT, 4));
    CHECK_RC(COLOCACHE_E_NO_MEMORY, receive(2, 20, 20));
    REQUIRE(strstr(colocache_last_error(), "spill file has no room") != NULL);
    CHECK_RC(0, colocache_abort(cc, 2, "no room"));
    CHECK_EQ(0, spilled());
    REQUIRE(setrlimit(RLIMIT_FSIZE, &none) == 0);
    CHECK_RC(0, receive(3, 0, 60));
    commit(3, 60);
    guest_is_ram();
    teardown();
}

/* sealed -- epoch 2 is, with pages in the file, and its process is gone */
static void sealed(void)
{
    struct colocache_status status = {.struct_size = sizeof status};
    setup();
    write_ram(0, 30, 100);
    CHECK_RC(0, receive(2, 0, 30));
    CHECK_RC(0, seal(2));
    colocache_close(cc);
    cc = NULL;
    CHECK_RC(0, colocache_inspect(control_fd, &status, NULL, NULL));
    CHECK_EQ(30 * PAGE, status.spilled_bytes);
}

static void an_attach_brings_the_spilled_pages_of_a_sealed_epoch(void)
{
    sealed();
    CHECK_RC(0, attach(spill_fd));
    guest_is_ram();
    CHECK_EQ(0, spilled());
    CHECK_EQ(0, lseek(spill_fd, 0, SEEK_END));
    write_ram(9, 40, 110);
    CHECK_RC(0, receive(3, 9, 40));
    commit(3, 40);
    guest_is_ram();
    colocache_close(cc);
    CHECK_RC(0, attach(0)); /* committed: the file matters no more */
    teardown();
}

static void an_attach_refuses_a_spill_file_that_is_gone_another_or_not_whole(void)
{
    sealed();
    uint8_t whole[64 * PAGE], word;
    const int other = file("other", 0);
    const ssize_t n = pread(spill_fd, whole, sizeof whole, 0);
    REQUIRE(n > 0 && pwrite(other, whole, (size_t)n, 0) == n);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, attach(0));
    REQUIRE(strstr(colocache_last_error(), "epoch 2 was sealed with 30 pages in a spill file") != NULL);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, attach(other));
    REQUIRE(ftruncate(spill_fd, n - 1) == 0);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, attach(spill_fd));
    REQUIRE(ftruncate(spill_fd, 0) == 0);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, attach(spill_fd));
    word = whole[1] ^ 1;
    REQUIRE(pwrite(spill_fd, whole, (size_t)n, 0) == n && pwrite(spill_fd, &word, 1, 1) == 1);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, attach(spill_fd));
    memset(whole, 0xff, PAGE); /* bits behind the last page */
    REQUIRE(pwrite(spill_fd, whole, PAGE, 0) == PAGE);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, attach(spill_fd));
    REQUIRE(pread(other, whole, sizeof whole, 0) == n && pwrite(spill_fd, whole, (size_t)n, 0) == n); /* brought back */
    CHECK_RC(0, attach(spill_fd));
    guest_is_ram();
    close(other);
    teardown();
}

static void what_is_no_file_for_it_is_refused(void)
{
    int pipes[2], control = file("control", 0);
    struct colocache *none = NULL;
    struct colocache_options opts = options(0);
    REQUIRE(pipe(pipes) == 0);
    opts.spill_fd = pipes[0];
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(control, &opts, &none));
    CHECK_EQ(0, lseek(control, 0, SEEK_END));
    opts.spill_fd = 9999;
    CHECK_RC(-EBADF, colocache_create(control, &opts, &none));
    opts.spill_fd = control;
    opts.memory_mode = COLOCACHE_MEMORY_MIRROR;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(control, &opts, &none));
    close(pipes[0]);
    close(pipes[1]);
    close(control);
}

int main(void)
{
    RUN(an_epoch_larger_than_the_limit_is_spilled_and_loses_no_page);
    RUN(the_newest_bytes_of_a_page_win_wherever_older_ones_are);
    RUN(what_is_received_in_place_is_not_spilled);
    RUN(an_epoch_that_is_given_up_leaves_nothing_in_the_file);
    RUN(a_file_that_is_full_costs_the_epoch_and_nothing_else);
    RUN(an_attach_brings_the_spilled_pages_of_a_sealed_epoch);
    RUN(an_attach_refuses_a_spill_file_that_is_gone_another_or_not_whole);
    RUN(what_is_no_file_for_it_is_refused);
    return DONE();
}
