/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_wire.c -- any bytes from a peer: colocache_receive_stream, colocache_receive_packets and colocache_message_parse, against a
 * second parser.
 *
 * An input is a little program that makes a stream: bytes as they are, PAGES packets with fields of the input's choice and, mostly,
 * right checksums (which a fuzzer never guesses), other messages, and changes of bytes already made.  The parser here, written from the
 * header's text, says what of the stream is in order.  Afterwards
 *   - each byte of both caches is what the parser says, where the packet came whole and did not contradict itself;
 *   - a bit is set in the PVM bitmap for each page that was touched, and for no other: a refused packet leaves nothing at all;
 *   - guest RAM is untouched, the count is right, and the connection ended for the reason that the parser names.
 * Through memory the stream comes in pieces of any size, each in an allocation of its own that the address sanitizer watches; there a
 * packet that broke off leaves nothing either.
 */
#include "fuzz_world.h"

#include <sys/socket.h>

enum { WIRE_MAX = 128 << 10, RUNS_MAX = COLOCACHE_PACKET_RUNS_MAX };

struct wire_header {
    uint32_t magic;
    uint16_t version, type;
    uint64_t epoch, body_len_bytes;
    uint32_t a, b;
    uint64_t checksum;
};

struct wire_run {
    uint64_t first_pfn;
    uint32_t n_pages, flags;
};

static uint8_t wire[WIRE_MAX];
static size_t wire_bytes;

/* ---- from an input to a stream ------------------------------------------------------------------------------------------ */

static void put(const void *from, size_t n_bytes)
{
    if (n_bytes > WIRE_MAX - wire_bytes)
        n_bytes = WIRE_MAX - wire_bytes;
    memcpy(wire + wire_bytes, from, n_bytes);
    wire_bytes += n_bytes;
}

static uint64_t checksum(const struct wire_header *header, const struct wire_run *runs, uint32_t n_runs)
{
    return colocache_checksum(header, 32) ^ (n_runs ? colocache_checksum(runs, n_runs * sizeof *runs) : 0);
}

/* put_packet -- false: the stream ends in the middle of it */
static bool put_packet(struct input *input, uint64_t number)
{
    static struct wire_run runs[RUNS_MAX];
    struct wire_header header = {.magic = 0x4f4c4f43, .version = COLOCACHE_WIRE_VERSION, .type = COLOCACHE_MSG_PAGES};
    header.epoch = take_small(input, 8);
    header.a = (uint32_t)take_small(input, 4);
    header.b = (uint32_t)take_small(input, 4);
    uint32_t n_runs = header.b < RUNS_MAX ? header.b : RUNS_MAX;
    uint64_t pages = 0;
    for (uint32_t i = 0; i < n_runs; i++) {
        runs[i] = (struct wire_run){.first_pfn = take_small(input, 8), .n_pages = (uint32_t)take_small(input, 4)};
        runs[i].flags = (uint32_t)take_small(input, 4);
        pages += runs[i].flags & 1 ? 0 : runs[i].n_pages;
    }
    header.body_len_bytes = n_runs * sizeof *runs + pages * PAGE + take_small(input, 8);
    header.checksum = checksum(&header, runs, n_runs) ^ take_small(input, 8);
    uint64_t missing = take(input, 2);
    put(&header, sizeof header);
    put(runs, n_runs * sizeof *runs);
    for (uint64_t i = 0; i < pages && wire_bytes < WIRE_MAX; i++) {
        uint8_t page[PAGE];
        world_fill(page, number + 100, 0, i);
        put(page, PAGE);
    }
    if (missing)
        wire_bytes -= missing < wire_bytes ? missing : wire_bytes;
    return missing == 0;
}

static void put_message(struct input *input)
{
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint32_t type = (uint32_t)take(input, 2);
    uint64_t epoch = take_small(input, 8), body = take_small(input, 8);
    if (colocache_message_header(header, type, epoch, body, (uint32_t)take(input, 1), (uint32_t)take(input, 1)) == 0)
        put(header, sizeof header);
    else
        PROMISE(type == COLOCACHE_MSG_PAGES || epoch > COLOCACHE_EPOCH_MAX, "no header for type %u", type);
}

static void make_stream(struct input *input)
{
    wire_bytes = 0;
    for (uint64_t number = 0; input->left && wire_bytes < WIRE_MAX && number < 64; number++) {
        switch (take(input, 1) % 4) {
        case 0:
            if (!put_packet(input, number))
                return;
            break;
        case 1:
            put_message(input);
            break;
        case 2: {
            size_t n = (size_t)take(input, 1);
            n = n < input->left ? n : input->left;
            put(input->at, n);
            input->at += n;
            input->left -= n;
            break;
        }
        case 3: {
            uint64_t at = take(input, 2), bits = take(input, 1);
            if (wire_bytes)
                wire[at % wire_bytes] ^= (uint8_t)bits;
            break;
        }
        }
    }
}

/* ---- the second parser ---------------------------------------------------------------------------------------------------- */

enum verdict { MESSAGE, REFUSED, BROKE_OFF };

struct oracle {
    uint8_t cache[BLOCKS][PAGES_MAX * PAGE];
    bool bit[BLOCKS][PAGES_MAX];
    bool unsure[BLOCKS][PAGES_MAX];        /* of a packet that broke off, or once zeros and once bytes in one packet: either may win */
    unsigned in_packet[BLOCKS][PAGES_MAX]; /* number of the last packet that named it, times two, plus 1 if as zeros */
    unsigned n_packets;
    uint64_t n_pages, newest, open; /* epoch numbers */
    size_t message_at;
};

static struct oracle oracle;
static bool in_memory; /* the stream is handed over in memory, not on a socket */

static bool runs_fit(const struct wire_header *header, const struct wire_run *runs)
{
    uint64_t pages = 0, data = 0;
    if (header->a >= BLOCKS)
        return false;
    for (uint32_t i = 0; i < header->b; i++) {
        const uint64_t first = runs[i].first_pfn, n = runs[i].n_pages, room = block_pages[header->a];
        if (n == 0 || first >= room || n > room - first || runs[i].flags > 1)
            return false;
        pages += n;
        data += runs[i].flags ? 0 : n;
    }
    return pages <= COLOCACHE_PACKET_PAGES_MAX && header->body_len_bytes == header->b * sizeof *runs + data * PAGE;
}

/* take_packet -- all its runs are in order: its bytes, as far as they came */
static bool take_packet(const struct wire_header *header, const struct wire_run *runs, size_t *at)
{
    bool whole = wire_bytes - *at >= header->body_len_bytes - header->b * sizeof *runs;
    oracle.n_packets++;
    for (uint32_t i = 0; i < header->b; i++) {
        for (uint64_t pfn = runs[i].first_pfn; pfn < runs[i].first_pfn + runs[i].n_pages; pfn++) {
            oracle.bit[header->a][pfn] = true;
            unsigned *named = &oracle.in_packet[header->a][pfn], now = oracle.n_packets * 2 + runs[i].flags;
            bool both = *named == (now ^ 1) || (*named / 2 == now / 2 && oracle.unsure[header->a][pfn]);
            oracle.unsure[header->a][pfn] = !whole || both;
            *named = now;
            oracle.n_pages += whole;
            uint8_t *page = oracle.cache[header->a] + pfn * PAGE;
            if (runs[i].flags)
                memset(page, 0, PAGE);
            else if (whole)
                memcpy(page, wire + *at, PAGE);
            *at += whole && !runs[i].flags ? PAGE : 0;
        }
    }
    return whole;
}

static enum verdict parse(uint64_t expected_epoch)
{
    static struct wire_run runs[RUNS_MAX];
    size_t at = 0;
    for (;;) {
        struct wire_header header;
        if (wire_bytes - at < sizeof header)
            return BROKE_OFF;
        memcpy(&header, wire + at, sizeof header);
        oracle.message_at = at;
        at += sizeof header;
        if (header.magic != 0x4f4c4f43 || header.version != COLOCACHE_WIRE_VERSION || header.epoch > COLOCACHE_EPOCH_MAX)
            return REFUSED;
        if (header.type != COLOCACHE_MSG_PAGES)
            return header.checksum == checksum(&header, NULL, 0) ? MESSAGE : REFUSED;
        if (in_memory && header.body_len_bytes > wire_bytes - at)
            return BROKE_OFF;
        if ((expected_epoch && header.epoch != expected_epoch) || header.b == 0 || header.b > RUNS_MAX ||
            header.body_len_bytes < header.b * sizeof *runs)
            return REFUSED;
        if (wire_bytes - at < header.b * sizeof *runs)
            return BROKE_OFF;
        memcpy(runs, wire + at, header.b * sizeof *runs);
        at += header.b * sizeof *runs;
        if (header.checksum != checksum(&header, runs, header.b) || !runs_fit(&header, runs))
            return REFUSED;
        if (header.epoch == 0 || (oracle.open ? header.epoch != oracle.open : header.epoch <= oracle.newest))
            return REFUSED;
        oracle.newest = oracle.open = header.epoch;
        if (!take_packet(&header, runs, &at))
            return BROKE_OFF;
    }
}

/* ---- one input -------------------------------------------------------------------------------------------------------------- */

static void check_memory(const struct world *world, const uint8_t guest[BLOCKS][PAGES_MAX * PAGE])
{
    for (unsigned b = 0; b < BLOCKS; b++) {
        uint64_t words[2] = {0, 0};
        PROMISE(colocache_get_bitmap(world->cc, b, COLOCACHE_BITMAP_PVM, words, (block_pages[b] + 63) / 64) == 0, "get_bitmap");
        PROMISE(memcmp(guest[b], world->guest_at[b], block_pages[b] * PAGE) == 0, "guest RAM of block %u was written", b);
        for (uint64_t pfn = 0; pfn < block_pages[b]; pfn++) {
            bool bit = words[pfn / 64] >> pfn % 64 & 1;
            PROMISE(bit == oracle.bit[b][pfn], "page %llu of block %u has bit %d", (unsigned long long)pfn, b, bit);
            PROMISE(oracle.unsure[b][pfn] || memcmp(world->cache_at[b] + pfn * PAGE, oracle.cache[b] + pfn * PAGE, PAGE) == 0,
                    "page %llu of block %u holds other bytes", (unsigned long long)pfn, b);
        }
    }
}

/* check_epoch -- what was whole can be sealed with its count, what was not can't */
static void check_epoch(struct world *world, enum verdict verdict)
{
    void *state;
    if (!oracle.open)
        return;
    uint64_t sent = oracle.n_pages + (verdict != MESSAGE);
    struct colocache_seal_args args = {.struct_size = sizeof args, .epoch = oracle.open, .n_pages = sent};
    PROMISE(colocache_device_state_begin(world->cc, oracle.open, 0, &state) == 0, "device_state_begin");
    int rc = colocache_seal(world->cc, &args, NULL);
    PROMISE(rc == (verdict == MESSAGE ? 0 : COLOCACHE_E_INCOMPLETE), "seal gave %d", rc);
    if (rc == 0) {
        PROMISE(colocache_flush(world->cc, NULL) == 0 && colocache_loaded(world->cc, 1) == 0, "flush and loaded");
        PROMISE(colocache_validate(world->cc, 1) == 0, "validate");
    }
}

static int receive_on_a_socket(struct world *world, uint64_t expected_epoch, uint8_t *header, uint64_t *n_pages)
{
    int pair[2], room = 2 * WIRE_MAX;
    PROMISE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
    setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    ssize_t sent = wire_bytes ? send(pair[0], wire, wire_bytes, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
    wire_bytes = sent > 0 ? (size_t)sent : 0; /* what fits: the parser sees no more */
    close(pair[0]);
    int rc = colocache_receive_stream(world->cc, pair[1], 1000, expected_epoch, header, n_pages);
    close(pair[1]);
    return rc;
}

/* receive_in_memory -- in pieces of up to `most` bytes more each time; the end of the stream is as that of a socket */
static int receive_in_memory(struct world *world, uint64_t expected_epoch, size_t most, uint8_t *header, uint64_t *n_pages)
{
    size_t from = 0, came = 0;
    *n_pages = 0;
    for (size_t turn = 1;; turn++) {
        const size_t more = 1 + turn * 7919 % most;
        came = more < wire_bytes - came ? came + more : wire_bytes;
        uint8_t *data = malloc(came - from + !(came - from));
        uint64_t used, n;
        PROMISE(data, "no memory");
        memcpy(data, wire + from, came - from);
        int rc = colocache_receive_packets(world->cc, data, came - from, expected_epoch, header, &used, &n);
        free(data);
        PROMISE(used <= came - from, "%llu of %zu bytes were taken", (unsigned long long)used, came - from);
        *n_pages += n;
        from += used;
        if (rc != COLOCACHE_READY_NOT)
            return rc;
        if (came == wire_bytes)
            return COLOCACHE_E_PEER_LOST;
    }
}

static void receive(struct world *world, uint64_t expected_epoch)
{
    static uint8_t guest[BLOCKS][PAGES_MAX * PAGE];
    uint8_t header[COLOCACHE_HEADER_BYTES];
    uint64_t n_pages;
    for (unsigned b = 0; b < BLOCKS; b++) {
        memcpy(guest[b], world->guest_at[b], block_pages[b] * PAGE);
        memcpy(oracle.cache[b], world->cache_at[b], block_pages[b] * PAGE);
    }
    const size_t most = wire_bytes % 5 ? 64 : 3 * PAGE; /* small pieces, or large */
    int rc = in_memory ? receive_in_memory(world, expected_epoch, most, header, &n_pages)
                       : receive_on_a_socket(world, expected_epoch, header, &n_pages);
    enum verdict verdict = parse(expected_epoch);
    if (verdict == MESSAGE) {
        PROMISE(rc == 0 && memcmp(header, wire + oracle.message_at, sizeof header) == 0, "a message was not handed over (%d)", rc);
    } else if (verdict == BROKE_OFF) {
        PROMISE(rc == COLOCACHE_E_PEER_LOST, "a stream that broke off gave %d", rc);
    } else {
        PROMISE(rc == COLOCACHE_E_PACKET || rc == COLOCACHE_E_EPOCH || rc == COLOCACHE_E_BLOCK || rc == COLOCACHE_E_RANGE ||
                    rc == COLOCACHE_E_TOO_LARGE,
                "a packet against the rules gave %d", rc);
    }
    PROMISE(n_pages == oracle.n_pages, "%llu pages counted, %llu came", (unsigned long long)n_pages, (unsigned long long)oracle.n_pages);
    check_memory(world, (const uint8_t(*)[PAGES_MAX * PAGE]) guest);
    check_epoch(world, verdict);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct world world;
    static bool made;
    struct input input = {data, size};
    if (!made)
        world_make(&world);
    made = true;

    uint64_t how = take(&input, 1);
    memset(&oracle, 0, sizeof oracle);
    world_create(&world);
    if (how & 1) { /* a pair in step, with two epochs behind it */
        world_receive(&world, 1, 1);
        world_commit(&world, 1);
        world_receive(&world, 2, 3);
        world_commit(&world, 2);
        oracle.newest = 2;
    }
    make_stream(&input);
    in_memory = how & 128;
    receive(&world, how & 2 ? how >> 2 & 31 : 0);
    world_close(&world);

    uint32_t type, a, b;
    uint64_t epoch, body;
    uint8_t header[COLOCACHE_HEADER_BYTES] = {0};
    memcpy(header, data, size < sizeof header ? size : sizeof header);
    int rc = colocache_message_parse(header, &type, &epoch, &body, &a, &b);
    PROMISE(rc == 0 || rc == COLOCACHE_E_PACKET, "message_parse gave %d", rc);
    return 0;
}
