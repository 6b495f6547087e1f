/* SPDX-License-Identifier: Apache-2.0 */
/* checkpoint.c, flush_set.c, flush_copy.c: each transition of the phase and each code it can give, and guest RAM after each flush. */
#include "rig.h"

#include "internal.h"

#include "block.h"
#include "epoch.h"

static const uint64_t blocks[] = {100, 4097, 1};

static void flush_makes_guest_ram_the_epoch(void)
{
    struct rig rig;
    struct dice dice = {31};
    rig_open(&rig, 3, blocks, 4096, false);
    for (uint64_t epoch = 1; epoch <= 12; epoch++) {
        for (uint64_t i = 0; i < below(&dice, 200); i++) {
            uint32_t b = (uint32_t)below(&dice, 3);
            rig_receive(&rig, epoch, b, below(&dice, blocks[b]), epoch);
        }
        for (uint64_t i = 0; i < below(&dice, 200); i++) {
            uint32_t b = (uint32_t)below(&dice, 3);
            rig_guest_write(&rig, b, below(&dice, blocks[b]), epoch + 1000);
        }
        if (epoch % 4 == 0) { /* everything, so that the pool has work for all its threads */
            for (uint64_t pfn = 0; pfn < blocks[1]; pfn++)
                rig_receive(&rig, epoch, 1, pfn, epoch + 7);
        }
        rig_check(&rig, true); /* the SVM's own, before the flush */
        rig_checkpoint(&rig, epoch, epoch * 100);
        rig_check(&rig, true);
        CHECK(memcmp(rig.blocks[1].guest, rig.blocks[1].cache, 4097 * 4096) == 0);
        rig_check_device_state(&rig, epoch, epoch * 100);
    }
    rig_close(&rig);
}

static void first_and_last_page_alone(void)
{
    const uint64_t lengths[] = {1, 63, 64, 65, 4096, 4097};
    for (unsigned l = 0; l < sizeof lengths / sizeof *lengths; l++) {
        struct rig rig;
        rig_open(&rig, 1, &lengths[l], 4096, false);
        rig_receive(&rig, 1, 0, lengths[l] - 1, 1); /* the PVM's page */
        rig_checkpoint(&rig, 1, 0);
        rig_guest_write(&rig, 0, lengths[l] - 1, 2); /* the SVM's page: it must go back */
        rig_guest_write(&rig, 0, 0, 2);
        rig_checkpoint(&rig, 2, 0);
        rig_check(&rig, true);
        CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache, rig_len(&rig.blocks[0])) == 0);
        rig_close(&rig);
    }
}

static void bits_move_at_seal_and_marks_after_it_belong_to_the_next_epoch(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 5, 1);
    rig_checkpoint(&rig, 1, 0);
    rig_receive(&rig, 2, 0, 7, 2);
    rig_guest_write(&rig, 0, 9, 2);
    rig_device_state(&rig, 2, 3);
    rig_seal(&rig, 2); /* rig_seal's oracle has PVM and SVM bits zero from here on */
    rig_check(&rig, true);
    rig_check_bitmap(&rig, 0, COLOCACHE_BITMAP_FLUSH_SET, rig.blocks[0].flush);
    CHECK_RC(0, colocache_mark_dirty(rig.cc, 0, 50, 1)); /* between seal and flush: device-state load */
    rig.blocks[0].svm[50] = 1;
    rig_flush(&rig);
    rig_check(&rig, true);
    rig_fill(rig.blocks[0].guest + 50 * 4096, 4096, 3, 0, 50);
    rig_fill(rig.blocks[0].guest_oracle + 50 * 4096, 4096, 3, 0, 50);
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    rig_check(&rig, true);
    rig_checkpoint(&rig, 3, 0); /* and is undone by the next one */
    rig_check(&rig, true);
    CHECK(memcmp(rig.blocks[0].guest + 50 * 4096, rig.blocks[0].cache + 50 * 4096, 4096) == 0);
    rig_close(&rig);
}

static int veto(void *context, const void *state, uint64_t len_bytes)
{
    uint64_t *seen = context;
    seen[0]++;
    seen[1] = len_bytes;
    seen[2] = len_bytes ? *(const uint8_t *)state : 0;
    return (int)seen[3];
}

static void a_veto_aborts_and_loses_nothing(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 5, 1);
    rig_checkpoint(&rig, 1, 50);
    rig_receive(&rig, 2, 1, 4096, 2);
    rig_guest_write(&rig, 0, 9, 2);
    rig_device_state(&rig, 2, 3);
    uint64_t seen[4] = {0, 0, 0, 7}, word = rig.control->commit_word;
    struct colocache_seal_args args = rig_seal_args(2);
    args.check = veto;
    args.check_context = seen;
    CHECK_RC(COLOCACHE_E_VETO, colocache_seal(rig.cc, &args, NULL));
    CHECK(seen[0] == 1 && seen[1] == 3 && seen[2] == 2);
    CHECK_EQ(word, rig.control->commit_word);
    CHECK_EQ(COLOCACHE_PHASE_LIVE, rig_phase(&rig));
    rig_check(&rig, true); /* bits, cache and guest RAM as they were */
    rig_check_device_state(&rig, 1, 50);
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_flush(rig.cc, NULL));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_seal(rig.cc, &args, NULL)); /* its number is spent */
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 2, 0, 0, 1));
    args = rig_seal_args(3); /* the next epoch contains what came for 2 */
    args.check = veto;
    args.check_context = seen;
    seen[3] = 0;
    rig_device_state(&rig, 3, 4);
    CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
    CHECK_EQ(2, seen[0]);
    CHECK_RC(0, colocache_flush(rig.cc, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK(memcmp(rig.blocks[1].guest, rig.blocks[1].cache, 4097 * 4096) == 0);
    CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache, 100 * 4096) == 0);
    rig_close(&rig);
}

static void incomplete_epochs_are_not_sealed(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    struct colocache_seal_args args = rig_seal_args(1);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_seal(rig.cc, &args, NULL)); /* nothing is open */
    args.epoch = 0;
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_seal(rig.cc, &args, NULL)); /* nor does 0 stand for nothing */
    CHECK_EQ(0, rig.control->commit_word);
    rig_receive(&rig, 1, 0, 5, 1);
    rig_receive_zero(&rig, 1, 0, 6, 2);
    args.epoch = 2;
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_seal(rig.cc, &args, NULL)); /* another one is: it goes on */
    rig_device_state(&rig, 1, 0);
    args.epoch = 1;
    args.n_pages = 4;
    CHECK_RC(COLOCACHE_E_INCOMPLETE, colocache_seal(rig.cc, &args, NULL));
    CHECK(strstr(colocache_last_error(), "4 pages were sent, 3 came") != NULL);
    rig_receive(&rig, 2, 0, 7, 1);
    args = rig_seal_args(2);
    CHECK_RC(COLOCACHE_E_INCOMPLETE, colocache_seal(rig.cc, &args, NULL)); /* no device state */
    rig_receive(&rig, 3, 0, 8, 1);
    rig_device_state(&rig, 3, 0);
    args = rig_seal_args(3);
    args.n_pages = 2;
    CHECK_RC(COLOCACHE_E_INCOMPLETE, colocache_seal(rig.cc, &args, NULL)); /* more than came */
    rig_receive(&rig, 4, 0, 8, 1);
    rig_device_state(&rig, 4, 0);
    args = rig_seal_args(4);
    args.n_pages = 1;
    struct colocache_seal_result result = {.struct_size = sizeof result};
    CHECK_RC(0, colocache_seal(rig.cc, &args, &result));
    CHECK_EQ(4, result.flush_pages); /* 5 to 8: of all the epochs that were given up, too */
    rig_close(&rig);
}

/* late_page -- a receiver that was inside before the seal began is done with its page only while the VM looks at the state */
static int late_page(void *context, const void *state, uint64_t len_bytes)
{
    struct rig *rig = context;
    (void)state, (void)len_bytes;
    rig_fill(rig->blocks[0].cache, 4096, 6, 0, 0);
    rig_fill(rig->blocks[0].cache_oracle, 4096, 6, 0, 0);
    cc_bitmap_set(&rig->cc->blocks[0].bitmaps[COLOCACHE_BITMAP_PVM], 0, 1);
    cc_epoch_received(rig->cc, 1);
    cc_epoch_leave(rig->cc);
    rig->blocks[0].pvm[0] = 1;
    return 0;
}

static void a_page_that_comes_while_the_vm_checks_is_counted(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 5, 1);
    rig_device_state(&rig, 1, 3);
    CHECK_RC(0, cc_epoch_enter(rig.cc, 1));
    struct colocache_seal_args args = rig_seal_args(1);
    args.n_pages = 1; /* right when the seal begins, one too few when its last receiver is out */
    args.check = late_page;
    args.check_context = &rig;
    CHECK_RC(COLOCACHE_E_INCOMPLETE, colocache_seal(rig.cc, &args, NULL));
    CHECK_EQ(0, rig.control->commit_word);
    rig_check(&rig, true);
    rig_checkpoint(&rig, 2, 0); /* the page belongs to the next epoch that is sealed */
    rig_check(&rig, true);
    CHECK(memcmp(rig.blocks[0].guest, rig.blocks[0].cache, 4096) == 0);
    rig_close(&rig);
}

static void calls_in_the_wrong_order_change_nothing(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    struct colocache_seal_args args = rig_seal_args(1);
    uint64_t n;
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_flush(rig.cc, NULL));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_loaded(rig.cc, 1));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_abort(rig.cc, 1, "nothing is open"));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_abort(rig.cc, 0, "nothing is open"));
    rig_receive(&rig, 1, 0, 5, 1);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_abort(rig.cc, 2, "another is open"));
    rig_device_state(&rig, 1, 9);
    args.struct_size = 8;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_seal(rig.cc, &args, NULL));
    struct colocache_seal_result bad = {.struct_size = 3};
    args = rig_seal_args(1);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_seal(rig.cc, &args, &bad));
    CHECK_EQ(0, rig.control->commit_word);
    rig_seal(&rig, 1);
    CHECK_RC(COLOCACHE_E_SEALED, colocache_seal(rig.cc, &args, NULL));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_loaded(rig.cc, 1));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_abort(rig.cc, 1, "too late"));
    CHECK_RC(COLOCACHE_E_ORDER, colocache_preflush(rig.cc, &n));
    struct colocache_flush_result bad_flush = {.struct_size = 70000};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_flush(rig.cc, &bad_flush));
    rig_check(&rig, true);
    rig_flush(&rig);
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_flush(rig.cc, NULL));
    CHECK_RC(COLOCACHE_E_SEALED, colocache_seal(rig.cc, &args, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_loaded(rig.cc, 1));
    CHECK_RC(COLOCACHE_E_NOT_SEALED, colocache_flush(rig.cc, NULL));
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_abort(rig.cc, 1, "over"));
    CHECK_RC(COLOCACHE_E_ORDER, colocache_preflush(rig.cc, &n));
    CHECK_EQ(COLOCACHE_PHASE_LIVE, rig_phase(&rig));
    rig_check(&rig, true);
    rig_close(&rig);
}

static void abort_keeps_bits_and_cache(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    rig_receive(&rig, 1, 0, 0, 1);
    rig_checkpoint(&rig, 1, 5);
    rig_receive(&rig, 2, 1, 64, 2);
    rig_guest_write(&rig, 1, 65, 2);
    rig_device_state(&rig, 2, 6);
    CHECK_RC(0, colocache_abort(rig.cc, 2, NULL));
    rig_check(&rig, true);
    CHECK_RC(COLOCACHE_E_EPOCH, colocache_abort(rig.cc, 2, "twice"));
    CHECK_RC(COLOCACHE_E_EPOCH, rig_try_seal(&rig, 2));
    rig_device_state(&rig, 3, 7); /* an epoch of which only the device state came */
    rig_seal(&rig, 3);
    CHECK(rig.blocks[1].flush[64] && rig.blocks[1].flush[65]);
    rig_flush(&rig);
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    rig_check(&rig, true);
    rig_close(&rig);
}

static void preflush_leaves_less_for_the_first_epoch(void)
{
    struct rig rig;
    uint64_t n = 9;
    rig_open(&rig, 3, blocks, 4096, false);
    CHECK_RC(0, colocache_preflush(rig.cc, &n));
    CHECK_EQ(0, n);
    for (uint32_t b = 0; b < 3; b++) {
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn++) {
            rig_receive(&rig, 1, b, pfn, 1);
            rig.blocks[b].flush[pfn] = 1;
        }
    }
    CHECK_RC(0, colocache_preflush(rig.cc, &n));
    CHECK_EQ(100 + 4097 + 1, n);
    rig_flushed(&rig);
    for (uint32_t b = 0; b < 3; b++)
        memset(rig.blocks[b].pvm, 0, blocks[b]);
    rig_check(&rig, true);
    CHECK_EQ(0, rig.control->commit_word); /* nothing to take over from, all the same */
    CHECK_RC(COLOCACHE_E_NO_STATE, colocache_failover(rig.cc, NULL));
    rig_receive(&rig, 1, 1, 77, 2); /* it came again */
    rig_checkpoint(&rig, 1, 0);
    rig_check(&rig, true);
    CHECK(memcmp(rig.blocks[1].guest, rig.blocks[1].cache, 4097 * 4096) == 0);
    rig_close(&rig);
}

static struct rig *arriving; /* the copy under the test's eyes: page 77 comes again just when it has been copied */

static void copy_and_let_the_page_come_again(void *dst, const void *src, uint64_t n_bytes)
{
    memcpy(dst, src, n_bytes);
    if (arriving && (uint8_t *)dst == cc_guest_page(&arriving->cc->blocks[1], 77)) {
        rig_receive(arriving, 1, 1, 77, 2);
        rig_receive(arriving, 1, 1, 79, 2); /* in the same word, and not copied before */
        arriving = NULL;
    }
}

static void a_page_that_comes_while_preflush_copies_it_is_copied_again(void)
{
    struct rig rig;
    uint64_t n;
    rig_open(&rig, 2, blocks, 4096, false);
    rig_receive(&rig, 1, 1, 77, 1);
    arriving = &rig;
    rig.cc->copy.run = copy_and_let_the_page_come_again;
    CHECK_RC(0, colocache_preflush(rig.cc, &n));
    CHECK_EQ(1, n);
    CHECK(arriving == NULL);
    rig_check_bitmap(&rig, 1, COLOCACHE_BITMAP_PVM, rig.blocks[1].pvm); /* bits are taken before the copy, never after it */
    rig_checkpoint(&rig, 1, 0);
    rig_check(&rig, true);
    CHECK(memcmp(rig.blocks[1].guest, rig.blocks[1].cache, 4097 * 4096) == 0);
    rig_close(&rig);
}

static void every_copy_variant_and_thread_count_flushes_the_same(void)
{
    for (uint32_t variant = COLOCACHE_COPY_LIBC; variant <= COLOCACHE_COPY_NEON; variant++) {
        if (colocache_copy_supported((int)variant) != 0)
            continue;
        for (uint32_t n_threads = 1; n_threads <= 5; n_threads += 2) {
            struct rig rig;
            struct dice dice = {variant * 10 + n_threads};
            rig_open(&rig, 2, blocks, 4096, false);
            rig_die(&rig);
            struct colocache_options options = {.struct_size = sizeof options, .n_threads = n_threads, .copy_variant = variant};
            struct colocache_images images[2] = {rig_images(&rig.blocks[0]), rig_images(&rig.blocks[1])};
            CHECK_RC(0, colocache_attach(rig.control_fd, &options, images, 2, NULL, &rig.cc));
            for (uint64_t pfn = 0, n; pfn < blocks[1]; pfn += n) { /* runs of 1 to 64 pages, and gaps */
                n = 1ull << (roll(&dice) % 7);
                bool dirty = roll(&dice) & 1;
                for (uint64_t i = pfn; dirty && i < pfn + n && i < blocks[1]; i++)
                    rig_receive(&rig, 1, 1, i, 1);
            }
            rig_checkpoint(&rig, 1, 0);
            rig_check(&rig, true);
            struct colocache_status status = {.struct_size = sizeof status};
            CHECK_RC(0, colocache_get_status(rig.cc, &status));
            CHECK_EQ(variant, status.copy_variant);
            CHECK_EQ(n_threads, status.n_threads);
            CHECK_EQ(n_threads, rig.flush_threads);
            rig_close(&rig);
        }
    }
}

static void pieces_that_are_full_of_short_runs_lose_no_page(void)
{
    struct rig rig;
    rig_open(&rig, 2, blocks, 4096, false);
    for (uint64_t pfn = 0; pfn < blocks[1]; pfn++) {
        if (pfn % 9 != 8) /* runs of 8: 256 pages come to the largest piece */
            rig_receive(&rig, 1, 1, pfn, 1);
    }
    rig_checkpoint(&rig, 1, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static bool attachment_is(struct rig *rig, uint32_t slot, uint64_t n_bytes, uint64_t checksum)
{
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(rig->cc, &status));
    return status.attachment_slot == slot && status.attachment_bytes == n_bytes && status.attachment_checksum == checksum;
}

static void what_lies_elsewhere_is_the_sealed_epochs_until_the_next_is_sealed(void)
{
    struct rig rig;
    rig_open(&rig, 3, blocks, 4096, false);
    CHECK(attachment_is(&rig, 0, 0, 0));
    rig_receive(&rig, 1, 0, 5, 1);
    rig_device_state(&rig, 1, 7);
    struct colocache_seal_args args = rig_seal_args(1);
    args.attachment_slot = 1;
    args.attachment_bytes = UINT64_MAX;
    args.attachment_checksum = 0x1234567812345678;
    CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
    CHECK(attachment_is(&rig, 1, UINT64_MAX, 0x1234567812345678));
    CHECK_RC(0, colocache_flush(rig.cc, NULL));
    CHECK_RC(0, colocache_loaded(rig.cc, 1));
    CHECK(attachment_is(&rig, 1, UINT64_MAX, 0x1234567812345678));
    struct colocache_status seen = {.struct_size = sizeof seen};
    struct colocache_block_info infos[3];
    uint32_t room = 3;
    CHECK_RC(0, colocache_inspect(rig.control_fd, &seen, infos, &room));
    CHECK(seen.attachment_slot == 1 && seen.attachment_bytes == UINT64_MAX && seen.attachment_checksum == 0x1234567812345678);
    rig_receive(&rig, 2, 0, 5, 2);
    rig_device_state(&rig, 2, 7);
    args = rig_seal_args(2);
    args.attachment_slot = 2;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_seal(rig.cc, &args, NULL)); /* before anything is sealed */
    args.attachment_slot = 0;
    args.reserved = 1;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_seal(rig.cc, &args, NULL));
    CHECK(attachment_is(&rig, 1, UINT64_MAX, 0x1234567812345678));
    args.struct_size = offsetof(struct colocache_seal_args, attachment_bytes); /* a caller that knows of none: reads no further */
    CHECK_RC(0, colocache_seal(rig.cc, &args, NULL));
    CHECK(attachment_is(&rig, 0, 0, 0));
    rig_close(&rig);
}

int main(void)
{
    RUN(flush_makes_guest_ram_the_epoch);
    RUN(first_and_last_page_alone);
    RUN(bits_move_at_seal_and_marks_after_it_belong_to_the_next_epoch);
    RUN(a_veto_aborts_and_loses_nothing);
    RUN(incomplete_epochs_are_not_sealed);
    RUN(a_page_that_comes_while_the_vm_checks_is_counted);
    RUN(calls_in_the_wrong_order_change_nothing);
    RUN(abort_keeps_bits_and_cache);
    RUN(preflush_leaves_less_for_the_first_epoch);
    RUN(a_page_that_comes_while_preflush_copies_it_is_copied_again);
    RUN(pieces_that_are_full_of_short_runs_lose_no_page);
    RUN(what_lies_elsewhere_is_the_sealed_epochs_until_the_next_is_sealed);
    RUN(every_copy_variant_and_thread_count_flushes_the_same);
    return DONE();
}
