/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fail_memory.c -- too little memory is told as E_NO_MEMORY where memory is asked for, never as a SIGBUS in a flush.
 *
 * A tmpfs of 512 KiB in a mount namespace of its own, and huge pages that this machine does not have.  Prints one line of JSON; a part that can't
 * be had here is named in "skipped".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "colocache.h"
#include "message.h"

enum { PAGE = 4096, ROOM = 512 << 10, HUGE_PAGE = 2 << 20 };

static int n_checks;

static void check(int ok, const char *what)
{
    n_checks++;
    if (!ok) {
        fprintf(stderr, "%s: %s (errno %s)\n", what, colocache_last_error(), strerror(errno));
        exit(1);
    }
}

static int no_memory(int rc)
{
    return rc == COLOCACHE_E_NO_MEMORY && strlen(colocache_last_error()) > 20;
}

static const struct colocache_options options = {.struct_size = sizeof options, .n_threads = 1, .device_state_max_bytes = 1 << 20};

static int file(const char *name, off_t bytes)
{
    int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    check(fd >= 0 && ftruncate(fd, bytes) == 0, "a file on the small file system");
    return fd;
}

static struct colocache_images images(const char *name, int guest, int cache, uint64_t bytes, uint32_t sparse)
{
    return (struct colocache_images){.struct_size = sizeof(struct colocache_images),
                                     .name = name,
                                     .len_bytes = bytes,
                                     .page_size = PAGE,
                                     .sparse = sparse,
                                     .guest_fd = guest,
                                     .cache_fd = cache};
}

/* small_tmpfs -- in its directory already */
static void small_tmpfs(void)
{
    struct colocache *cc;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = 1, .n_pages = COLOCACHE_ANY_COUNT};
    static uint8_t page[PAGE];
    void *state;

    int control = file("control", 0), filler = file("filler", 0);
    check(posix_fallocate(filler, 0, ROOM - (64 << 10)) == 0, "filling the file system");
    check(no_memory(colocache_create(control, &options, &cc)), "create with 64 KiB of room");
    check(lseek(control, 0, SEEK_END) == 0, "a region that could not be made is empty again");
    check(ftruncate(filler, 0) == 0, "making room");
    check(colocache_create(control, &options, &cc) == 0, "create with room");

    int guest = file("guest", ROOM), cache = file("cache", ROOM);
    struct colocache_images dense = images("dense", guest, cache, ROOM, 0), sparse = images("sparse", guest, cache, ROOM, 1);
    check(no_memory(colocache_add_block(cc, &dense, NULL)), "a block larger than the file system");
    check(ftruncate(guest, 0) == 0 && ftruncate(cache, 0) == 0 && ftruncate(guest, ROOM) == 0 && ftruncate(cache, ROOM) == 0,
          "giving the images' memory back");
    check(colocache_add_block(cc, &sparse, NULL) == 0, "the same block, sparse");
    check(no_memory(colocache_device_state_begin(cc, 1, 1 << 20, &state)), "a device state larger than the file system");
    check(ftruncate(filler, ROOM) == 0, "");
    int rc = 0;
    uint64_t n = 0;
    for (; n < ROOM / PAGE && rc == 0; n++) {
        memset(page, (int)n + 1, PAGE);
        rc = colocache_receive_page(cc, 1, 0, n, page, PAGE);
    }
    check(no_memory(rc), "receiving until the file system is full");
    check(n > 10 && colocache_receive_zero(cc, 1, 0, n, 4) == 0, "zero pages into a full file system, which take nothing");
    check(colocache_device_state_begin(cc, 1, 0, &state) == 0, "a device state of no bytes");
    check(colocache_seal(cc, &args, NULL) == 0 && colocache_flush(cc, NULL) == 0 && colocache_loaded(cc, 1) == 0, "what came is an epoch");
    check(colocache_give_back(cc, 0, 0, 2) == 0, "giving back two pages");
    check(colocache_receive_page(cc, 2, 0, n + 8, page, PAGE) == 0, "a page that takes their room");
    check(colocache_device_state_begin(cc, 2, 0, &state) == 0, "epoch 2");
    args.epoch = 2;
    check(no_memory(colocache_seal(cc, &args, NULL)), "a seal whose flush would need more than there is");
    check(colocache_validate(cc, 1) == 0, "validate after it");
    colocache_close(cc);
}

/* packet_of -- a page of data for block 0, as it comes from the wire */
static uint64_t packet_of(uint8_t *out, uint64_t epoch, uint64_t pfn)
{
    const struct cc_run run = {pfn, 1, 0};
    struct cc_message message = {.type = COLOCACHE_MSG_PAGES, .epoch = epoch, .body_len_bytes = sizeof run + PAGE, .b = 1};
    memcpy(out + COLOCACHE_HEADER_BYTES, &run, sizeof run);
    memset(out + COLOCACHE_HEADER_BYTES + sizeof run, (int)pfn + 1, PAGE);
    cc_message_put(out, &message);
    message.checksum = cc_message_checksum(out, &run, sizeof run);
    cc_message_put(out, &message);
    return COLOCACHE_HEADER_BYTES + sizeof run + PAGE;
}

/* staged_in_a_small_tmpfs -- bounded memory: pages that come in memory, as they do through TLS, until there is no room */
static void staged_in_a_small_tmpfs(void)
{
    struct colocache *cc;
    struct colocache_options bounded = options;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = 1, .n_pages = COLOCACHE_ANY_COUNT};
    static uint8_t packet[2 * PAGE];
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t used, n = 0;
    void *state;
    bounded.memory_mode = COLOCACHE_MEMORY_BOUNDED;
    int control = memfd_create("control", MFD_CLOEXEC), guest = memfd_create("guest", MFD_CLOEXEC), cache = file("cache-2", 2 * ROOM);
    check(ftruncate(guest, 2 * ROOM) == 0 && posix_fallocate(guest, 0, 2 * ROOM) == 0, "a guest image elsewhere");
    struct colocache_images block = images("ram", guest, cache, 2 * ROOM, 0);
    check(colocache_create(control, &bounded, &cc) == 0 && colocache_add_block(cc, &block, NULL) == 0, "a bounded region");
    check(colocache_device_state_begin(cc, 1, 0, &state) == 0 && colocache_seal(cc, &args, NULL) == 0 && colocache_flush(cc, NULL) == 0 &&
              colocache_loaded(cc, 1) == 0,
          "epoch 1");
    int rc = COLOCACHE_READY_NOT;
    for (; n < 2 * ROOM / PAGE && rc == COLOCACHE_READY_NOT; n++)
        rc = colocache_receive_packets(cc, packet, packet_of(packet, 2, n), 2, header, &used, NULL);
    check(n > 10 && no_memory(rc), "packets in memory until the file system is full");
    check(colocache_abort(cc, 2, "no room") == 0 && colocache_free_staged(cc) == 0, "the epoch is given up");
    check(colocache_receive_packets(cc, packet, packet_of(packet, 3, n), 3, header, &used, NULL) == COLOCACHE_READY_NOT,
          "there is room again");
    colocache_close(cc);
    close(control), close(guest), close(cache);
    check(unlink("cache-2") == 0, "removing it");
}

/* refused -- a region, wherever it has holes, on a file system without a byte of room: a sentence from each call, and no SIGBUS */
static void refused(int control, const struct colocache_images *images, const char *what)
{
    struct colocache_status status = {.struct_size = sizeof status};
    struct colocache *cc = NULL;
    int rc = colocache_attach(control, &options, images, 1, NULL, &cc);
    check(rc < 0 && strlen(colocache_last_error()) > 20 && !cc, what);
    rc = colocache_inspect(control, &status, NULL, NULL);
    check(rc == 0 || strlen(colocache_last_error()) > 20, what);
}

/* holes_in_a_region -- a page of it at a time, in its directory */
static void holes_in_a_region(void)
{
    struct colocache *cc;
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = 1, .n_pages = COLOCACHE_ANY_COUNT};
    static uint8_t page[PAGE] = {7}, kept[PAGE];
    void *state;
    int control = file("region", 0), guest = file("guest-1", 4 * PAGE), cache = file("cache-1", 4 * PAGE), filler = file("filler-1", 0);
    struct colocache_images block = images("ram", guest, cache, 4 * PAGE, 0);
    check(colocache_create(control, &options, &cc) == 0 && colocache_add_block(cc, &block, NULL) == 0, "a region");
    check(colocache_receive_page(cc, 1, 0, 1, page, PAGE) == 0 && colocache_device_state_begin(cc, 1, PAGE, &state) == 0, "a page");
    memset(state, 1, PAGE);
    check(colocache_seal(cc, &args, NULL) == 0, "a seal");
    colocache_close(cc);

    struct stat st;
    check(fstat(control, &st) == 0, "fstat");
    for (off_t at = 0; at < st.st_size; at += PAGE) {
        off_t data = lseek(control, at, SEEK_DATA);
        if (data < 0)
            break;
        at = data / PAGE * PAGE;
        check(pread(control, kept, PAGE, at) == PAGE, "pread");
        check(fallocate(control, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, PAGE) == 0, "a hole");
        for (off_t room = ROOM; room >= PAGE; room /= 2) /* not a page is left */
            (void)!fallocate(filler, 0, lseek(filler, 0, SEEK_END), room);
        while (fallocate(filler, 0, lseek(filler, 0, SEEK_END), PAGE) == 0)
            ;
        refused(control, &block, "a region with a hole on a full file system");
        check(ftruncate(filler, 0) == 0 && pwrite(control, kept, PAGE, at) == PAGE, "as before");
    }
    check(colocache_attach(control, &options, &block, 1, NULL, &cc) == 0, "attach when all is there again");
    colocache_close(cc);
    close(control), close(guest), close(cache), close(filler);
    check(unlink("region") == 0 && unlink("guest-1") == 0 && unlink("cache-1") == 0 && unlink("filler-1") == 0, "removing them");
}

static const char *in_small_tmpfs(void)
{
    char directory[] = "/tmp/colocache-test-XXXXXX", limit[32];
    int flags = geteuid() == 0 ? CLONE_NEWNS : CLONE_NEWNS | CLONE_NEWUSER;
    if (unshare(flags) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 || !mkdtemp(directory))
        return "tmpfs: no mount namespace for this user";
    snprintf(limit, sizeof limit, "size=%d", ROOM);
    if (mount("tmpfs", directory, "tmpfs", 0, limit) != 0) {
        rmdir(directory);
        return "tmpfs: mounting one is not allowed";
    }
    check(chdir(directory) == 0, "chdir");
    holes_in_a_region();
    staged_in_a_small_tmpfs();
    small_tmpfs();
    check(chdir("/") == 0 && umount2(directory, MNT_DETACH) == 0 && rmdir(directory) == 0, "cleaning up");
    return NULL;
}

static const char *huge_pages(void)
{
    /* Of all pages and not of the free ones: else others that give some back let it through, and then it holds what they count. */
    unsigned long all_pages = 0;
    FILE *info = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "r");
    if (!info || fscanf(info, "%lu", &all_pages) != 1)
        return "huge pages: this kernel has none of 2 MiB";
    fclose(info);
    uint64_t bytes = (all_pages + 64) * HUGE_PAGE;
    int guest = memfd_create("guest", MFD_HUGETLB | MFD_CLOEXEC), cache = memfd_create("cache", MFD_HUGETLB | MFD_CLOEXEC);
    if (guest < 0 || cache < 0 || ftruncate(guest, (off_t)bytes) != 0 || ftruncate(cache, (off_t)bytes) != 0)
        return "huge pages: no memfd of them";
    struct colocache *cc;
    int control = memfd_create("control", MFD_CLOEXEC);
    struct colocache_images both = images("huge", guest, cache, bytes, 0);
    check(colocache_create(control, &options, &cc) == 0, "create");
    check(no_memory(colocache_add_block(cc, &both, NULL)), "a block of more huge pages than there are");
    colocache_close(cc);
    return NULL;
}

int main(void)
{
    const char *skipped[] = {huge_pages(), in_small_tmpfs()};
    printf("{\"checks\": %d, \"skipped\": [", n_checks);
    for (int i = 0, n = 0; i < 2; i++) {
        if (skipped[i])
            printf("%s\"%s\"", n++ ? ", " : "", skipped[i]);
    }
    printf("]}\n");
    return 0;
}
