/* SPDX-License-Identifier: Apache-2.0 */
/* block.c: what images it takes, what it refuses, and which images an attach takes for the same ones. */
#include "rig.h"

static struct colocache *cc;
static int control_fd;
static struct rig_block one, two;

static void begin(void)
{
    struct colocache_options options = rig_options();
    control_fd = rig_memfd("control", 0);
    REQUIRE(colocache_create(control_fd, &options, &cc) == 0);
    rig_block_init(&one, "pc.ram", 100, 4096, false);
    rig_block_init(&two, "boot", 7, 4096, false);
}

static void end(void)
{
    struct rig_block *blocks[] = {&one, &two};
    colocache_close(cc);
    cc = NULL;
    for (int i = 0; i < 2; i++) {
        munmap(blocks[i]->guest, rig_len(blocks[i]));
        munmap(blocks[i]->cache, rig_len(blocks[i]));
        close(blocks[i]->guest_fd);
        close(blocks[i]->cache_fd);
        free(blocks[i]->guest_oracle);
        free(blocks[i]->pvm);
    }
    close(control_fd);
}

static uint64_t control_size(void)
{
    struct stat st;
    REQUIRE(fstat(control_fd, &st) == 0);
    return (uint64_t)st.st_size;
}

static void wrong_images_are_refused_and_leave_nothing(void)
{
    begin();
    uint64_t before = control_size();
    char long_name[300];
    memset(long_name, 'x', sizeof long_name);
    long_name[sizeof long_name - 1] = 0;
    struct {
        int code;
        struct colocache_images images;
    } cases[24];
    int n = 0;
#define CASE(expected, ...) \
    do { \
        struct colocache_images images = rig_images(&one); \
        __VA_ARGS__; \
        cases[n].code = expected; \
        cases[n++].images = images; \
    } while (0)
    CASE(COLOCACHE_E_BLOCK, images.name = NULL);
    CASE(COLOCACHE_E_BLOCK, images.name = "");
    CASE(COLOCACHE_E_BLOCK, images.name = long_name);
    CASE(COLOCACHE_E_LENGTH, images.len_bytes = 0);
    CASE(COLOCACHE_E_LENGTH, images.len_bytes = 4095);
    CASE(COLOCACHE_E_LENGTH, images.len_bytes += 4096); /* longer than the files */
    CASE(COLOCACHE_E_LENGTH, images.len_bytes = ~0ull & ~0xfffull);
    CASE(COLOCACHE_E_LENGTH, images.page_size = 0);
    CASE(COLOCACHE_E_LENGTH, images.page_size = 2048);
    CASE(COLOCACHE_E_LENGTH, images.page_size = 12288);
    CASE(COLOCACHE_E_LENGTH, images.page_size = 4u << 20);
    CASE(COLOCACHE_E_LENGTH, images.page_size = 8192; images.len_bytes = 99 * 4096);
    CASE(COLOCACHE_E_LENGTH, images.guest_offset = 100);
    CASE(COLOCACHE_E_LENGTH, images.cache_offset = 4096); /* in the file, but the block then reaches past its end */
    CASE(COLOCACHE_E_LENGTH, images.guest_offset = ~0xfffull);
    CASE(COLOCACHE_E_ARGUMENT, images.cache_fd = -1);
    CASE(COLOCACHE_E_ARGUMENT, images.guest_fd = -1);
    CASE(COLOCACHE_E_ARGUMENT, images.guest_fd = images.cache_fd = -1);
    CASE(COLOCACHE_E_ARGUMENT, images.cache_fd = images.guest_fd); /* the same memory twice */
    CASE(COLOCACHE_E_ARGUMENT, images.cache_addr = one.cache);
    CASE(COLOCACHE_E_ARGUMENT, images.guest_addr = one.guest + 8);
    CASE(COLOCACHE_E_ARGUMENT, images.struct_size = 8);
    CASE(-EBADF, images.guest_fd = 999);
    for (int i = 0; i < n; i++) {
        uint32_t index = 77;
        int rc = colocache_add_block(cc, &cases[i].images, &index);
        if (rc != cases[i].code || index != 77)
            CHECK_SAY("case %d gave %d (%s), expected %d", i, rc, colocache_last_error(), cases[i].code);
        CHECK_EQ(before, control_size());
    }
    struct colocache_status status = {.struct_size = sizeof status};
    CHECK_RC(0, colocache_get_status(cc, &status));
    CHECK_EQ(0, status.n_blocks);
    struct colocache_images images = rig_images(&one);
    CHECK_RC(0, colocache_add_block(cc, &images, NULL)); /* and the right one is taken after all that */
    CHECK_RC(0, colocache_validate(cc, 1));
    end();
}

static void names_and_memory_are_used_once(void)
{
    begin();
    uint32_t index = 9;
    struct colocache_images images = rig_images(&one);
    CHECK_RC(0, colocache_add_block(cc, &images, &index));
    CHECK_EQ(0, index);
    images = rig_images(&two);
    images.name = "pc.ram";
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_add_block(cc, &images, &index));
    images.name = "boot";
    images.cache_fd = one.guest_fd; /* this block's pages would land in the other's guest RAM */
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, &index));
    images = rig_images(&two);
    images.guest_fd = one.cache_fd;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, &index));
    images = rig_images(&two);
    CHECK_RC(0, colocache_add_block(cc, &images, &index));
    CHECK_EQ(1, index);
    end();
}

static void blocks_may_share_a_file_at_offsets(void)
{
    begin();
    uint64_t len = 10 * 4096;
    int fd = rig_memfd("all", 4 * len);
    uint8_t page[4096];
    uint8_t *all = rig_map(fd, 4 * len);
    struct colocache_images images = {.struct_size = sizeof images,
                                      .name = "a",
                                      .len_bytes = len,
                                      .page_size = 4096,
                                      .guest_fd = fd,
                                      .cache_fd = fd,
                                      .guest_offset = 0,
                                      .cache_offset = len};
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    images.name = "b";
    images.guest_offset = 3 * len;
    images.cache_offset = 2 * len - 4096; /* one page of overlap with a's cache */
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.cache_offset = 2 * len;
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    memset(page, 0x42, sizeof page);
    CHECK_RC(0, colocache_receive_page(cc, 1, 1, 9, page, 4096));
    for (uint64_t i = 0; i < 4 * len; i++) {
        bool there = i >= 2 * len + 9 * 4096 && i < 3 * len;
        if (all[i] != (there ? 0x42 : 0)) {
            CHECK_SAY("byte %llu is wrong", (unsigned long long)i);
            break;
        }
    }
    munmap(all, 4 * len);
    close(fd);
    end();
}

static void there_is_room_for_256_blocks(void)
{
    begin();
    int fd = rig_memfd("all", 514 * 4096);
    char name[16];
    struct colocache_images images = {
        .struct_size = sizeof images, .name = name, .len_bytes = 4096, .page_size = 4096, .guest_fd = fd, .cache_fd = fd};
    for (uint32_t i = 0; i < 257; i++) {
        uint32_t index = 999;
        snprintf(name, sizeof name, "block %u", i);
        images.guest_offset = i * 8192ull;
        images.cache_offset = i * 8192ull + 4096;
        CHECK_RC(i < 256 ? 0 : COLOCACHE_E_BLOCK, colocache_add_block(cc, &images, &index));
        CHECK_EQ(i < 256 ? i : 999, index);
    }
    CHECK_RC(0, colocache_mark_dirty(cc, 255, 0, 1));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_mark_dirty(cc, 256, 0, 1));
    CHECK_RC(0, colocache_validate(cc, 1));
    close(fd);
    end();
}

static void info_and_bitmaps_of_a_block(void)
{
    begin();
    struct colocache_block_info info;
    uint64_t words[3];
    struct colocache_images images = rig_images(&one);
    images.guest_addr = one.guest; /* where the VMM has it mapped already */
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    CHECK_RC(0, colocache_get_block(cc, 0, &info));
    CHECK(strcmp(info.name, "pc.ram") == 0);
    CHECK_EQ(100, info.n_pages);
    CHECK_EQ(409600, info.len_bytes);
    CHECK_EQ(4096, info.page_size);
    CHECK(info.guest_addr == one.guest);
    CHECK(info.cache_addr && info.cache_addr != one.cache); /* a mapping of the library's own */
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_get_block(cc, 1, &info));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_get_block(cc, 0, NULL));
    CHECK_RC(0, colocache_get_bitmap(cc, 0, COLOCACHE_BITMAP_SVM, words, 2));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_get_bitmap(cc, 0, COLOCACHE_BITMAP_SVM, words, 1));
    CHECK_RC(COLOCACHE_E_LENGTH, colocache_get_bitmap(cc, 0, COLOCACHE_BITMAP_SVM, words, 3));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_get_bitmap(cc, 0, 3, words, 2));
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_get_bitmap(cc, 0, -1, words, 2));
    CHECK_RC(COLOCACHE_E_BLOCK, colocache_get_bitmap(cc, 1, 0, words, 2));
    end();
}

static void block_by_address_alone_works_and_cannot_be_attached(void)
{
    begin();
    uint8_t page[4096];
    struct colocache_images images = rig_images(&one);
    images.guest_fd = images.cache_fd = -1;
    images.guest_addr = one.guest;
    images.cache_addr = one.cache;
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    memset(page, 0x17, sizeof page);
    void *state;
    struct colocache_seal_args args = rig_seal_args(1);
    CHECK_RC(0, colocache_receive_page(cc, 1, 0, 42, page, 4096));
    CHECK_RC(0, colocache_device_state_begin(cc, 1, 0, &state));
    CHECK_RC(0, colocache_seal(cc, &args, NULL));
    CHECK_RC(0, colocache_flush(cc, NULL));
    CHECK_RC(0, colocache_loaded(cc, 1));
    CHECK(memcmp(one.guest + 42 * 4096, page, 4096) == 0);
    CHECK_RC(0, colocache_validate(cc, 1));
    colocache_close(cc);
    struct colocache *again = NULL;
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, colocache_attach(control_fd, NULL, &images, 1, NULL, &again));
    images = rig_images(&one); /* nor as if it had been given by descriptor */
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, colocache_attach(control_fd, NULL, &images, 1, NULL, &again));
    cc = again;
    end();
}

static char said[1024];

static void hear(void *context, int level, const char *sentence)
{
    (void)context;
    if (level == COLOCACHE_LOG_WARN)
        snprintf(said, sizeof said, "%s", sentence);
}

static void block_by_address_is_warned_of_when_it_is_added(void)
{
    begin();
    colocache_close(cc);
    REQUIRE(ftruncate(control_fd, 0) == 0);
    struct colocache_options options = {.struct_size = sizeof options, .log = hear};
    CHECK_RC(0, colocache_create(control_fd, &options, &cc));
    struct colocache_images images = rig_images(&one);
    images.guest_fd = images.cache_fd = -1;
    images.guest_addr = one.guest;
    images.cache_addr = one.cache;
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    CHECK(strstr(said, images.name) && strstr(said, "nobody can attach"));
    end();
}

static void guest_addr_must_be_a_shared_mapping_of_the_image(void)
{
    begin();
    struct colocache_images images = rig_images(&one);
    uint64_t n_bytes = rig_len(&one), size = control_size();
    void *private_one = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, one.guest_fd, 0);
    void *anonymous = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(private_one != MAP_FAILED && anonymous != MAP_FAILED);
    images.guest_addr = private_one;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.guest_addr = anonymous;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.guest_addr = one.cache; /* another file's */
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    CHECK_EQ(size, control_size());
    images.guest_addr = one.guest;
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    for (uint64_t i = 0; i < n_bytes; i++)
        CHECK(one.guest[i] == 0 && one.cache[i] == 0); /* the probes are gone */
    munmap(private_one, n_bytes);
    munmap(anonymous, n_bytes);
    end();
}

static void attach_takes_no_other_images(void)
{
    struct rig rig;
    const uint64_t n_pages[] = {100, 7};
    rig_open(&rig, 2, n_pages, 4096, false);
    rig_receive(&rig, 1, 0, 1, 1);
    rig_checkpoint(&rig, 1, 10);
    rig_die(&rig);
    struct rig_block other;
    rig_block_init(&other, "pc.ram", 100, 4096, false);
    struct colocache_images right[2] = {rig_images(&rig.blocks[0]), rig_images(&rig.blocks[1])}, wrong[3];
    struct colocache *cc2 = NULL;
#define ATTACH_GIVES(code, n, ...) \
    do { \
        memcpy(wrong, right, sizeof right); \
        wrong[2] = rig_images(&other); \
        __VA_ARGS__; \
        CHECK_RC(code, colocache_attach(rig.control_fd, NULL, wrong, n, NULL, &cc2)); \
        CHECK(cc2 == NULL); \
    } while (0)
    ATTACH_GIVES(COLOCACHE_E_FOREIGN_IMAGE, 2, wrong[0].guest_fd = other.guest_fd);
    ATTACH_GIVES(COLOCACHE_E_FOREIGN_IMAGE, 2, wrong[0].cache_fd = other.cache_fd);
    ATTACH_GIVES(COLOCACHE_E_FOREIGN_IMAGE, 2, wrong[0].cache_fd = right[0].guest_fd; wrong[0].guest_fd = right[0].cache_fd);
    ATTACH_GIVES(COLOCACHE_E_FOREIGN_IMAGE, 2, wrong[0].len_bytes -= 4096);
    ATTACH_GIVES(COLOCACHE_E_FOREIGN_IMAGE, 2, wrong[0].page_size = 8192);
    ATTACH_GIVES(COLOCACHE_E_FOREIGN_IMAGE, 2, wrong[0].name = "boot"; wrong[1].name = "pc.ram");
    ATTACH_GIVES(COLOCACHE_E_BLOCK, 1, (void)0);
    ATTACH_GIVES(COLOCACHE_E_BLOCK, 3, (void)0);
    ATTACH_GIVES(COLOCACHE_E_BLOCK, 2, wrong[1].name = "nobody");
    ATTACH_GIVES(COLOCACHE_E_BLOCK, 2, wrong[1].name = NULL);
    ATTACH_GIVES(COLOCACHE_E_ARGUMENT, 2, wrong[0].struct_size = 0);
    rig_check(&rig, false);
    /* a file that grew is not the one the region names */
    REQUIRE(ftruncate(rig.blocks[0].guest_fd, 101 * 4096) == 0);
    CHECK_RC(COLOCACHE_E_FOREIGN_IMAGE, rig_attach(&rig));
    REQUIRE(ftruncate(rig.blocks[0].guest_fd, 100 * 4096) == 0);
    CHECK_RC(0, rig_attach(&rig));
    CHECK_EQ(COLOCACHE_RECOVERED_RESTART, rig.report.action);
    munmap(other.guest, rig_len(&other));
    munmap(other.cache, rig_len(&other));
    close(other.guest_fd);
    close(other.cache_fd);
    free(other.guest_oracle);
    free(other.pvm);
    rig_close(&rig);
}

/* Memory of the caller's that a store would kill the process on: found when the block is added. */
static void memory_that_cannot_be_written_is_refused_when_it_is_added(void)
{
    begin();
    const uint64_t n_bytes = one.n_pages * 4096;
    struct colocache_images images = rig_images(&one);
    uint8_t *read_only = mmap(NULL, n_bytes, PROT_READ, MAP_SHARED, one.guest_fd, 0);
    uint8_t *with_a_hole = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, one.guest_fd, 0);
    REQUIRE(read_only != MAP_FAILED && with_a_hole != MAP_FAILED && munmap(with_a_hole + 50 * 4096, 4096) == 0);
    images.guest_addr = read_only;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    REQUIRE(mprotect(read_only, 50 * 4096, PROT_READ | PROT_WRITE) == 0); /* the rest still is */
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.guest_addr = with_a_hole;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.guest_addr = with_a_hole + 51 * 4096; /* too short, and at another offset */
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.guest_addr = (void *)(uintptr_t)(UINT64_MAX - 4095);
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));

    images.guest_fd = images.cache_fd = -1; /* by address alone: the same */
    images.guest_addr = one.guest;
    images.cache_addr = read_only;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.cache_addr = with_a_hole;
    CHECK_RC(COLOCACHE_E_ARGUMENT, colocache_add_block(cc, &images, NULL));
    images.cache_addr = one.cache;
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    munmap(read_only, n_bytes);
    munmap(with_a_hole, 50 * 4096);
    munmap(with_a_hole + 51 * 4096, n_bytes - 51 * 4096);
    end();
}

/* The library writes through a mapping of its own: what the VMM does to its address meanwhile hurts no flush. */
static void a_flush_does_not_need_the_vms_mapping(void)
{
    begin();
    const uint64_t n_bytes = one.n_pages * 4096;
    struct colocache_images images = rig_images(&one);
    struct colocache_block_info info;
    uint8_t page[4096];
    images.guest_addr = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, one.guest_fd, 0);
    REQUIRE(images.guest_addr != MAP_FAILED);
    CHECK_RC(0, colocache_add_block(cc, &images, NULL));
    CHECK_RC(0, colocache_get_block(cc, 0, &info));
    CHECK(info.guest_addr == images.guest_addr); /* the VM's is what the caller is told */
    munmap(images.guest_addr, n_bytes);
    memset(page, 0x42, sizeof page);
    CHECK_RC(0, colocache_receive_page(cc, 1, 0, 9, page, 4096));
    void *state;
    CHECK_RC(0, colocache_device_state_begin(cc, 1, 0, &state));
    struct colocache_seal_args args = rig_seal_args(1);
    CHECK_RC(0, colocache_seal(cc, &args, NULL));
    CHECK_RC(0, colocache_flush(cc, NULL));
    CHECK_EQ(0x42, one.guest[9 * 4096]);
    end();
}

int main(void)
{
    RUN(wrong_images_are_refused_and_leave_nothing);
    RUN(names_and_memory_are_used_once);
    RUN(blocks_may_share_a_file_at_offsets);
    RUN(there_is_room_for_256_blocks);
    RUN(info_and_bitmaps_of_a_block);
    RUN(block_by_address_alone_works_and_cannot_be_attached);
    RUN(block_by_address_is_warned_of_when_it_is_added);
    RUN(guest_addr_must_be_a_shared_mapping_of_the_image);
    RUN(attach_takes_no_other_images);
    RUN(memory_that_cannot_be_written_is_refused_when_it_is_added);
    RUN(a_flush_does_not_need_the_vms_mapping);
    return DONE();
}
