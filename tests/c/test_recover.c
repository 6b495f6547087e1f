/* SPDX-License-Identifier: Apache-2.0 */
/* recover.c: attach in each of the cases of its table, again and again, and refused with nothing touched when it is not to be trusted. */
#include "rig.h"

#include "checksum.h"

static const uint64_t blocks[] = {100, 4097};

static void begin(struct rig *rig, uint64_t committed)
{
    rig_open(rig, 2, blocks, 4096, false);
    for (uint64_t epoch = 1; epoch <= committed; epoch++) {
        for (uint64_t pfn = 0; pfn < 100; pfn += epoch)
            rig_receive(rig, epoch, 0, pfn, epoch);
        rig_receive(rig, epoch, 1, 4096, epoch);
        rig_checkpoint(rig, epoch, 100 * epoch);
    }
}

/* expect_attach -- what it says; twice, because it may die right after and be called again */
static void expect_attach(struct rig *rig, uint32_t action, uint64_t epoch, uint64_t receiving)
{
    CHECK_RC(0, rig_attach(rig));
    CHECK_EQ(action, rig->report.action);
    CHECK_EQ(epoch, rig->report.epoch);
    CHECK_EQ(receiving, rig->report.receiving_epoch);
    CHECK(strlen(rig->report.sentence) > 20);
}

/* whole_cache -- the oracle of a restart: guest RAM := cache */
static void whole_cache(struct rig *rig)
{
    for (uint32_t b = 0; b < rig->n_blocks; b++)
        memcpy(rig->blocks[b].guest_oracle, rig->blocks[b].cache_oracle, rig_len(&rig->blocks[b]));
}

static void nothing_sealed_starts_again(void)
{
    struct rig rig;
    uint8_t history[16];
    uint64_t n;
    begin(&rig, 0);
    rig_receive(&rig, 3, 0, 5, 1);
    rig_receive(&rig, 3, 1, 4096, 1);
    CHECK_RC(0, colocache_preflush(rig.cc, &n));
    rig_guest_write(&rig, 0, 6, 2);
    memcpy(history, rig.control->history_id, 16);
    rig_die(&rig);
    for (int i = 0; i < 2; i++) {
        expect_attach(&rig, COLOCACHE_RECOVERED_NOTHING, 0, 3);
        CHECK_EQ(COLOCACHE_PHASE_EMPTY, rig_phase(&rig));
        CHECK_RC(COLOCACHE_E_NO_STATE, colocache_failover(rig.cc, NULL));
        CHECK(memcmp(history, rig.control->history_id, 16) != 0); /* the peer must not take it for the same one */
        if (i == 0)
            rig_die(&rig);
    }
    for (uint32_t b = 0; b < 2; b++) {
        memset(rig.blocks[b].pvm, 0, blocks[b]);
        memset(rig.blocks[b].svm, 0, blocks[b]);
        for (uint64_t pfn = 0; pfn < blocks[b]; pfn++) /* the initial copy: every page, with a number not used before */
            rig_receive(&rig, 4, b, pfn, 9);
    }
    rig_checkpoint(&rig, 4, 0);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void sealed_and_not_flushed_is_replayed(void)
{
    struct rig rig;
    begin(&rig, 2);
    rig_receive(&rig, 3, 0, 5, 3);
    rig_receive(&rig, 3, 1, 4095, 3);
    rig_guest_write(&rig, 0, 6, 30);
    rig_guest_write(&rig, 1, 0, 30);
    rig_device_state(&rig, 3, 333);
    rig_seal(&rig, 3);
    rig_die(&rig);
    rig_check(&rig, false); /* not a page of guest RAM has changed yet */
    /* half of the flush was done, and one page was torn, when it died */
    memcpy(rig.blocks[0].guest + 5 * 4096, rig.blocks[0].cache + 5 * 4096, 2048);
    memcpy(rig.blocks[1].guest, rig.blocks[1].cache, 4096);
    expect_attach(&rig, COLOCACHE_RECOVERED_REPLAYED, 3, 3);
    CHECK_EQ(4, rig.report.n_pages);
    rig_flushed(&rig);
    rig_check(&rig, true);
    rig_check_device_state(&rig, 3, 333);
    CHECK_EQ(COLOCACHE_PHASE_LIVE, rig_phase(&rig));
    rig_die(&rig); /* and again: now the whole cache is copied */
    expect_attach(&rig, COLOCACHE_RECOVERED_RESTART, 3, 3);
    rig_check(&rig, true);
    rig_receive(&rig, 4, 0, 7, 4);
    rig_guest_write(&rig, 0, 8, 40);
    rig_checkpoint(&rig, 4, 4);
    rig_check(&rig, true);
    rig_close(&rig);
}

static void death_between_commit_word_and_clearing_leaves_only_extra_bits(void)
{
    struct rig rig;
    begin(&rig, 1);
    rig_receive(&rig, 2, 0, 5, 3);
    rig_guest_write(&rig, 1, 6, 30);
    rig_device_state(&rig, 2, 3);
    uint64_t bitmap_end = rig.control_bytes;
    const struct cc_block_entry *table = (const void *)((const uint8_t *)rig.control + CC_TABLE_OFFSET);
    uint64_t from = table[0].bitmap_offset;
    uint8_t *before = malloc(bitmap_end - from);
    REQUIRE(before);
    memcpy(before, (uint8_t *)rig.control + from, bitmap_end - from);
    rig_seal(&rig, 2);
    rig_die(&rig);
    /* PVM and SVM words and all summaries as they were before the clearing; the flush set stays the sealed one */
    for (uint32_t b = 0; b < 2; b++) {
        uint64_t words_bytes = ((blocks[b] + 63) / 64 * 8 + 4095) / 4096 * 4096, at = table[b].bitmap_offset;
        memcpy((uint8_t *)rig.control + at, before + (at - from), 2 * words_bytes);
    }
    rig.blocks[0].pvm[5] = rig.blocks[1].svm[6] = 1;
    expect_attach(&rig, COLOCACHE_RECOVERED_REPLAYED, 2, 2);
    rig_flushed(&rig);
    rig_check(&rig, true); /* summaries were rebuilt: validate says so */
    rig_receive(&rig, 3, 0, 7, 4);
    rig_checkpoint(&rig, 3, 0);
    rig_check(&rig, true);
    free(before);
    rig_close(&rig);
}

static void committed_and_nothing_newer_restarts(void)
{
    struct rig rig;
    begin(&rig, 2);
    rig_guest_write(&rig, 0, 50, 9); /* the dead VM's own pages, marked or not */
    memset(rig.blocks[1].guest + 1234 * 4096, 0x77, 4096);
    rig_die(&rig);
    expect_attach(&rig, COLOCACHE_RECOVERED_RESTART, 2, 2);
    whole_cache(&rig);
    rig_check(&rig, true);
    rig_check_device_state(&rig, 2, 200);
    CHECK_RC(0, colocache_failover(rig.cc, NULL)); /* there is a state, and it is epoch 2 */
    rig_close(&rig);
}

static void newer_pages_mean_no_restart_and_the_next_epoch_heals(void)
{
    for (int only_device_state = 0; only_device_state < 2; only_device_state++) {
        struct rig rig;
        begin(&rig, 2);
        rig_guest_write(&rig, 0, 50, 9);
        memset(rig.blocks[1].guest + 1234 * 4096, 0x77, 4096); /* written by the VM, in no bitmap: its log died with it */
        memset(rig.blocks[1].guest_oracle + 1234 * 4096, 0x77, 4096);
        if (only_device_state)
            rig_device_state(&rig, 3, 10);
        else
            rig_receive(&rig, 3, 0, 4, 3);
        rig_die(&rig);
        for (int again = 0; again < 2; again++) {
            expect_attach(&rig, COLOCACHE_RECOVERED_NO_RESTART, 0, 3);
            for (uint32_t b = 0; b < 2; b++)
                memset(rig.blocks[b].svm, 1, blocks[b]); /* every page counts as written */
            rig_check(&rig, true);
            CHECK_EQ(COLOCACHE_PHASE_EMPTY, rig_phase(&rig));
            CHECK_RC(COLOCACHE_E_NO_STATE, colocache_failover(rig.cc, NULL));
            if (again == 0)
                rig_die(&rig);
        }
        CHECK_RC(COLOCACHE_E_EPOCH, colocache_receive_zero(rig.cc, 3, 0, 0, 1)); /* its number was used */
        rig_receive(&rig, 4, 0, 4, 5);
        rig_receive(&rig, 4, 1, 9, 5);
        rig_checkpoint(&rig, 4, 40);
        rig_check(&rig, true);
        for (uint32_t b = 0; b < 2; b++)
            CHECK(memcmp(rig.blocks[b].guest, rig.blocks[b].cache, rig_len(&rig.blocks[b])) == 0);
        CHECK_RC(0, colocache_failover(rig.cc, NULL));
        rig_close(&rig);
    }
}

static void aborted_epoch_counts_as_newer_pages(void)
{
    struct rig rig;
    begin(&rig, 1);
    rig_receive(&rig, 2, 0, 4, 3);
    CHECK_RC(0, colocache_abort(rig.cc, 2, "test")); /* its pages are in the cache all the same */
    rig_die(&rig);
    expect_attach(&rig, COLOCACHE_RECOVERED_NO_RESTART, 0, 2);
    rig_close(&rig);
}

/* ---- refused: nothing is changed ------------------------------------------------------------------------------------ */

static void expect_refused(struct rig *rig, const char *what, int code)
{
    int rc = rig_attach(rig);
    if (rc != code)
        CHECK_SAY("%s: attach gave %d (%s), expected %d", what, rc, colocache_last_error(), code);
    rig_check(rig, false);
    if (rig->cc)
        rig_die(rig);
}

static void reseal(struct cc_record *record)
{
    record->checksum = cc_checksum(record, offsetof(struct cc_record, checksum));
}

static void every_damaged_byte_of_the_record_is_refused(void)
{
    struct rig rig;
    for (int committed = 0; committed < 2; committed++) {
        begin(&rig, 2);
        rig_receive(&rig, 3, 0, 5, 3);
        rig_guest_write(&rig, 1, 7, 30);
        rig_device_state(&rig, 3, 333);
        rig_seal(&rig, 3);
        if (committed)
            rig_flush(&rig);
        rig_die(&rig);
        const uint64_t generation = rig.control->commit_word & COLOCACHE_EPOCH_MAX;
        struct cc_record *record = &rig.control->records[generation & 1];
        for (unsigned i = 0; i < sizeof *record; i++) {
            ((uint8_t *)record)[i] ^= 0x10;
            expect_refused(&rig, "record byte", COLOCACHE_E_CORRUPT); /* never by going back to the older record */
            ((uint8_t *)record)[i] ^= 0x10;
        }
        /* also one that sums up but makes no sense */
        struct cc_record right = *record;
        struct cc_record wrongs[14];
        for (int i = 0; i < 14; i++)
            wrongs[i] = right;
        wrongs[0].epoch = 0;
        wrongs[1].committed = 2;
        wrongs[2].device_area = 2;
        wrongs[3].strategy = 9;
        wrongs[4].device_bytes = 10001;
        wrongs[5].reserved[0] = 1;
        wrongs[6].epoch = 4; /* newer than any page that ever came */
        wrongs[7].n_blocks = 3;
        wrongs[8].blocks[3] |= 1; /* a block that there never was */
        wrongs[9].reserved[8] = 1;
        wrongs[10].reserved1 = 1;
        wrongs[11].attachment_slot = 2;
        wrongs[12].spill_pages = wrongs[12].flush_pages + 1;
        wrongs[13].spill_inode = 1; /* without a page in it */
        for (int i = 0; i < 14; i++) {
            *record = wrongs[i];
            reseal(record);
            /* a whole record of another build's strategy is no damage: it says what to attach with, and not to remove it */
            expect_refused(&rig, "record that makes no sense", i == 3 ? COLOCACHE_E_STRATEGY : COLOCACHE_E_CORRUPT);
        }
        *record = right;
        rig.control->commit_word = cc_word_make(generation + 2); /* a word that names a record of another generation */
        expect_refused(&rig, "commit word", COLOCACHE_E_CORRUPT);
        rig.control->commit_word = cc_word_make(generation);
        CHECK_RC(0, rig_attach(&rig));
        CHECK_EQ(committed ? COLOCACHE_RECOVERED_RESTART : COLOCACHE_RECOVERED_REPLAYED, rig.report.action);
        rig_close(&rig);
    }
}

static void damaged_flush_set_bitmaps_and_device_state_are_refused(void)
{
    struct rig rig;
    begin(&rig, 2);
    rig_receive(&rig, 3, 0, 5, 3);
    rig_guest_write(&rig, 1, 7, 30);
    rig_device_state(&rig, 3, 333);
    rig_seal(&rig, 3);
    rig_die(&rig);
    struct cc_block_entry *table = (void *)((uint8_t *)rig.control + CC_TABLE_OFFSET);
    const struct cc_record *record = &rig.control->records[rig.control->commit_word & 1];
    uint64_t *pvm = (void *)((uint8_t *)rig.control + table[0].bitmap_offset), *svm = pvm + 512, *flush_set = svm + 512;
    uint8_t *device = (uint8_t *)rig.control + CC_DEVICES_OFFSET + record->device_area * 12288ull;

    for (unsigned bit = 0; bit < 100; bit += 7) {
        flush_set[bit / 64] ^= 1ull << (bit % 64);
        expect_refused(&rig, "flush set", COLOCACHE_E_CORRUPT);
        flush_set[bit / 64] ^= 1ull << (bit % 64);
    }
    uint64_t *tails[] = {pvm, svm, flush_set};
    for (int i = 0; i < 3; i++) {
        tails[i][1] |= 1ull << 36; /* page 100 of 100 */
        expect_refused(&rig, "tail", COLOCACHE_E_TAIL);
        tails[i][1] &= ~(1ull << 36);
    }
    const unsigned bytes[] = {0, 100, 332};
    uint64_t *summary = (void *)((uint8_t *)rig.control + table[0].bitmap_offset + 3 * 4096);
    for (int i = 0; i < 3; i++) {
        device[bytes[i]] ^= 1;
        summary[0] ^= 2; /* a summary that does not fit its words is rebuilt, but not by an attach that is refused */
        const uint64_t was = summary[0];
        expect_refused(&rig, "device state", COLOCACHE_E_CORRUPT);
        CHECK_EQ(was, summary[0]);
        summary[0] ^= 2;
        device[bytes[i]] ^= 1;
    }
    rig.control->receiving = cc_word_make(2);
    expect_refused(&rig, "receiving too old", COLOCACHE_E_CORRUPT);
    rig.control->receiving = cc_word_make(4);
    expect_refused(&rig, "pages over a sealed epoch", COLOCACHE_E_CORRUPT);
    rig.control->receiving = cc_word_make(3);
    device[333] ^= 1;                                                            /* past its end: nobody's business */
    memset((uint8_t *)rig.control + table[0].bitmap_offset + 3 * 4096, 0, 4096); /* summaries are not trusted: hidden words are found */
    memset((uint8_t *)rig.control + table[0].bitmap_offset + 5 * 4096, 0, 4096);
    expect_attach(&rig, COLOCACHE_RECOVERED_REPLAYED, 3, 3);
    rig_flushed(&rig);
    rig_check(&rig, true);
    rig_close(&rig);
}

/* hugetlbfs does not tell its holes, and a block of which one page was there must not take all its huge pages at an attach. */
static void attach_fills_no_hole_of_a_sparse_hugetlb_block(void)
{
    enum { HUGE_PAGE = 2 << 20, HUGE_PAGES = 8 };
    struct colocache_options options = rig_options();
    struct colocache_recovery report;
    struct colocache *cc;
    struct stat guest, cache;
    const uint64_t len_bytes = (uint64_t)HUGE_PAGES * HUGE_PAGE;
    int control_fd = rig_memfd("control", 0), guest_fd = memfd_create("guest", MFD_CLOEXEC | MFD_HUGETLB),
        cache_fd = memfd_create("cache", MFD_CLOEXEC | MFD_HUGETLB);
    if (guest_fd < 0 || cache_fd < 0 || ftruncate(guest_fd, (off_t)len_bytes) != 0 || ftruncate(cache_fd, (off_t)len_bytes) != 0)
        SKIP("no memfd of huge pages");
    struct colocache_images images = {.struct_size = sizeof images,
                                      .name = "ram",
                                      .len_bytes = len_bytes,
                                      .page_size = 4096,
                                      .sparse = 1,
                                      .guest_fd = guest_fd,
                                      .cache_fd = cache_fd};
    REQUIRE(colocache_create(control_fd, &options, &cc) == 0);
    int rc = colocache_add_block(cc, &images, NULL);
    if (rc == COLOCACHE_E_NO_MEMORY) {
        colocache_close(cc);
        SKIP("fewer than 16 huge pages are free");
    }
    static uint8_t page[4096];
    void *state;
    memset(page, 0x42, sizeof page);
    const uint64_t pfn = 3 * HUGE_PAGE / 4096 + 17;
    CHECK_RC(0, colocache_receive_page(cc, 1, 0, pfn, page, sizeof page));
    CHECK_RC(0, colocache_device_state_begin(cc, 1, 0, &state));
    struct colocache_seal_args args = rig_seal_args(1);
    CHECK_RC(0, colocache_seal(cc, &args, NULL));
    CHECK_RC(0, colocache_flush(cc, NULL));
    CHECK_RC(0, colocache_loaded(cc, 1));
    CHECK_RC(0, colocache_validate(cc, 1));
    for (int again = 0; again < 2; again++) {
        colocache_close(cc);
        CHECK_RC(0, colocache_attach(control_fd, &options, &images, 1, &report, &cc));
        CHECK_EQ(COLOCACHE_RECOVERED_RESTART, report.action);
        CHECK_EQ(HUGE_PAGE / 4096, report.n_pages);
        CHECK_RC(0, colocache_dirty_log_lost(cc)); /* looks for what is there, too */
        CHECK_RC(0, colocache_validate(cc, 1));
        REQUIRE(fstat(guest_fd, &guest) == 0 && fstat(cache_fd, &cache) == 0);
        CHECK_EQ(HUGE_PAGE, guest.st_blocks * 512);
        CHECK_EQ(HUGE_PAGE, cache.st_blocks * 512);
    }
    uint8_t found[4096];
    CHECK(pread(guest_fd, found, sizeof found, (off_t)(pfn * 4096)) == 4096 && memcmp(found, page, sizeof page) == 0);
    colocache_close(cc);
    close(cache_fd);
    close(guest_fd);
    close(control_fd);
}

int main(void)
{
    RUN(nothing_sealed_starts_again);
    RUN(sealed_and_not_flushed_is_replayed);
    RUN(death_between_commit_word_and_clearing_leaves_only_extra_bits);
    RUN(committed_and_nothing_newer_restarts);
    RUN(newer_pages_mean_no_restart_and_the_next_epoch_heals);
    RUN(aborted_epoch_counts_as_newer_pages);
    RUN(every_damaged_byte_of_the_record_is_refused);
    RUN(damaged_flush_set_bitmaps_and_device_state_are_refused);
    RUN(attach_fills_no_hole_of_a_sparse_hugetlb_block);
    return DONE();
}
