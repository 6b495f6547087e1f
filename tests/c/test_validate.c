/* SPDX-License-Identifier: Apache-2.0 */
/* validate.c: each invariant broken by hand, found, and mended again. */
#include "internal.h" /* first: a gate */

#include <pthread.h>

#include "rig.h"

static const uint64_t blocks[] = {100, 4160};
static struct rig rig;
static struct cc_block_entry *table;

/* part -- words 0, 1, 2 or summaries 3, 4, 5 of a block, as layout.h lays them out */
static uint64_t *part(uint32_t b, int which)
{
    uint64_t n_words = (blocks[b] + 63) / 64;
    uint64_t words_bytes = (n_words * 8 + 4095) / 4096 * 4096, summary_bytes = ((n_words + 63) / 64 * 8 + 4095) / 4096 * 4096;
    uint64_t at = which < 3 ? (uint64_t)which * words_bytes : 3 * words_bytes + (uint64_t)(which - 3) * summary_bytes;
    return (void *)((uint8_t *)rig.control + table[b].bitmap_offset + at);
}

static void finds(const char *what, int code)
{
    int rc = colocache_validate(rig.cc, 0);
    if (rc != code)
        CHECK_SAY("%s: validate gave %d (%s), expected %d", what, rc, colocache_last_error(), code);
}

static void begin(void)
{
    rig_open(&rig, 2, blocks, 4096, false);
    table = (void *)((uint8_t *)rig.control + CC_TABLE_OFFSET);
    rig_receive(&rig, 1, 0, 5, 1);
    rig_receive(&rig, 1, 1, 4159, 1);
    rig_checkpoint(&rig, 1, 300);
    rig_receive(&rig, 2, 0, 6, 1);
    rig_guest_write(&rig, 1, 7, 30);
}

static void tail_bits_are_found_in_every_bitmap(void)
{
    begin();
    for (int kind = 0; kind < 3; kind++) {
        part(0, kind)[1] |= 1ull << 36; /* page 100 of 100 */
        finds("tail", COLOCACHE_E_TAIL);
        CHECK(strstr(colocache_last_error(), "pc.ram") != NULL);
        part(0, kind)[1] &= ~(1ull << 36);
        part(0, kind)[1] |= 1ull << 63;
        finds("tail", COLOCACHE_E_TAIL);
        part(0, kind)[1] &= ~(1ull << 63);
    }
    rig_check(&rig, true);
    rig_close(&rig);
}

static void seal_refuses_tail_bits(void)
{
    begin();
    part(0, 0)[1] |= 1ull << 36;
    rig_device_state(&rig, 2, 0);
    CHECK_RC(COLOCACHE_E_TAIL, rig_try_seal(&rig, 2));
    part(0, 0)[1] &= ~(1ull << 36);
    CHECK_EQ(COLOCACHE_PHASE_LIVE, rig_phase(&rig));
    rig_check(&rig, true);
    rig_close(&rig);
}

static void hidden_words_are_found_in_every_bitmap(void)
{
    begin();
    for (int kind = 0; kind < 3; kind++) {
        for (int w = 0; w < 65; w += 64) { /* a word of each summary word: 4160 pages are 65 words */
            uint64_t word = part(1, kind)[w], summary = part(1, kind + 3)[w / 64];
            part(1, kind)[w] = 0b100;
            part(1, kind + 3)[w / 64] = 0;
            finds("hidden word", COLOCACHE_E_CORRUPT);
            part(1, kind)[w] = word;
            part(1, kind + 3)[w / 64] = summary;
        }
        part(1, kind + 3)[1] |= 0b10; /* word 65, which is not there */
        finds("summary past the last word", COLOCACHE_E_CORRUPT);
        part(1, kind + 3)[1] &= ~0b10ull;
    }
    rig_check(&rig, true);
    rig_close(&rig);
}

static void a_changed_flush_set_is_found_until_committed(void)
{
    begin();
    rig_device_state(&rig, 2, 10);
    rig_seal(&rig, 2);
    finds("nothing", 0);
    for (unsigned bit = 0; bit < 100; bit++) {
        uint64_t *words = part(0, 2), *summary = part(0, 5), before = *summary;
        words[bit / 64] ^= 1ull << (bit % 64);
        *summary |= 0b11;
        finds("flush set", COLOCACHE_E_CORRUPT);
        words[bit / 64] ^= 1ull << (bit % 64);
        *summary = before;
    }
    finds("nothing", 0);
    rig_flush(&rig);
    part(0, 2)[0] |= 1; /* may be written from here on */
    part(0, 5)[0] |= 1;
    finds("nothing", 0);
    rig_close(&rig);
}

static void flipped_bytes_of_record_and_device_state_are_found(void)
{
    begin();
    uint8_t *record = (uint8_t *)&rig.control->records[rig.control->commit_word & 1];
    for (unsigned i = 0; i < sizeof(struct cc_record); i++) {
        record[i] ^= 1;
        finds("record", COLOCACHE_E_CORRUPT);
        record[i] ^= 1;
    }
    uint32_t area = ((struct cc_record *)(void *)record)->device_area;
    uint8_t *device = (uint8_t *)rig.control + CC_DEVICES_OFFSET + area * 12288;
    for (unsigned i = 0; i < 300; i++) {
        device[i] ^= 0x80;
        finds("device state", COLOCACHE_E_CORRUPT);
        device[i] ^= 0x80;
    }
    finds("nothing", 0);
    rig_close(&rig);
}

static void reserved_and_impossible_heads_are_found(void)
{
    begin();
    uint64_t *words[] = {&rig.control->reserved1[0], &rig.control->reserved2[5], &rig.control->reserved3[0], &table[0].reserved[0],
                         &table[1].reserved[18]};
    for (unsigned i = 0; i < sizeof words / sizeof *words; i++) {
        *words[i] = 1ull << (i * 7);
        finds("reserved", COLOCACHE_E_CORRUPT);
        *words[i] = 0;
    }
    rig.control->memory_mode ^= 1;
    finds("memory mode", COLOCACHE_E_CORRUPT);
    rig.control->memory_mode ^= 1;
    uint64_t receiving = rig.control->receiving;
    rig.control->receiving = 0;
    finds("receiving behind the record", COLOCACHE_E_CORRUPT);
    rig.control->receiving = receiving;
    table[1].len_bytes -= 4096 * 64;
    finds("length", COLOCACHE_E_CORRUPT);
    table[1].len_bytes += 4096 * 64;
    table[1].bitmap_bytes += 4096;
    finds("bitmap bytes", COLOCACHE_E_CORRUPT);
    table[1].bitmap_bytes -= 4096;
    rig.control->magic ^= 1;
    finds("magic", COLOCACHE_E_NOT_COLOCACHE);
    rig.control->magic ^= 1;
    finds("nothing", 0);
    rig_close(&rig);
}

static void a_page_that_differs_without_a_bit_is_found(void)
{
    begin();
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    const uint64_t pages[][2] = {{0, 0}, {0, 99}, {1, 4159}, {1, 511}};
    for (unsigned i = 0; i < 4; i++) {
        uint8_t *guest = rig.blocks[pages[i][0]].guest + pages[i][1] * 4096;
        guest[4095] ^= 1; /* a write that nobody told of */
        CHECK_RC(0, colocache_validate(rig.cc, 0));
        CHECK_RC(COLOCACHE_E_CORRUPT, colocache_validate(rig.cc, 1));
        guest[4095] ^= 1;
    }
    rig.blocks[1].guest[7 * 4096] ^= 1; /* its SVM bit is set */
    rig.blocks[0].cache[6 * 4096] ^= 1; /* its PVM bit is set */
    CHECK_RC(0, colocache_validate(rig.cc, 1));
    rig_close(&rig);
}

/* ---- beside an owner at work: nothing is called corrupt ---------------------------------------------------------------- */

/* A thread that marks is between its two stores, as if its core had been taken away: a word is there, its summary comes late. */
static void *late_summary(void *summary)
{
    usleep(50000);
    __atomic_fetch_or((uint64_t *)summary, 1, __ATOMIC_SEQ_CST);
    cc_gate_leave(&rig.cc->mark_gate);
    return NULL;
}

static void a_mark_that_is_half_done_is_no_damage(void)
{
    pthread_t thread;
    begin();
    part(1, 4)[0] &= ~1ull; /* SVM bitmap, word 0: page 7 is in it */
    cc_gate_enter(&rig.cc->mark_gate);
    REQUIRE(pthread_create(&thread, NULL, late_summary, part(1, 4)) == 0);
    finds("half a mark", 0);
    pthread_join(thread, NULL);
    rig_check(&rig, true);
    rig_close(&rig);
}

static uint32_t stop;

static void *marks(void *arg)
{
    struct colocache *cc = arg;
    for (uint64_t pfn = 0; !__atomic_load_n(&stop, __ATOMIC_ACQUIRE); pfn = (pfn + 64 * 4097) % (1ull << 24)) {
        CHECK_RC(0, colocache_mark_dirty(cc, 0, pfn, 1));
        for (volatile int pause = 0; pause < 3000; pause++)
            ;
    }
    return NULL;
}

/* Large, so that a mark falls between the begin of a look and its end. */
static void marks_beside_validate_are_no_damage(void)
{
    struct colocache_options options = rig_options();
    struct colocache *cc;
    pthread_t thread;
    const uint64_t len_bytes = 64ull << 30;
    int control_fd = rig_memfd("control", 0), guest_fd = rig_memfd("guest", len_bytes), cache_fd = rig_memfd("cache", len_bytes);
    struct colocache_images block = {.struct_size = sizeof block,
                                     .name = "ram",
                                     .len_bytes = len_bytes,
                                     .page_size = 4096,
                                     .guest_fd = guest_fd,
                                     .cache_fd = cache_fd,
                                     .sparse = 1};
    REQUIRE(colocache_create(control_fd, &options, &cc) == 0);
    REQUIRE(colocache_add_block(cc, &block, NULL) == 0);
    __atomic_store_n(&stop, 0, __ATOMIC_RELEASE);
    REQUIRE(pthread_create(&thread, NULL, marks, cc) == 0);
    for (int round = 0; round < 150; round++)
        CHECK_RC(0, colocache_validate(cc, 0));
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    CHECK_RC(0, colocache_validate(cc, 0));
    colocache_close(cc);
    close(cache_fd);
    close(guest_fd);
    close(control_fd);
}

static void *looks(void *arg)
{
    (void)arg;
    do {
        struct colocache_status status = {.struct_size = sizeof status};
        CHECK_RC(0, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    } while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE));
    return NULL;
}

static void inspect_beside_an_owner_that_adds_blocks_finds_no_damage(void)
{
    static uint8_t images[256 * 2][4096] __attribute__((aligned(4096)));
    for (int round = 0; round < 8; round++) {
        struct colocache_options options = rig_options();
        pthread_t thread;
        memset(&rig, 0, sizeof rig);
        rig.control_fd = rig_memfd("control", 0);
        REQUIRE(colocache_create(rig.control_fd, &options, &rig.cc) == 0);
        __atomic_store_n(&stop, 0, __ATOMIC_RELEASE);
        REQUIRE(pthread_create(&thread, NULL, looks, NULL) == 0);
        for (unsigned i = 0; i < 256; i++) {
            char name[8];
            snprintf(name, sizeof name, "b%u", i);
            struct colocache_images block = {.struct_size = sizeof block,
                                             .name = name,
                                             .len_bytes = 4096,
                                             .page_size = 4096,
                                             .guest_fd = -1,
                                             .cache_fd = -1,
                                             .guest_addr = images[2 * i],
                                             .cache_addr = images[2 * i + 1]};
            CHECK_RC(0, colocache_add_block(rig.cc, &block, NULL));
        }
        __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
        pthread_join(thread, NULL);
        colocache_close(rig.cc);
        close(rig.control_fd);
    }
}

static void inspect_beside_an_owner_that_seals_finds_no_damage(void)
{
    pthread_t thread;
    begin();
    __atomic_store_n(&stop, 0, __ATOMIC_RELEASE);
    REQUIRE(pthread_create(&thread, NULL, looks, NULL) == 0);
    for (uint64_t epoch = 2; epoch < 2000; epoch++) {
        CHECK_RC(0, colocache_receive_zero(rig.cc, epoch, 0, epoch % 100, 1));
        void *state;
        CHECK_RC(0, colocache_device_state_begin(rig.cc, epoch, 1, &state));
        CHECK_RC(0, rig_try_seal(&rig, epoch));
        CHECK_RC(0, colocache_flush(rig.cc, NULL));
        CHECK_RC(0, colocache_loaded(rig.cc, 1));
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    rig_close(&rig);
}

static void inspect_still_tells_damage(void)
{
    struct colocache_status status = {.struct_size = sizeof status};
    begin();
    rig.control->memory_mode ^= 1;
    CHECK_RC(COLOCACHE_E_CORRUPT, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    rig.control->memory_mode ^= 1;
    rig_close(&rig);
}

int main(void)
{
    RUN(tail_bits_are_found_in_every_bitmap);
    RUN(seal_refuses_tail_bits);
    RUN(hidden_words_are_found_in_every_bitmap);
    RUN(a_changed_flush_set_is_found_until_committed);
    RUN(flipped_bytes_of_record_and_device_state_are_found);
    RUN(reserved_and_impossible_heads_are_found);
    RUN(a_page_that_differs_without_a_bit_is_found);
    RUN(a_mark_that_is_half_done_is_no_damage);
    RUN(marks_beside_validate_are_no_damage);
    RUN(inspect_beside_an_owner_that_adds_blocks_finds_no_damage);
    RUN(inspect_beside_an_owner_that_seals_finds_no_damage);
    RUN(inspect_still_tells_damage);
    return DONE();
}
