/* SPDX-License-Identifier: Apache-2.0 */
/* checksum.c against its definition, computed byte by byte; and error.c's sentences. */
#include "checksum.h"

#include <errno.h>

#include "check.h"

/* As checksum.h defines it, with nothing shared with the code but the constants. */
static uint64_t by_definition(const uint8_t *bytes, uint64_t len)
{
    uint64_t sum = len;
    for (uint64_t i = 0; i < (len + 7) / 8; i++) {
        uint64_t w = 0;
        for (uint64_t k = 0; k < 8 && 8 * i + k < len; k++)
            w += (uint64_t)bytes[8 * i + k] << (8 * k);
        uint64_t v = w ^ ((i + 1) * 0x9E3779B97F4A7C15ull);
        sum += (v % 0x100000000ull) * (v / 0x100000000ull) + v;
    }
    sum = (sum ^ (sum / 0x80000000ull)) * 0xBF58476D1CE4E5B9ull;
    return sum ^ (sum >> 29);
}

static void checksum_is_its_definition(void)
{
    struct dice dice = {8};
    uint8_t bytes[600];
    for (unsigned i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)roll(&dice);
    for (uint64_t len = 0; len <= 520; len++) {
        for (unsigned at = 0; at < 9; at++) /* any alignment */
            CHECK_EQ(by_definition(bytes + at, len), cc_checksum(bytes + at, len));
        CHECK_EQ(cc_checksum(bytes, len), colocache_checksum(bytes, len));
    }
    CHECK_EQ(0, cc_checksum(NULL, 0));
}

static void every_bit_and_every_length_counts(void)
{
    uint8_t bytes[100] = {0};
    for (uint64_t len = 1; len <= sizeof bytes; len++) {
        uint64_t whole = cc_checksum(bytes, len);
        CHECK(whole != cc_checksum(bytes, len - 1)); /* zero bytes at the end too */
        for (uint64_t bit = 0; bit < len * 8; bit++) {
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            CHECK(cc_checksum(bytes, len) != whole);
            bytes[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
    }
}

static void words_may_not_change_places(void)
{
    uint64_t a[3] = {1, 2, 3}, b[3] = {2, 1, 3};
    CHECK(cc_checksum(a, sizeof a) != cc_checksum(b, sizeof b));
}

static void every_code_has_its_own_sentence(void)
{
    for (int code = COLOCACHE_E_ARGUMENT; code >= COLOCACHE_E_RECEIVING; code--) {
        CHECK(strlen(colocache_strerror(code)) > 10);
        CHECK(strcmp(colocache_strerror(code), "unknown error code") != 0);
        for (int other = COLOCACHE_E_ARGUMENT; other > code; other--)
            CHECK(strcmp(colocache_strerror(code), colocache_strerror(other)) != 0);
    }
    CHECK(strcmp(colocache_strerror(0), "no error") == 0);
    CHECK(strcmp(colocache_strerror(-ENOENT), strerror(ENOENT)) == 0);
    CHECK(strcmp(colocache_strerror(-12345), "unknown error code") == 0);
    CHECK(strcmp(colocache_strerror(COLOCACHE_E_RECEIVING - 1), "unknown error code") == 0);
    CHECK(colocache_version() > 0);
}

static void no_handle_is_an_error_not_a_crash(void)
{
    void *addr;
    uint64_t n;
    uint8_t page[4096] = {0};
    struct colocache_status status = {.struct_size = sizeof status};
    struct colocache_seal_args args = {.struct_size = sizeof args};
    struct colocache_images images = {.struct_size = sizeof images};
    CHECK_RC(0, colocache_close(NULL));
    CHECK(colocache_add_block(NULL, &images, NULL) < 0);
    CHECK(colocache_receive_page(NULL, 1, 0, 0, page, 4096) < 0);
    CHECK(colocache_receive_zero(NULL, 1, 0, 0, 1) < 0);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_receive_stream(NULL, 0, 0, 0, page, &n));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_device_state_begin(NULL, 1, 0, &addr));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_device_state(NULL, (const void **)&addr, &n));
    CHECK(colocache_mark_dirty(NULL, 0, 0, 1) < 0);
    CHECK(colocache_sync_words(NULL, 0, 0, 1, &n) < 0);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sync_dirty_log(NULL, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_dirty_log_lost(NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_source_discard(NULL));
    CHECK_RC(0, colocache_source_close(NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_seal(NULL, &args, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_flush(NULL, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_loaded(NULL, 1));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_preflush(NULL, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_abort(NULL, 1, "x"));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_failover(NULL, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_validate(NULL, 0));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_get_status(NULL, &status));
    CHECK(colocache_get_block(NULL, 0, NULL) < 0);
    CHECK(colocache_get_bitmap(NULL, 0, 0, &n, 1) < 0);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(-1, NULL, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_create(NULL));
    CHECK_RC(0, colocache_sender_close(NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_mark_all(NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_received(NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_resend(NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_count(NULL, NULL, NULL));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_sender_send(NULL, 0, 0, 1, 0, 1, 0, NULL));
    CHECK(colocache_sender_mark_dirty(NULL, 0, 0, 1) < 0);
}

int main(void)
{
    RUN(checksum_is_its_definition);
    RUN(every_bit_and_every_length_counts);
    RUN(words_may_not_change_places);
    RUN(every_code_has_its_own_sentence);
    RUN(no_handle_is_an_error_not_a_crash);
    return DONE();
}
