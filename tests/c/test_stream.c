/* SPDX-License-Identifier: Apache-2.0 */
/* stream.c and message.c: damaged, wrong and broken-off packets.  What is refused has written nothing. */
#include "rig.h"

#include "checksum.h"
#include "message.h"

static const uint64_t blocks[] = {100, 4097};
static struct rig rig;
static int pair[2];

/* A packet as bytes, put together here and not by sender.c. */
struct raw {
    uint8_t bytes[COLOCACHE_HEADER_BYTES + 2048 * sizeof(struct cc_run) + 8 * 4096];
    uint64_t n;
};

static struct raw raw;

static void put(uint64_t offset, const void *value, uint64_t n)
{
    memcpy(raw.bytes + offset, value, n);
}

/* sign -- the header's checksum, as stream.h writes it down: over the first 32 bytes, and over the runs */
static void sign(uint32_t n_runs)
{
    uint64_t sum = cc_checksum(raw.bytes, 32);
    if (n_runs)
        sum ^= cc_checksum(raw.bytes + COLOCACHE_HEADER_BYTES, n_runs * sizeof(struct cc_run));
    put(32, &sum, 8);
}

static void make(uint64_t epoch, uint32_t block, const struct cc_run *runs, uint32_t n_runs, uint64_t salt)
{
    uint16_t version = COLOCACHE_WIRE_VERSION, type = COLOCACHE_MSG_PAGES;
    memset(&raw, 0, sizeof raw);
    put(0, "COLO", 4);
    put(4, &version, 2);
    put(6, &type, 2);
    put(8, &epoch, 8);
    put(24, &block, 4);
    put(28, &n_runs, 4);
    put(COLOCACHE_HEADER_BYTES, runs, n_runs * sizeof *runs);
    uint64_t at = COLOCACHE_HEADER_BYTES + n_runs * sizeof *runs;
    for (uint32_t i = 0; i < n_runs; i++) {
        for (uint64_t k = 0; !(runs[i].flags & CC_RUN_ZERO) && k < runs[i].n_pages && at + 4096 <= sizeof raw.bytes; k++, at += 4096)
            rig_fill(raw.bytes + at, 4096, salt, block, runs[i].first_pfn + k);
    }
    raw.n = at;
    uint64_t body = at - COLOCACHE_HEADER_BYTES;
    put(16, &body, 8);
    sign(n_runs);
}

static void begin(void)
{
    rig_open(&rig, 2, blocks, 4096, false);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    int bytes = 1 << 20; /* the test writes a packet whole before anybody reads */
    REQUIRE(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes) == 0);
    rig_receive(&rig, 1, 0, 50, 1); /* there is a state, and bits of epoch 2, that must not change */
    rig_checkpoint(&rig, 1, 10);
    rig_receive(&rig, 2, 1, 4096, 2);
    rig_guest_write(&rig, 0, 51, 3);
}

static void fresh_connection(void)
{
    close(pair[0]);
    close(pair[1]);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    int bytes = 1 << 20;
    REQUIRE(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes) == 0);
}

static void end(void)
{
    close(pair[0]);
    close(pair[1]);
    rig_close(&rig);
}

static void write_all(uint64_t n)
{
    REQUIRE(write(pair[0], raw.bytes, n) == (ssize_t)n);
}

/* refused -- this packet, whole, on a fresh connection: this code, nothing taken, nothing written */
static void refused(const char *what, int code, uint64_t epoch)
{
    uint64_t n = 77;
    uint8_t header[COLOCACHE_HEADER_BYTES];
    fresh_connection();
    write_all(raw.n);
    int rc = colocache_receive_stream(rig.cc, pair[1], 1000, epoch, header, &n);
    if (rc != code)
        CHECK_SAY("%s: gave %d (%s), expected %d", what, rc, colocache_last_error(), code);
    CHECK_EQ(0, n);
    rig_check(&rig, true);
}

static const struct cc_run good_runs[] = {
    {.first_pfn = 3, .n_pages = 2}, {.first_pfn = 63, .n_pages = 2, .flags = CC_RUN_ZERO}, {.first_pfn = 99, .n_pages = 1}};

static void a_good_packet_is_taken_up_to_the_next_message(void)
{
    begin();
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t n = 0, epoch = 0, body = 0;
    uint32_t type = 0, a = 0, b = 0;
    char left[5] = "";
    make(2, 0, good_runs, 3, 8);
    write_all(raw.n);
    CHECK_RC(0, colocache_message_header(header, 7, 2, 5, 0xabcd, ~0u));
    REQUIRE(write(pair[0], header, sizeof header) == sizeof header && write(pair[0], "body!", 5) == 5);
    memset(header, 0, sizeof header);
    CHECK_RC(0, colocache_receive_stream(rig.cc, pair[1], 1000, 2, header, &n));
    CHECK_EQ(5, n);
    CHECK_RC(0, colocache_message_parse(header, &type, &epoch, &body, &a, &b));
    CHECK(type == 7 && epoch == 2 && body == 5 && a == 0xabcd && b == ~0u);
    CHECK(read(pair[1], left, 5) == 5 && memcmp(left, "body!", 5) == 0); /* the body is the caller's */
    struct rig_block *block = &rig.blocks[0];
    const uint64_t data[] = {3, 4, 99};
    for (int i = 0; i < 3; i++)
        rig_fill(block->cache_oracle + data[i] * 4096, 4096, 8, 0, data[i]);
    memset(block->cache_oracle + 63 * 4096, 0, 2 * 4096);
    block->pvm[3] = block->pvm[4] = block->pvm[63] = block->pvm[64] = block->pvm[99] = 1;
    rig_check(&rig, true);
    end();
}

static void every_damaged_byte_of_the_head_is_refused(void)
{
    begin();
    struct dice dice = {41};
    uint64_t head = COLOCACHE_HEADER_BYTES + sizeof good_runs;
    for (uint64_t at = 0; at < head; at++) {
        make(2, 0, good_runs, 3, 8);
        raw.bytes[at] ^= (uint8_t)(1u << below(&dice, 8));
        uint64_t n = 77;
        uint8_t header[COLOCACHE_HEADER_BYTES];
        fresh_connection();
        write_all(raw.n);
        shutdown(pair[0], SHUT_WR);
        /* a damaged number of runs may make it wait for more than there is: any error will do, but no page may be taken */
        CHECK(colocache_receive_stream(rig.cc, pair[1], 1000, 2, header, &n) < 0);
        CHECK_EQ(0, n);
    }
    rig_check(&rig, true);
    end();
}

static void wrong_packets_are_refused_with_their_code(void)
{
    begin();
    struct cc_run many[1100];
    struct cc_run one = {.first_pfn = 5, .n_pages = 1};
    make(2, 2, &one, 1, 8);
    refused("unknown block", COLOCACHE_E_BLOCK, 2);
    make(2, ~0u, &one, 1, 8);
    refused("unknown block", COLOCACHE_E_BLOCK, 2);
    make(3, 0, &one, 1, 8);
    refused("another epoch than expected", COLOCACHE_E_EPOCH, 2);
    refused("another epoch than the open one", COLOCACHE_E_EPOCH, 0);
    make(1, 0, &one, 1, 8);
    refused("an epoch that is over", COLOCACHE_E_EPOCH, 0);
    make(0, 0, &one, 1, 8);
    refused("epoch 0", COLOCACHE_E_EPOCH, 0);
    make(COLOCACHE_EPOCH_MAX + 1, 0, &one, 1, 8);
    refused("an epoch that no word has room for", COLOCACHE_E_PACKET, 0);
    make(UINT64_MAX, 0, &one, 1, 8);
    refused("the largest number", COLOCACHE_E_PACKET, 0);
    one = (struct cc_run){.first_pfn = 100, .n_pages = 1};
    make(2, 0, &one, 1, 8);
    refused("first page past the end", COLOCACHE_E_RANGE, 2);
    one = (struct cc_run){.first_pfn = 99, .n_pages = 2};
    make(2, 0, &one, 1, 8);
    refused("last page past the end", COLOCACHE_E_RANGE, 2);
    one = (struct cc_run){.first_pfn = ~0ull, .n_pages = 2, .flags = CC_RUN_ZERO};
    make(2, 0, &one, 1, 8);
    refused("wraps around", COLOCACHE_E_RANGE, 2);
    one = (struct cc_run){.first_pfn = 5, .n_pages = 0};
    make(2, 0, &one, 1, 8);
    refused("a run of no page", COLOCACHE_E_PACKET, 2);
    one = (struct cc_run){.first_pfn = 5, .n_pages = 1, .flags = 2};
    make(2, 0, &one, 1, 8);
    refused("unknown flags", COLOCACHE_E_PACKET, 2);
    const struct cc_run half[] = {{.first_pfn = 5, .n_pages = 1, .flags = CC_RUN_ZERO}, {.first_pfn = 200, .n_pages = 1}};
    make(2, 0, half, 2, 8);
    refused("a good run before a bad one", COLOCACHE_E_RANGE, 2);
    one = (struct cc_run){.first_pfn = 5, .n_pages = 2};
    for (int d = -4096; d <= 4096; d += d == -1 || d == 0 ? 1 : 4095) { /* -4096, -1, 0, 1, 4096 */
        make(2, 0, &one, 1, 8);
        uint64_t body = raw.n - COLOCACHE_HEADER_BYTES + (uint64_t)(int64_t)d;
        put(16, &body, 8);
        sign(1);
        if (d)
            refused("a page of the wrong length", COLOCACHE_E_PACKET, 2);
    }
    for (uint32_t i = 0; i < 1100; i++)
        many[i] = (struct cc_run){.first_pfn = 2 * i, .n_pages = 1, .flags = CC_RUN_ZERO};
    make(2, 1, many, 1025, 8);
    refused("too many runs", COLOCACHE_E_TOO_LARGE, 2);
    make(2, 1, many, 0, 8);
    refused("no runs", COLOCACHE_E_TOO_LARGE, 2);
    one = (struct cc_run){.first_pfn = 0, .n_pages = 4097, .flags = CC_RUN_ZERO};
    make(2, 1, &one, 1, 8);
    refused("too many pages", COLOCACHE_E_TOO_LARGE, 2);
    make(2, 0, good_runs, 3, 8);
    put(0, "OLOC", 4);
    sign(3);
    refused("magic", COLOCACHE_E_PACKET, 2);
    make(2, 0, good_runs, 3, 8);
    uint16_t version = COLOCACHE_WIRE_VERSION + 1;
    put(4, &version, 2);
    sign(3);
    refused("version", COLOCACHE_E_PACKET, 2);
    CHECK_RC(0, colocache_message_header(raw.bytes, 9, 2, 0, 0, 0));
    raw.n = COLOCACHE_HEADER_BYTES;
    raw.bytes[20] ^= 1;
    refused("another message with a damaged head", COLOCACHE_E_PACKET, 2);
    /* the largest packet that is allowed */
    one = (struct cc_run){.first_pfn = 0, .n_pages = 4096, .flags = CC_RUN_ZERO};
    make(2, 1, &one, 1, 8);
    fresh_connection();
    write_all(raw.n);
    shutdown(pair[0], SHUT_WR);
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t n = 0;
    CHECK_RC(COLOCACHE_E_PEER_LOST, colocache_receive_stream(rig.cc, pair[1], 1000, 2, header, &n));
    CHECK_EQ(4096, n); /* taken pages are told on error, too */
    end();
}

static void phases_that_take_no_pages_refuse_packets(void)
{
    begin();
    rig_device_state(&rig, 2, 0);
    rig_seal(&rig, 2);
    make(3, 0, good_runs, 3, 8);
    refused("sealed", COLOCACHE_E_SEALED, 3);
    rig_flush(&rig);
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK_RC(0, colocache_failover(rig.cc, NULL));
    refused("took over", COLOCACHE_E_FAILED_OVER, 3);
    end();
}

/* A connection that ends, or falls silent, after any number of bytes of a packet. */
static void a_packet_broken_off_anywhere(void)
{
    begin();
    struct rig_block *block = &rig.blocks[0];
    uint64_t head = COLOCACHE_HEADER_BYTES + sizeof good_runs;
    const uint64_t cuts[] = {0, 1, 39, 40, 41, head - 1, head, head + 1, head + 4096, head + 4097, head + 3 * 4096 - 1};
    for (unsigned i = 0; i < 2 * sizeof cuts / sizeof *cuts; i++) {
        uint64_t cut = cuts[i / 2], n = 77;
        uint8_t header[COLOCACHE_HEADER_BYTES];
        make(2, 0, good_runs, 3, 8);
        fresh_connection();
        write_all(cut);
        if (i % 2)
            shutdown(pair[0], SHUT_WR);
        CHECK_RC(i % 2 ? COLOCACHE_E_PEER_LOST : COLOCACHE_E_TIMEOUT, colocache_receive_stream(rig.cc, pair[1], 10, 2, header, &n));
        CHECK_EQ(0, n);
        if (cut < head) {
            rig_check(&rig, true); /* nothing was written */
        } else {                   /* pages may be torn: they have their bits, whatever they hold now */
            const uint64_t touched[] = {3, 4, 63, 64, 99};
            for (int k = 0; k < 5; k++) {
                block->pvm[touched[k]] = 1;
                memcpy(block->cache_oracle + touched[k] * 4096, block->cache + touched[k] * 4096, 4096);
            }
            rig_check(&rig, true);
        }
    }
    CHECK_RC(0, colocache_abort(rig.cc, 2, "peer lost"));
    rig_check(&rig, true);
    /* the epoch after it sends those pages again, and guest RAM is right */
    for (uint64_t pfn = 0; pfn < 100; pfn++)
        rig_receive(&rig, 3, 0, pfn, 11);
    rig_checkpoint(&rig, 3, 0);
    rig_check(&rig, true);
    end();
}

static void what_is_no_socket_is_an_error(void)
{
    begin();
    uint8_t header[COLOCACHE_HEADER_BYTES];
    CHECK_RC(-EBADF, colocache_receive_stream(rig.cc, -1, 10, 2, header, NULL));
    CHECK_RC(-ENOTSOCK, colocache_receive_stream(rig.cc, rig.control_fd, 10, 2, header, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_stream(rig.cc, pair[1], 10, 2, NULL, NULL));
    rig_check(&rig, true);
    end();
}

static void headers_survive_the_trip_and_damage_is_seen(void)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint32_t type, a, b;
    uint64_t epoch, body;
    CHECK_RC(0, colocache_message_header(header, 65535, COLOCACHE_EPOCH_MAX, ~0ull, 1, 2));
    CHECK_RC(0, colocache_message_parse(header, &type, &epoch, &body, &a, &b));
    CHECK(type == 65535 && epoch == COLOCACHE_EPOCH_MAX && body == ~0ull && a == 1 && b == 2);
    for (unsigned bit = 0; bit < COLOCACHE_HEADER_BYTES * 8; bit++) {
        header[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        CHECK_RC(COLOCACHE_E_PACKET, colocache_message_parse(header, &type, &epoch, &body, &a, &b));
        header[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_message_header(header, 1, COLOCACHE_EPOCH_MAX + 1, 1, 1, 2));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_message_header(header, 65536, 1, 1, 1, 1));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_message_header(header, COLOCACHE_MSG_PAGES, 1, 1, 1, 1));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_message_header(NULL, 1, 1, 1, 1, 1));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_message_parse(NULL, &type, &epoch, &body, &a, &b));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_message_parse(header, NULL, &epoch, &body, &a, &b));
}

/* ---- an event loop's way ------------------------------------------------------------------------------------------------ */

static void what_is_not_there_yet_is_not_waited_for(void)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    const struct cc_run runs[] = {{3, 2, 0}, {7, 1, CC_RUN_ZERO}}, again[] = {{50, 3, 0}};
    uint64_t n_pages = 99;
    begin();
    CHECK_RC(COLOCACHE_READY_NOT, colocache_receive_ready(rig.cc, pair[1], -1, 2, 0, header, &n_pages)); /* -1 would be for ever */
    CHECK_EQ(0, n_pages);
    make(2, 0, runs, 2, 5);
    REQUIRE(send(pair[0], raw.bytes, raw.n, 0) == (ssize_t)raw.n);
    make(2, 1, again, 1, 5);
    REQUIRE(send(pair[0], raw.bytes, raw.n, 0) == (ssize_t)raw.n);
    CHECK_RC(COLOCACHE_READY_MORE, colocache_receive_ready(rig.cc, pair[1], -1, 2, 1, header, &n_pages)); /* a packet is taken whole */
    CHECK_EQ(3, n_pages);
    CHECK_RC(COLOCACHE_READY_NOT, colocache_receive_ready(rig.cc, pair[1], -1, 2, 0, header, &n_pages));
    CHECK_EQ(3, n_pages);
    REQUIRE(send(pair[0], raw.bytes, 10, 0) == 10); /* a packet that has begun is waited for, and not for ever */
    CHECK_RC(COLOCACHE_E_TIMEOUT, colocache_receive_ready(rig.cc, pair[1], 20, 2, 0, header, &n_pages));
    end();
    begin();
    CHECK_RC(0, colocache_message_header(header, 7, 1, 0, 1, 2));
    REQUIRE(send(pair[0], header, sizeof header, 0) == sizeof header);
    memset(header, 0, sizeof header);
    CHECK_RC(0, colocache_receive_ready(rig.cc, pair[1], 0, 2, 0, header, NULL));
    uint32_t type = 0, a, b;
    uint64_t epoch, length;
    CHECK_RC(0, colocache_message_parse(header, &type, &epoch, &length, &a, &b));
    CHECK_EQ(7, type);
    close(pair[0]);
    CHECK_RC(COLOCACHE_E_PEER_LOST, colocache_receive_ready(rig.cc, pair[1], 0, 2, 0, header, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_ready(rig.cc, pair[1], 0, 2, 0, NULL, NULL));
    pair[0] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    end();
}

/* ---- packets in memory ----------------------------------------------------------------------------------------------- */

/* Any cut of a packet: nothing of it is taken before it is whole, and what follows it is left. */
static void a_packet_in_memory_is_taken_whole_or_not_at_all(void)
{
    uint8_t header[COLOCACHE_HEADER_BYTES], *exact;
    const struct cc_run runs[] = {{3, 2, 0}, {7, 1, CC_RUN_ZERO}};
    uint64_t n_pages, used;
    struct colocache_status before = {.struct_size = sizeof before};
    begin();
    CHECK_RC(0, colocache_get_status(rig.cc, &before));
    make(2, 0, runs, 2, 5);
    for (uint64_t n = 0; n < raw.n; n += n < 100 ? 1 : 997) {
        exact = malloc(n ? n : 1); /* of exactly that size: a read past it is the sanitizer's to see */
        memcpy(exact, raw.bytes, n);
        CHECK_RC(COLOCACHE_READY_NOT, colocache_receive_packets(rig.cc, exact, n, 2, header, &used, &n_pages));
        free(exact);
        CHECK_EQ(0, used);
        CHECK_EQ(0, n_pages);
    }
    struct colocache_status after = {.struct_size = sizeof after};
    CHECK_RC(0, colocache_get_status(rig.cc, &after));
    CHECK_EQ(before.received_pages, after.received_pages);
    CHECK_RC(COLOCACHE_READY_NOT, colocache_receive_packets(rig.cc, raw.bytes, raw.n, 2, header, &used, &n_pages));
    CHECK_EQ(raw.n, used);
    CHECK_EQ(3, n_pages);
    for (uint64_t pfn = 3; pfn < 5; pfn++)
        CHECK(memcmp(rig.blocks[0].cache + pfn * 4096, raw.bytes + COLOCACHE_HEADER_BYTES + sizeof runs + (pfn - 3) * 4096, 4096) == 0);

    uint64_t packet = raw.n;
    CHECK_RC(0, colocache_message_header(raw.bytes + packet, 7, 2, 5, 1, 2));
    memcpy(raw.bytes + packet + COLOCACHE_HEADER_BYTES, "body!", 5);
    CHECK_RC(0, colocache_receive_packets(rig.cc, raw.bytes, packet + COLOCACHE_HEADER_BYTES + 5, 2, header, &used, &n_pages));
    CHECK_EQ(packet + COLOCACHE_HEADER_BYTES, used); /* the body stays */
    CHECK_EQ(3, n_pages);
    CHECK(memcmp(header, raw.bytes + packet, sizeof header) == 0);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_packets(rig.cc, raw.bytes, packet, 3, header, &used, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_packets(rig.cc, NULL, 0, 2, header, &used, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_packets(rig.cc, raw.bytes, packet, 2, header, NULL, NULL));
    end();
}

/* A header may say that its runs are longer than its body: nothing outside the memory may be read for that. */
static void a_packet_in_memory_whose_runs_are_longer_than_it_is_refused(void)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    const struct cc_run runs[] = {{3, 1, CC_RUN_ZERO}, {7, 1, CC_RUN_ZERO}};
    uint64_t used, n_pages, body = sizeof runs[0];
    begin();
    make(2, 0, runs, 2, 5);
    put(16, &body, 8); /* room for one run, the header says two */
    sign(2);
    uint8_t *exact = malloc(COLOCACHE_HEADER_BYTES + body);
    memcpy(exact, raw.bytes, COLOCACHE_HEADER_BYTES + body);
    CHECK_RC(COLOCACHE_E_PACKET, colocache_receive_packets(rig.cc, exact, COLOCACHE_HEADER_BYTES + body, 2, header, &used, &n_pages));
    CHECK_EQ(0, n_pages);
    free(exact);
    end();
}

int main(void)
{
    RUN(a_good_packet_is_taken_up_to_the_next_message);
    RUN(every_damaged_byte_of_the_head_is_refused);
    RUN(wrong_packets_are_refused_with_their_code);
    RUN(phases_that_take_no_pages_refuse_packets);
    RUN(a_packet_broken_off_anywhere);
    RUN(what_is_no_socket_is_an_error);
    RUN(headers_survive_the_trip_and_damage_is_seen);
    RUN(what_is_not_there_yet_is_not_waited_for);
    RUN(a_packet_in_memory_is_taken_whole_or_not_at_all);
    RUN(a_packet_in_memory_whose_runs_are_longer_than_it_is_refused);
    return DONE();
}
