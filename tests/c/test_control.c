/* SPDX-License-Identifier: Apache-2.0 */
/* control.c: layout of the region, one owner, heads that are damaged or foreign. */
#include "rig.h"

#include <signal.h>
#include <sys/wait.h>

static const uint64_t two_blocks[] = {100, 4097};

static void a_new_region_is_laid_out_as_written_down(void)
{
    struct rig rig;
    rig_open(&rig, 2, two_blocks, 4096, false);
    const struct cc_control *control = rig.control;
    CHECK(memcmp(&control->magic, "LOCCACHE", 8) == 0);
    CHECK_EQ(CC_LAYOUT_VERSION, control->layout_version);
    CHECK_EQ(cc_layout_stamp(), control->stamp);
    CHECK_EQ(cc_word_make(2), control->n_blocks);
    CHECK_EQ(getpid(), control->owner_pid);
    CHECK_EQ(cc_word_make(10000), control->device_state_max_bytes);
    CHECK_EQ(0, control->commit_word);
    CHECK_EQ(0, control->receiving);
    uint8_t none[16] = {0};
    CHECK(memcmp(control->history_id, none, 16) != 0);

    const struct cc_block_entry *table = (const void *)((const uint8_t *)control + CC_TABLE_OFFSET);
    uint64_t devices_end = CC_DEVICES_OFFSET + 2 * 12288;
    CHECK(strcmp(table[0].name, "pc.ram") == 0 && strcmp(table[1].name, "boot") == 0);
    CHECK_EQ(devices_end, table[0].bitmap_offset);
    CHECK_EQ(6 * 4096, table[0].bitmap_bytes); /* 2 words and 1 summary word: a page for each of the six */
    CHECK_EQ(devices_end + 6 * 4096, table[1].bitmap_offset);
    CHECK_EQ(rig.control_bytes, table[1].bitmap_offset + table[1].bitmap_bytes);

    /* a bit set through the API is where the layout says: PVM words first, then SVM words */
    rig_receive(&rig, 1, 0, 65, 1);
    CHECK_RC(0, colocache_mark_dirty(rig.cc, 0, 99, 1));
    const uint64_t *words = (const void *)((const uint8_t *)control + table[0].bitmap_offset);
    CHECK_EQ(0b10, words[1]);
    CHECK_EQ(1ull << 35, words[512 + 1]);
    CHECK_EQ(cc_word_make(1), control->receiving);
    rig_close(&rig);
}

static void histories_differ(void)
{
    struct rig a, b;
    rig_open(&a, 1, two_blocks, 4096, false);
    rig_open(&b, 1, two_blocks, 4096, false);
    CHECK(memcmp(a.control->history_id, b.control->history_id, 16) != 0);
    rig_close(&a);
    rig_close(&b);
}

static void a_second_owner_is_told_the_first_ones_pid(void)
{
    struct rig rig;
    struct colocache *second = (void *)1;
    char pid[32];
    rig_open(&rig, 1, two_blocks, 4096, false);
    snprintf(pid, sizeof pid, "%d", (int)getpid());
    struct colocache_images images = rig_images(&rig.blocks[0]);
    CHECK_RC(COLOCACHE_E_BUSY, colocache_attach(rig.control_fd, NULL, &images, 1, NULL, &second));
    CHECK(second == NULL);
    CHECK(strstr(colocache_last_error(), pid) != NULL);
    CHECK_RC(COLOCACHE_E_BUSY, colocache_create(rig.control_fd, NULL, &second));
    CHECK(strstr(colocache_last_error(), pid) != NULL);
    /* also in another process, with its descriptor inherited over fork: the lock is the handle's, not the descriptor's */
    pid_t child = fork();
    if (child == 0) {
        struct colocache_options alone = {.struct_size = sizeof alone, .n_threads = 1}; /* no threads in a forked child: TSan can't */
        int rc = colocache_attach(rig.control_fd, &alone, &images, 1, NULL, &second);
        _exit(rc == COLOCACHE_E_BUSY ? 0 : 1);
    }
    int status = 1;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK_EQ(0, status);
    rig_die(&rig);
    CHECK_RC(0, rig_attach(&rig)); /* with the owner gone it is free, though the test's descriptor is open all the time */
    rig_close(&rig);
}

static void letting_go_frees_the_lock_and_keeps_the_memory(void)
{
    struct rig rig;
    struct colocache *second = NULL;
    rig_open(&rig, 1, two_blocks, 4096, false);
    rig_receive(&rig, 1, 0, 3, 1);
    rig_checkpoint(&rig, 1, 10);
    struct colocache_images images = rig_images(&rig.blocks[0]);
    struct colocache_block_info info;
    CHECK_RC(0, colocache_get_block(rig.cc, 0, &info));
    CHECK_RC(COLOCACHE_E_BUSY, colocache_attach(rig.control_fd, NULL, &images, 1, NULL, &second));
    CHECK_RC(0, colocache_let_go(rig.cc));
    CHECK_RC(0, colocache_let_go(rig.cc)); /* twice is harmless */
    CHECK_RC(0, colocache_attach(rig.control_fd, NULL, &images, 1, NULL, &second));
    CHECK_EQ(0, memcmp((const uint8_t *)info.guest_addr + 3 * 4096, (const uint8_t *)info.cache_addr + 3 * 4096, 4096));
    colocache_close(second);
    CHECK_RC(0, colocache_let_go(NULL));
    rig_close(&rig);
}

static void create_wants_an_empty_file(void)
{
    struct rig rig;
    struct colocache *second = NULL;
    rig_open(&rig, 1, two_blocks, 4096, false);
    rig_die(&rig);
    CHECK_RC(COLOCACHE_E_EXISTS, colocache_create(rig.control_fd, NULL, &second));
    CHECK_RC(0, rig_attach(&rig)); /* and did nothing to it */
    CHECK_RC(-EBADF, colocache_create(-1, NULL, &second));
    CHECK(second == NULL && strstr(colocache_last_error(), "control_fd is -1") != NULL);
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC), empty = rig_memfd("empty", 0);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(null_fd, NULL, &second));
    CHECK_RC(COLOCACHE_E_NOT_COLOCACHE, colocache_attach(empty, NULL, NULL, 0, NULL, &second));
    CHECK(strstr(colocache_last_error(), "empty") != NULL);
    close(null_fd);
    close(empty);
    rig_close(&rig);
}

static void options_are_checked(void)
{
    struct colocache *cc = NULL;
    int fd = rig_memfd("control", 0);
    struct colocache_options options = {.struct_size = sizeof options, .copy_variant = 99};
    CHECK_RC(COLOCACHE_E_UNSUPPORTED, colocache_create(fd, &options, &cc));
    options = (struct colocache_options){.struct_size = 3};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(fd, &options, &cc));
    options = (struct colocache_options){.struct_size = sizeof options, .device_state_max_bytes = 1ull << 60};
    CHECK_RC(COLOCACHE_E_TOO_LARGE, colocache_create(fd, &options, &cc));
    struct stat st;
    CHECK(fstat(fd, &st) == 0 && st.st_size == 0); /* nothing was left in the file */
    options = (struct colocache_options){.struct_size = sizeof options, .n_threads = 257};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(fd, &options, &cc));
    CHECK(strstr(colocache_last_error(), "257") != NULL && strstr(colocache_last_error(), "256") != NULL);
    options = (struct colocache_options){.struct_size = 16, .n_threads = 1}; /* an older caller's shorter struct */
    CHECK_RC(0, colocache_create(fd, &options, &cc));
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(cc, &status));
    CHECK_EQ(64u << 20, status.device_state_max_bytes);
    CHECK_EQ(1, status.n_threads);
    CHECK_EQ(0, status.n_blocks);
    colocache_close(cc);
    close(fd);
}

static void the_lock_can_be_on_a_descriptor_of_the_callers(void)
{
    char path[] = "/tmp/colocache-lock-XXXXXX";
    struct colocache *cc = NULL, *second = NULL;
    int fd = mkstemp(path), lock_fd = open(path, O_RDWR | O_CLOEXEC), read_only = open(path, O_RDONLY | O_CLOEXEC),
        other = rig_memfd("other", 0);
    REQUIRE(fd >= 0 && lock_fd > 0 && read_only > 0);
    struct colocache_options options = {.struct_size = sizeof options, .n_threads = 1, .lock_fd = other};
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(fd, &options, &cc));
    options.lock_fd = read_only;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_create(fd, &options, &cc));
    options.lock_fd = 9999;
    CHECK_RC(-EBADF, colocache_create(fd, &options, &cc));
    options.lock_fd = lock_fd;
    CHECK_RC(0, colocache_create(fd, &options, &cc));
    close(lock_fd);
    options.lock_fd = 0;
    CHECK_RC(COLOCACHE_E_BUSY, colocache_attach(fd, &options, NULL, 0, NULL, &second)); /* held although ours is closed */
    colocache_close(cc);
    CHECK_RC(0, colocache_attach(fd, &options, NULL, 0, NULL, &second)); /* and gone with the handle */
    colocache_close(second);
    close(fd);
    close(read_only);
    close(other);
    CHECK_EQ(0, unlink(path));
}

struct damage {
    const char *what;
    uint64_t offset;
    uint64_t value; /* stored as 8 bytes */
    int code;
};

#define AT(field) offsetof(struct cc_control, field)

static void damaged_heads_are_refused_and_nothing_is_touched(void)
{
    const struct damage damages[] = {
        {"magic", AT(magic), 0x1234, COLOCACHE_E_NOT_COLOCACHE},
        {"no magic", AT(magic), 0, COLOCACHE_E_NOT_COLOCACHE},
        {"version", AT(layout_version), CC_LAYOUT_VERSION + 1, COLOCACHE_E_LAYOUT},
        {"stamp", AT(stamp), 1, COLOCACHE_E_LAYOUT},
        {"blocks without their check", AT(n_blocks), 1, COLOCACHE_E_CORRUPT},
        {"too many blocks", AT(n_blocks), cc_word_make(257), COLOCACHE_E_CORRUPT},
        {"areas past the end", AT(device_state_max_bytes), cc_word_make(1ull << 40), COLOCACHE_E_CORRUPT},
        {"areas of another size", AT(device_state_max_bytes), cc_word_make(8192), COLOCACHE_E_CORRUPT},
        {"device bound", AT(device_state_max_bytes), cc_word_make((1ull << 40) + 1), COLOCACHE_E_CORRUPT},
        {"device bound without its check", AT(device_state_max_bytes), 10000, COLOCACHE_E_CORRUPT},
        {"history", AT(history_id), 7, COLOCACHE_E_CORRUPT},
        {"history check", AT(history_check), 7, COLOCACHE_E_CORRUPT},
        {"receiving without its check", AT(receiving), 1, COLOCACHE_E_CORRUPT},
        {"commit word without its check", AT(commit_word), 1, COLOCACHE_E_CORRUPT},
        {"reserved 1", AT(reserved1[5]), 1, COLOCACHE_E_CORRUPT},
        {"reserved 2", AT(reserved2[0]), 1ull << 63, COLOCACHE_E_CORRUPT},
        {"reserved 3", AT(reserved3[6]), 1, COLOCACHE_E_CORRUPT},
        {"taken over", AT(taken_over), cc_word_make(2), COLOCACHE_E_CORRUPT},
        {"taken over without its check", AT(taken_over), 1, COLOCACHE_E_CORRUPT},
        {"table: no name", CC_TABLE_OFFSET, 0, COLOCACHE_E_CORRUPT},
        {"table: length", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, len_bytes), 4095, COLOCACHE_E_CORRUPT},
        {"table: page size", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, page_size), 5000, COLOCACHE_E_CORRUPT},
        {"table: sparse", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, sparse), 2, COLOCACHE_E_CORRUPT},
        {"table: bitmaps a page further on", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, bitmap_offset),
         CC_DEVICES_OFFSET + 2 * 12288 + 4096, COLOCACHE_E_CORRUPT},
        {"table: bitmaps in the table", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, bitmap_offset), 4096, COLOCACHE_E_CORRUPT},
        {"table: bitmaps past the end", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, bitmap_offset), 1ull << 40, COLOCACHE_E_CORRUPT},
        {"table: bitmaps wrap", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, bitmap_offset), ~0xfffull, COLOCACHE_E_CORRUPT},
        {"table: bitmap length", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, bitmap_bytes), 4096, COLOCACHE_E_CORRUPT},
        {"table: reserved", CC_TABLE_OFFSET + offsetof(struct cc_block_entry, reserved[18]), 1, COLOCACHE_E_CORRUPT},
    };
    struct rig rig;
    rig_open(&rig, 1, two_blocks, 4096, false);
    rig_receive(&rig, 1, 0, 3, 1);
    rig_checkpoint(&rig, 1, 100);
    rig_guest_write(&rig, 0, 7, 2); /* a restart would undo this */
    for (unsigned i = 0; i < sizeof damages / sizeof *damages; i++) {
        uint8_t *where = (uint8_t *)rig.control + damages[i].offset;
        uint64_t before;
        struct colocache_status status = {.struct_size = sizeof status};
        rig_die(&rig);
        memcpy(&before, where, 8);
        memcpy(where, &damages[i].value, 8);
        struct cc_block_entry *entry = (void *)((uint8_t *)rig.control + CC_TABLE_OFFSET);
        const uint64_t checksum = entry->checksum;
        for (int summed = 0; summed < 2; summed++) { /* an entry must also make sense by itself */
            int rc = rig_attach(&rig);
            if (rc != damages[i].code)
                CHECK_SAY("%s: attach gave %d, expected %d", damages[i].what, rc, damages[i].code);
            rc = colocache_inspect(rig.control_fd, &status, NULL, NULL);
            if (rc != damages[i].code)
                CHECK_SAY("%s: inspect gave %d, expected %d", damages[i].what, rc, damages[i].code);
            rig_check(&rig, false);
            entry->checksum = colocache_checksum(entry, offsetof(struct cc_block_entry, checksum));
        }
        entry->checksum = checksum;
        memcpy(where, &before, 8);
    }
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    rig_close(&rig);
}

static void short_files_are_no_regions(void)
{
    struct colocache *cc = NULL;
    struct colocache_status status = {.struct_size = sizeof status};
    const uint64_t sizes[] = {0, 1, 4095, 4096, CC_DEVICES_OFFSET - 1, CC_DEVICES_OFFSET, CC_DEVICES_OFFSET + 4096};
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int fd = rig_memfd("control", sizes[i]);
        CHECK_RC(COLOCACHE_E_NOT_COLOCACHE, colocache_attach(fd, NULL, NULL, 0, NULL, &cc));
        CHECK_RC(COLOCACHE_E_NOT_COLOCACHE, colocache_inspect(fd, &status, NULL, NULL));
        close(fd);
    }
    struct rig rig; /* a region whose file was cut: what its head says doesn't fit any more */
    rig_open(&rig, 2, two_blocks, 4096, false);
    rig_die(&rig);
    REQUIRE(ftruncate(rig.control_fd, (off_t)rig.control_bytes - 4096) == 0);
    CHECK_RC(COLOCACHE_E_CORRUPT, rig_attach(&rig));
    CHECK_RC(COLOCACHE_E_CORRUPT, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    REQUIRE(ftruncate(rig.control_fd, (off_t)rig.control_bytes) == 0);
    CHECK_RC(0, rig_attach(&rig));
    rig_close(&rig);
}

static void inspect_looks_at_an_owned_region_and_writes_nothing(void)
{
    struct rig rig;
    rig_open(&rig, 2, two_blocks, 4096, false);
    rig_receive(&rig, 5, 1, 4096, 1);
    rig_receive_zero(&rig, 5, 0, 10, 20);
    rig_guest_write(&rig, 1, 4096, 2);
    uint8_t *copy = malloc(rig.control_bytes);
    REQUIRE(copy);
    memcpy(copy, rig.control, rig.control_bytes);
    struct colocache_status status = {.struct_size = sizeof status};
    struct colocache_block_info blocks[2];
    uint32_t n_blocks = 1; /* room for one: the second is counted, not written */
    memset(blocks, 0xee, sizeof blocks);
    CHECK_RC(0, colocache_inspect(rig.control_fd, &status, blocks, &n_blocks));
    CHECK_EQ(2, n_blocks);
    CHECK_EQ(0xee, blocks[1].name[0] & 0xff);
    CHECK(strcmp(blocks[0].name, "pc.ram") == 0);
    CHECK_EQ(20, blocks[0].pvm_pages);
    CHECK_EQ(21, status.pvm_pages);
    CHECK_EQ(1, status.svm_pages);
    CHECK_EQ(0, status.flush_pages);
    CHECK_EQ(5, status.receiving_epoch);
    CHECK_EQ(0, status.sealed_epoch);
    CHECK_EQ(COLOCACHE_PHASE_EMPTY, status.phase);
    CHECK_EQ(getpid(), status.owner_pid);
    rig_device_state(&rig, 5, 77);
    rig_seal(&rig, 5);
    CHECK_RC(0, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    CHECK_EQ(COLOCACHE_PHASE_SEALING, status.phase);
    CHECK_EQ(5, status.sealed_epoch);
    CHECK_EQ(0, status.committed_epoch);
    CHECK_EQ(77, status.device_state_bytes);
    CHECK_EQ(21, status.flush_pages);
    CHECK_EQ(0, status.pvm_pages + status.svm_pages);
    rig_flush(&rig);
    CHECK_RC(0, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    CHECK_EQ(COLOCACHE_PHASE_LIVE, status.phase);
    CHECK_EQ(5, status.committed_epoch);
    memcpy(copy, rig.control, rig.control_bytes);
    CHECK_RC(0, colocache_inspect(rig.control_fd, &status, NULL, NULL));
    CHECK(memcmp(copy, rig.control, rig.control_bytes) == 0);
    free(copy);
    rig_close(&rig);
}

static void a_killed_owner_leaves_the_region_free(void)
{
    struct rig rig;
    int ready[2];
    memset(&rig, 0, sizeof rig);
    rig.control_fd = rig_memfd("control", 0);
    rig.n_blocks = 1;
    rig_block_init(&rig.blocks[0], "pc.ram", 100, 4096, false);
    REQUIRE(pipe(ready) == 0);
    pid_t child = fork();
    if (child == 0) {
        struct colocache_images images = rig_images(&rig.blocks[0]);
        struct colocache_options options = {.struct_size = sizeof options, .n_threads = 1};
        bool fine = colocache_create(rig.control_fd, &options, &rig.cc) == 0 && colocache_add_block(rig.cc, &images, NULL) == 0 &&
                    write(ready[1], "x", 1) == 1;
        if (fine)
            pause();
        _exit(1);
    }
    char byte;
    REQUIRE(read(ready[0], &byte, 1) == 1);
    CHECK_RC(COLOCACHE_E_BUSY, rig_attach(&rig));
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_NOTHING, rig.report.action);
    rig_view(&rig);
    CHECK_EQ(getpid(), rig.control->owner_pid);
    close(ready[0]);
    close(ready[1]);
    rig_close(&rig);
}

int main(void)
{
    RUN(a_killed_owner_leaves_the_region_free); /* first: it forks, and no thread of a pool has lived yet */
    RUN(a_new_region_is_laid_out_as_written_down);
    RUN(histories_differ);
    RUN(a_second_owner_is_told_the_first_ones_pid);
    RUN(letting_go_frees_the_lock_and_keeps_the_memory);
    RUN(create_wants_an_empty_file);
    RUN(options_are_checked);
    RUN(the_lock_can_be_on_a_descriptor_of_the_callers);
    RUN(damaged_heads_are_refused_and_nothing_is_touched);
    RUN(short_files_are_no_regions);
    RUN(inspect_looks_at_an_owned_region_and_writes_nothing);
    return DONE();
}
