/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_pair.c -- both halves in one process, over two connections, while other threads call everything that colocache.h
 * allows from any thread.  Made for ThreadSanitizer; without it, it still compares all of memory after each epoch.
 *
 *     primary    one thread a stripe: sender_send; another: sender_mark_dirty
 *     secondary  one thread a connection: receive_stream; others: mark_dirty, sync_words, get_status, get_stats, failover, abort
 *                the conductor: device state, seal, flush, loaded
 */
#define _GNU_SOURCE
#include <colocache.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define N_BLOCKS 2u
#define N_STREAMS 2u
#define N_EPOCHS 40u
#define END_OF_PAGES 300u /* a message type of our own */

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition, colocache_last_error()); \
            exit(1); \
        } \
    } while (0)

static const uint64_t n_pages[N_BLOCKS] = {131, 1030};
static struct colocache *cache;
static struct colocache_sender *sender;
static uint8_t *ram[N_BLOCKS]; /* the primary's */
static int ends[N_STREAMS][2];
static uint64_t open_epoch;
static uint32_t stop;

static uint64_t dice(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* ---- threads of one epoch ---------------------------------------------------------------------------------------- */

struct stream {
    uint32_t number;
    uint64_t n_sent, n_received;
};

static void *send_stripe(void *arg)
{
    struct stream *stream = arg;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    int fd = ends[stream->number][0];
    for (int last = 0;;) { /* in small bites, so that senders and the marker meet */
        struct colocache_send_result sent = {.struct_size = sizeof sent};
        CHECK(colocache_sender_send(sender, fd, 5000, open_epoch, stream->number, N_STREAMS, 16, &sent) == 0);
        stream->n_sent += sent.n_pages;
        if (sent.n_pages == 0 && last++)
            break;
    }
    CHECK(colocache_message_header(header, END_OF_PAGES, open_epoch, 0, stream->number, 0) == 0);
    CHECK(send(fd, header, sizeof header, MSG_NOSIGNAL) == (ssize_t)sizeof header);
    return NULL;
}

static void *receive_stripe(void *arg)
{
    struct stream *stream = arg;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint32_t type, a, b;
    uint64_t epoch, body;
    CHECK(colocache_receive_stream(cache, ends[stream->number][1], 5000, open_epoch, header, &stream->n_received) == 0);
    CHECK(colocache_message_parse(header, &type, &epoch, &body, &a, &b) == 0);
    CHECK(type == END_OF_PAGES && epoch == open_epoch && a == stream->number && body == 0);
    return NULL;
}

/* ---- bystanders ------------------------------------------------------------------------------------------------------ */

static void *refused_failover(void *arg)
{
    CHECK(colocache_failover(cache, NULL) == COLOCACHE_E_NO_STATE);
    return arg;
}

static void *bystander(void *arg)
{
    uint64_t state = (uint64_t)(uintptr_t)arg + 7, epoch;
    const uint64_t words[2] = {0x8000000000000001u, 1};
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        struct colocache_status status = {.struct_size = sizeof status};
        struct colocache_stats stats = {.struct_size = sizeof stats};
        uint32_t block = (uint32_t)(dice(&state) % N_BLOCKS);
        uint64_t pfn = dice(&state) % (n_pages[block] - 65);
        switch (dice(&state) % 5) {
        case 0:
            CHECK(colocache_mark_dirty(cache, block, pfn, 1 + dice(&state) % 64) == 0);
            break;
        case 1:
            CHECK(colocache_sync_words(cache, block, pfn, 65, words) == 0);
            break;
        case 2:
            CHECK(colocache_get_status(cache, &status) == 0 && status.sealed_epoch >= status.committed_epoch);
            break;
        case 3:
            CHECK(colocache_get_stats(cache, &stats) == 0 && stats.aborted_epochs == 0);
            break;
        default:
            CHECK(colocache_abort(cache, 1u << 30, "no such epoch") < 0);
        }
    }
    CHECK(colocache_failover(cache, &epoch) == 0 && epoch == N_EPOCHS); /* all at once: each is told the same */
    return NULL;
}

static void *marker_of_primary(void *arg)
{
    uint64_t state = 99;
    (void)arg;
    for (int i = 0; i < 200; i++) {
        uint32_t block = (uint32_t)(dice(&state) % N_BLOCKS);
        CHECK(colocache_sender_mark_dirty(sender, block, dice(&state) % n_pages[block], 1) == 0);
    }
    return NULL;
}

/* ---- the conductor ------------------------------------------------------------------------------------------------------ */

/* change -- the primary's guest writes, and its log says so: by words, or by the kernel if `log` is one */
static void change(uint64_t *state, struct colocache_source *log)
{
    uint64_t words[N_BLOCKS][20] = {{0}};
    for (int i = 0; i < 150; i++) {
        uint32_t block = (uint32_t)(dice(state) % N_BLOCKS);
        uint64_t pfn = dice(state) % n_pages[block];
        memset(ram[block] + pfn * 4096, (int)(dice(state) % 3), 4096); /* zero pages too */
        ram[block][pfn * 4096 + 17] = (uint8_t)dice(state);
        words[block][pfn / 64] |= 1ull << (pfn % 64);
    }
    for (uint32_t b = 0; log == NULL && b < N_BLOCKS; b++)
        CHECK(colocache_sender_sync_words(sender, b, 0, n_pages[b], words[b]) == 0);
    if (log)
        CHECK(colocache_sender_sync_dirty_log(sender, log) == 0);
}

static void one_epoch(uint64_t epoch)
{
    pthread_t senders[N_STREAMS], receivers[N_STREAMS], marker;
    struct stream streams[N_STREAMS] = {{0}};
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = epoch};
    struct colocache_block_info block;
    void *room;
    open_epoch = epoch;
    CHECK(pthread_create(&marker, NULL, marker_of_primary, NULL) == 0);
    for (uint32_t i = 0; i < N_STREAMS; i++) {
        streams[i].number = i;
        CHECK(pthread_create(&receivers[i], NULL, receive_stripe, &streams[i]) == 0);
    }
    pthread_join(marker, NULL); /* what it marks is sent in this epoch */
    for (uint32_t i = 0; i < N_STREAMS; i++)
        CHECK(pthread_create(&senders[i], NULL, send_stripe, &streams[i]) == 0);
    for (uint32_t i = 0; i < N_STREAMS; i++) {
        pthread_join(senders[i], NULL);
        pthread_join(receivers[i], NULL);
        CHECK(streams[i].n_sent == streams[i].n_received);
        args.n_pages += streams[i].n_sent;
    }
    CHECK(colocache_device_state_begin(cache, epoch, 8, &room) == 0);
    memcpy(room, &epoch, 8);
    CHECK(colocache_seal(cache, &args, NULL) == 0);
    CHECK(colocache_sender_received(sender) == 0);
    CHECK(colocache_flush(cache, NULL) == 0);
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        CHECK(colocache_get_block(cache, b, &block) == 0);
        CHECK(memcmp(block.guest_addr, ram[b], block.len_bytes) == 0);
    }
    CHECK(colocache_loaded(cache, 1) == 0);
}

/* no_memory -- a block that does not fit the address space that is left: E_NO_MEMORY, and the handle is as before */
static void no_memory(int fd)
{
    struct rlimit before, little = {.rlim_cur = 64u << 20};
    CHECK(getrlimit(RLIMIT_AS, &before) == 0 && ftruncate(fd, 1ll << 40) == 0);
    little.rlim_max = before.rlim_max;
    struct colocache_images images = {.struct_size = sizeof images,
                                      .name = "huge",
                                      .len_bytes = 1ull << 38,
                                      .page_size = 4096,
                                      .guest_fd = fd,
                                      .cache_fd = fd,
                                      .cache_offset = 1ull << 38,
                                      .sparse = 1};
    CHECK(setrlimit(RLIMIT_AS, &little) == 0);
    CHECK(colocache_add_block(cache, &images, NULL) == COLOCACHE_E_NO_MEMORY);
    CHECK(setrlimit(RLIMIT_AS, &before) == 0 && ftruncate(fd, 0) == 0);
}

int main(void)
{
    struct colocache_uffd_range ranges[N_BLOCKS];
    pthread_t bystanders[3];
    int control = memfd_create("control", MFD_CLOEXEC), images_fd = memfd_create("images", MFD_CLOEXEC), empty = memfd_create("empty", 0);
    CHECK(control >= 0 && images_fd >= 0 && empty >= 0);
    CHECK(colocache_create(control, NULL, &cache) == 0 && colocache_sender_create(&sender) == 0);
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__) /* these live in terabytes of address space */
    no_memory(empty);
#endif
    uint64_t at = 0;
    for (uint32_t b = 0; b < N_BLOCKS; b++) {
        uint64_t len = n_pages[b] * 4096;
        ram[b] = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(ram[b] != MAP_FAILED && ftruncate(images_fd, (off_t)(at + 2 * len)) == 0);
        ranges[b] = (struct colocache_uffd_range){.block = b, .n_pages = n_pages[b], .addr = ram[b]};
        struct colocache_images images = {.struct_size = sizeof images,
                                          .name = b ? "pc.ram" : "boot",
                                          .len_bytes = len,
                                          .page_size = 4096,
                                          .guest_fd = images_fd,
                                          .cache_fd = images_fd,
                                          .guest_offset = at,
                                          .cache_offset = at + len};
        at += 2 * len;
        CHECK(colocache_add_block(cache, &images, NULL) == 0);
        CHECK(colocache_sender_add_block(sender, images.name, ram[b], len, 4096, NULL) == 0);
    }
    for (uint32_t i = 0; i < N_STREAMS; i++)
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends[i]) == 0);
    for (uintptr_t i = 0; i < 3; i++)
        CHECK(pthread_create(&bystanders[i], NULL, refused_failover, NULL) == 0);
    for (int i = 0; i < 3; i++)
        pthread_join(bystanders[i], NULL);
    for (uintptr_t i = 0; i < 3; i++)
        CHECK(pthread_create(&bystanders[i], NULL, bystander, (void *)i) == 0);

    struct colocache_source *log = NULL;
    int rc = colocache_source_uffd(ranges, N_BLOCKS, &log);
    CHECK(rc == 0 || rc == COLOCACHE_E_UNSUPPORTED);
    uint64_t state = 1;
    CHECK(colocache_sender_mark_all(sender) == 0);
    for (uint64_t epoch = 1; epoch <= N_EPOCHS; epoch++) {
        one_epoch(epoch);
        change(&state, epoch % 2 ? log : NULL);
        if (epoch % 2 == 0 && log) /* what words said is no news to the kernel's log */
            CHECK(colocache_source_discard(log) == 0);
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < 3; i++)
        pthread_join(bystanders[i], NULL);
    uint64_t pending, unacked;
    CHECK(colocache_sender_count(sender, &pending, &unacked) == 0 && pending > 0 && pending == unacked);
    colocache_source_close(log);
    colocache_sender_close(sender);
    CHECK(colocache_close(cache) == 0);
    return 0;
}
