/* SPDX-License-Identifier: Apache-2.0 */
/*
 * block.c -- RAM blocks and their two images: checks, mappings, bitmaps; pfn to pointer, with bounds.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "fault.h"

#define HUGETLBFS_MAGIC 0x958458f6
#define PAGE_SIZE_MIN 4096u
#define PAGE_SIZE_MAX (2u << 20)
#define BLOCK_BYTES_MAX (1ull << 50) /* 1 PiB: offsets plus lengths stay far below 2^63 */

int cc_block_get(struct colocache *cc, uint32_t index, struct cc_block **out)
{
    if (!cc || index >= cc->n_blocks)
        return cc_fail(COLOCACHE_E_BLOCK, "there is no block %u, there are %u", index, cc ? cc->n_blocks : 0);
    *out = &cc->blocks[index];
    return 0;
}

int cc_block_range(const struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    if (first_pfn >= block->n_pages || n_pages > block->n_pages - first_pfn) /* no sum that could overflow */
        return cc_fail(COLOCACHE_E_RANGE, "pages %llu+%llu lie past the end of block %s, which has %llu",
                       (unsigned long long)first_pfn, (unsigned long long)n_pages, block->name,
                       (unsigned long long)block->n_pages);
    return 0;
}

/* ---- checking what the caller gives ----------------------------------------------------------------------------- */

static int check_sizes(const char *name, uint64_t len_bytes, uint32_t page_size)
{
    if (page_size < PAGE_SIZE_MIN || page_size > PAGE_SIZE_MAX || (page_size & (page_size - 1)))
        return cc_fail(COLOCACHE_E_LENGTH, "block %s has page size %u: it must be a power of two from %u to %u", name, page_size,
                       PAGE_SIZE_MIN, PAGE_SIZE_MAX);
    if (len_bytes == 0 || len_bytes % page_size || len_bytes > BLOCK_BYTES_MAX)
        return cc_fail(COLOCACHE_E_LENGTH, "block %s is %llu bytes: it must be a positive multiple of its page size %u, at most %llu",
                       name, (unsigned long long)len_bytes, page_size, (unsigned long long)BLOCK_BYTES_MAX);
    return 0;
}

static int check_images(const struct colocache_images *images)
{
    if (!images->name || !*images->name || strnlen(images->name, COLOCACHE_NAME_BYTES) >= COLOCACHE_NAME_BYTES)
        return cc_fail(COLOCACHE_E_BLOCK, "a block's name must have 1 to %d bytes", COLOCACHE_NAME_BYTES - 1);
    int rc = check_sizes(images->name, images->len_bytes, images->page_size);
    if (rc)
        return rc;
    bool by_address = images->guest_fd < 0 && images->cache_fd < 0;
    if (!by_address && (images->guest_fd < 0 || images->cache_fd < 0))
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: give both images by descriptor or both by address", images->name);
    if (by_address && (!images->guest_addr || !images->cache_addr || images->sparse))
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s by address needs guest_addr and cache_addr and can't be sparse", images->name);
    if (!by_address && images->cache_addr)
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: cache_addr is only for blocks by address alone", images->name);
    if ((uintptr_t)images->guest_addr % PAGE_SIZE_MIN || (uintptr_t)images->cache_addr % PAGE_SIZE_MIN)
        return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: addresses must be multiples of %u", images->name, PAGE_SIZE_MIN);
    return 0;
}

/* ---- one image ------------------------------------------------------------------------------------------------------ */

/* identify -- what file is this, and does it hold [offset, offset+len)? */
static int identify(const char *name, int fd, uint64_t offset, uint64_t len_bytes, struct cc_image_identity *identity,
                    uint64_t *granule)
{
    struct stat st;
    struct statfs fs;
    if (fstat(fd, &st) != 0 || fstatfs(fd, &fs) != 0)
        return cc_fail_errno("looking at an image");
    *granule = (uint64_t)fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : CC_PAGE;
    if (offset % *granule || offset > BLOCK_BYTES_MAX)
        return cc_fail(COLOCACHE_E_LENGTH, "block %s begins at offset %llu of its image: it must be a multiple of %llu", name,
                       (unsigned long long)offset, (unsigned long long)*granule);
    uint64_t end = offset + (len_bytes + *granule - 1) / *granule * *granule;
    if ((uint64_t)st.st_size < end)
        return cc_fail(COLOCACHE_E_LENGTH, "the image of block %s has %llu bytes, %llu are needed", name,
                       (unsigned long long)st.st_size, (unsigned long long)end);
    *identity = (struct cc_image_identity){.device = (uint64_t)st.st_dev, .inode = (uint64_t)st.st_ino,
                                           .size_bytes = (uint64_t)st.st_size, .offset = offset};
    return 0;
}

/* open_image -- duplicate the descriptor and map, or take the caller's mapping */
static int open_image(struct cc_image *image, int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, void *addr)
{
    image->offset = offset;
    image->granule = granule;
    image->fd = -1;
    image->addr = addr;
    if (fd < 0)
        return 0;
    image->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (image->fd < 0)
        return cc_fail_errno("duplicating an image's descriptor");
    if (addr)
        return 0;
    uint64_t map_bytes = (len_bytes + granule - 1) / granule * granule;
    void *mapped;
    int rc = cc_map_file(image->fd, offset, map_bytes, true, &mapped);
    if (rc)
        return rc;
    image->addr = mapped;
    image->map_bytes = map_bytes;
    return 0;
}

static void close_image(struct cc_image *image)
{
    cc_unmap(image->addr, image->map_bytes);
    if (image->fd >= 0)
        close(image->fd);
}

/* ---- bitmaps of a block in the control region ------------------------------------------------------------------------ */

static uint64_t round_to_page(uint64_t n)
{
    return (n + CC_PAGE - 1) / CC_PAGE * CC_PAGE;
}

static uint64_t bitmap_bytes_for(uint64_t n_pages)
{
    uint64_t n_words = cc_words_for(n_pages);
    return CC_BITMAPS * (round_to_page(n_words * 8) + round_to_page(cc_words_for(n_words) * 8));
}

void cc_block_bind_bitmaps(struct cc_bitmap bitmaps[CC_BITMAPS], void *map, uint64_t n_pages)
{
    uint64_t word_bytes = round_to_page(cc_words_for(n_pages) * 8);
    uint64_t summary_bytes = round_to_page(cc_words_for(cc_words_for(n_pages)) * 8);
    uint8_t *words = map, *summaries = words + CC_BITMAPS * word_bytes;
    for (uint32_t kind = 0; kind < CC_BITMAPS; kind++)
        cc_bitmap_init(&bitmaps[kind], (uint64_t *)(void *)(words + kind * word_bytes),
                       (uint64_t *)(void *)(summaries + kind * summary_bytes), n_pages);
}

/* cc_block_check_entry -- does a table entry make sense by itself and in a region of file_bytes? */
int cc_block_check_entry(const struct cc_block_entry *entry, uint64_t file_bytes)
{
    if (strnlen(entry->name, COLOCACHE_NAME_BYTES) == COLOCACHE_NAME_BYTES || !entry->name[0])
        return cc_fail(COLOCACHE_E_CORRUPT, "a block in the control region has no proper name");
    if (check_sizes(entry->name, entry->len_bytes, entry->page_size))
        return COLOCACHE_E_CORRUPT; /* the sentence is check_sizes' */
    uint64_t expected = bitmap_bytes_for(entry->len_bytes / entry->page_size);
    bool fits = entry->bitmap_offset % CC_PAGE == 0 && entry->bitmap_offset >= CC_DEVICES_OFFSET &&
                entry->bitmap_offset <= file_bytes && entry->bitmap_bytes == expected &&
                expected <= file_bytes - entry->bitmap_offset;
    uint64_t reserved = entry->sparse > 1;
    for (size_t i = 0; i < sizeof entry->reserved / sizeof *entry->reserved; i++)
        reserved |= entry->reserved[i];
    if (!fits || reserved)
        return cc_fail(COLOCACHE_E_CORRUPT, "block %s: its entry in the control region does not fit the region", entry->name);
    return 0;
}

/* ---- from an entry and the caller's images to a block ------------------------------------------------------------------ */

/* build -- everything of a block but its entry; on error what was made is given back */
static int build(struct colocache *cc, struct cc_block *block, const struct colocache_images *images,
                 const struct cc_block_entry *entry, uint64_t guest_granule, uint64_t cache_granule)
{
    memset(block, 0, sizeof *block);
    block->guest.fd = block->cache.fd = -1;
    memcpy(block->name, entry->name, sizeof block->name);
    block->len_bytes = entry->len_bytes;
    block->page_size = entry->page_size;
    block->page_shift = (uint32_t)__builtin_ctz(entry->page_size);
    block->n_pages = entry->len_bytes / entry->page_size;
    block->sparse = entry->sparse;

    int rc = open_image(&block->guest, images->guest_fd, images->guest_offset, block->len_bytes, guest_granule, images->guest_addr);
    if (rc == 0)
        rc = open_image(&block->cache, images->cache_fd, images->cache_offset, block->len_bytes, cache_granule, images->cache_addr);
    if (rc == 0 && block->sparse) {
        block->allocated = calloc(cc_words_for(block->n_pages), 8);
        if (!block->allocated)
            rc = cc_fail(-ENOMEM, "no memory for the page table of sparse block %s", block->name);
    }
    if (rc == 0)
        rc = cc_map_file(cc->control_fd, entry->bitmap_offset, entry->bitmap_bytes, true, &block->bitmap_map);
    if (rc) {
        cc_block_release(block);
        return rc;
    }
    block->bitmap_map_bytes = entry->bitmap_bytes;
    cc_block_bind_bitmaps(block->bitmaps, block->bitmap_map, block->n_pages);
    return 0;
}

void cc_block_release(struct cc_block *block)
{
    cc_unmap(block->bitmap_map, block->bitmap_map_bytes);
    close_image(&block->guest);
    close_image(&block->cache);
    free(block->allocated);
    memset(block, 0, sizeof *block);
    block->guest.fd = block->cache.fd = -1;
}

static bool overlap(const struct cc_image_identity *a, uint64_t a_bytes, const struct cc_image_identity *b, uint64_t b_bytes)
{
    return a->device == b->device && a->inode == b->inode && a->offset < b->offset + b_bytes && b->offset < a->offset + a_bytes;
}

/* check_disjoint -- no byte of the new block's images is a byte of another block's: each would be the other's damage */
static int check_disjoint(const struct colocache *cc, const struct cc_block_entry *entry)
{
    const struct cc_image_identity *ours[] = {&entry->guest, &entry->cache};
    for (uint32_t i = 0; i < cc->n_blocks && entry->guest.inode; i++) {
        const struct cc_block_entry *other = &cc->table[i];
        for (int k = 0; k < 2; k++) {
            if (overlap(ours[k], entry->len_bytes, &other->guest, other->len_bytes) ||
                overlap(ours[k], entry->len_bytes, &other->cache, other->len_bytes))
                return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: its %s is memory of block %s", entry->name, k ? "cache" : "guest RAM",
                               other->name);
        }
    }
    return 0;
}

static int identify_both(const struct colocache_images *images, struct cc_block_entry *entry, uint64_t *guest_granule,
                         uint64_t *cache_granule)
{
    *guest_granule = *cache_granule = CC_PAGE;
    if (images->guest_fd < 0)
        return 0;
    int rc = identify(images->name, images->guest_fd, images->guest_offset, images->len_bytes, &entry->guest, guest_granule);
    if (rc == 0)
        rc = identify(images->name, images->cache_fd, images->cache_offset, images->len_bytes, &entry->cache, cache_granule);
    if (rc == 0 && overlap(&entry->guest, images->len_bytes, &entry->cache, images->len_bytes))
        rc = cc_fail(COLOCACHE_E_ARGUMENT, "block %s: guest RAM and cache are the same memory", images->name);
    return rc;
}

/* reserve_image -- an image that is not sparse is there whole from now on: a page missing later would be a SIGBUS in a flush.  On
 * hugetlb the mapping reserves; an image that its block count shows to be whole costs one fstat. */
static int reserve_image(int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, const char *name)
{
    struct stat st;
    if (fd < 0 || granule != CC_PAGE)
        return 0;
    if (fstat(fd, &st) != 0)
        return cc_fail_errno("looking at an image");
    return (uint64_t)st.st_blocks * 512 >= (uint64_t)st.st_size ? 0 : cc_reserve(fd, offset, round_to_page(len_bytes), name);
}

/* cc_block_add -- a new block: its bitmaps at the end of the region, then its entry, then the count that publishes it */
int cc_block_add(struct colocache *cc, const struct colocache_images *images)
{
    int rc = check_images(images);
    if (rc)
        return rc;
    if (cc->n_blocks == COLOCACHE_BLOCKS_MAX)
        return cc_fail(COLOCACHE_E_BLOCK, "there are %d blocks already, the most there can be", COLOCACHE_BLOCKS_MAX);
    for (uint32_t i = 0; i < cc->n_blocks; i++) {
        if (strcmp(cc->blocks[i].name, images->name) == 0)
            return cc_fail(COLOCACHE_E_BLOCK, "there is a block %s already", images->name);
    }
    struct cc_block_entry entry = {.len_bytes = images->len_bytes, .page_size = images->page_size, .sparse = images->sparse != 0};
    strcpy(entry.name, images->name); /* its length was checked */
    uint64_t guest_granule, cache_granule;
    rc = identify_both(images, &entry, &guest_granule, &cache_granule);
    if (rc == 0)
        rc = check_disjoint(cc, &entry);
    if (rc == 0 && !entry.sparse)
        rc = reserve_image(images->guest_fd, images->guest_offset, images->len_bytes, guest_granule, images->name);
    if (rc == 0 && !entry.sparse)
        rc = reserve_image(images->cache_fd, images->cache_offset, images->len_bytes, cache_granule, images->name);
    if (rc)
        return rc;
    entry.bitmap_offset = cc->control->bitmap_end;
    entry.bitmap_bytes = bitmap_bytes_for(entry.len_bytes / entry.page_size);
    uint64_t end = entry.bitmap_offset + entry.bitmap_bytes;
    if (ftruncate(cc->control_fd, (off_t)end) != 0)
        return cc_fail_errno("enlarging the control region");
    CC_CRASH_POINT("add_block: the region is larger");
    rc = cc_reserve(cc->control_fd, entry.bitmap_offset, entry.bitmap_bytes, "the bitmaps in the control region");
    if (rc == 0)
        rc = build(cc, &cc->blocks[cc->n_blocks], images, &entry, guest_granule, cache_granule);
    if (rc) { /* as before the call */
        if (ftruncate(cc->control_fd, (off_t)entry.bitmap_offset) != 0)
            cc_log(cc, COLOCACHE_LOG_WARN, "could not shrink the control region after an error");
        return rc;
    }
    CC_CRASH_POINT("add_block: before the entry");
    CC_HALF(&cc->table[cc->n_blocks], &entry, sizeof entry, "add_block: half an entry");
    cc->table[cc->n_blocks] = entry;
    CC_CRASH_POINT("add_block: after the entry");
    cc->control->bitmap_end = end;
    CC_CRASH_POINT("add_block: before the count");
    cc->n_blocks++;
    cc_publish(&cc->control->n_blocks, cc->n_blocks);
    CC_CRASH_POINT("add_block: after the count");
    return 0;
}

/* cc_block_reattach -- block `index` of an existing region, with the images it names and no others */
int cc_block_reattach(struct colocache *cc, uint32_t index, const struct colocache_images *images)
{
    int rc = check_images(images);
    if (rc)
        return rc;
    const struct cc_block_entry *entry = &cc->table[index];
    if (images->guest_fd < 0)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "block %s was given by address: such memory dies with its process", entry->name);
    if (images->len_bytes != entry->len_bytes || images->page_size != entry->page_size)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "block %s has %llu bytes in pages of %u in the region, %llu in pages of %u were given",
                       entry->name, (unsigned long long)entry->len_bytes, entry->page_size,
                       (unsigned long long)images->len_bytes, images->page_size);
    struct cc_block_entry found = *entry;
    uint64_t guest_granule, cache_granule;
    rc = identify_both(images, &found, &guest_granule, &cache_granule);
    if (rc)
        return rc;
    const bool same_guest = memcmp(&found.guest, &entry->guest, sizeof found.guest) == 0;
    if (!same_guest || memcmp(&found.cache, &entry->cache, sizeof found.cache) != 0)
        return cc_fail(COLOCACHE_E_FOREIGN_IMAGE, "block %s: the %s image is not the one this control region was made with", entry->name,
                       same_guest ? "cache" : "guest RAM");
    rc = build(cc, &cc->blocks[index], images, entry, guest_granule, cache_granule);
    return rc;
}

int colocache_add_block(struct colocache *cc, const struct colocache_images *images, uint32_t *block_out)
{
    struct colocache_images given;
    int rc = cc_take_struct(&given, sizeof given, images, sizeof given, "images");
    if (rc)
        return rc;
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    if (cc_peek(&cc->control->receiving) || cc_peek(&cc->control->commit_word))
        return cc_fail(COLOCACHE_E_ORDER, "blocks are added before the first page comes");
    rc = cc_block_add(cc, &given);
    if (rc == 0 && block_out)
        *block_out = cc->n_blocks - 1;
    return rc;
}

/* ---- sparse images -------------------------------------------------------------------------------------------------------- */

/* cc_block_allocate -- both images of these pages, before anything touches them through a mapping: reading a hole allocates it, and
 * on a full machine that would be a SIGBUS.  Known pages cost one bit test. */
int cc_block_allocate(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages)
{
    if (!block->sparse)
        return 0;
    for (uint64_t pfn = first_pfn; pfn < first_pfn + n_pages; pfn++) {
        uint64_t bit = 1ull << (pfn % 64);
        if (cc_observe(&block->allocated[pfn / 64]) & bit)
            continue;
        for (int i = 0; i < 2; i++) {
            const struct cc_image *image = i ? &block->cache : &block->guest;
            uint64_t begin = (pfn << block->page_shift) / image->granule * image->granule;
            uint64_t bytes = block->page_size > image->granule ? block->page_size : image->granule;
            int rc = cc_reserve(image->fd, image->offset + begin, bytes, block->name);
            if (rc)
                return rc;
        }
        cc_set_bits(&block->allocated[pfn / 64], bit);
    }
    return 0;
}

static uint64_t next_data(const struct cc_image *image, uint64_t from, uint64_t len_bytes)
{
    off_t at = lseek(image->fd, (off_t)(image->offset + from), SEEK_DATA);
    if (at < 0)
        return errno == ENXIO ? len_bytes : from; /* ENXIO: only a hole is left; else the file system can't tell: all is data */
    uint64_t data = (uint64_t)at - image->offset;
    return data < len_bytes ? data : len_bytes;
}

static uint64_t next_hole(const struct cc_image *image, uint64_t from, uint64_t len_bytes)
{
    off_t at = lseek(image->fd, (off_t)(image->offset + from), SEEK_HOLE);
    uint64_t hole = at < 0 ? len_bytes : (uint64_t)at - image->offset;
    return hole < len_bytes ? hole : len_bytes;
}

/* cc_block_next_data -- the next stretch (at most 2 MiB, page aligned) from byte `from` in which guest RAM or cache holds data all along;
 * 1 found, 0 none.  The file position of our own descriptor is not used by anybody. */
int cc_block_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes)
{
    const uint64_t window = 2u << 20;
    if (from >= block->len_bytes)
        return 0;
    uint64_t start = from, end = block->len_bytes;
    if (block->sparse) {
        uint64_t guest = next_data(&block->guest, from, block->len_bytes), cache = next_data(&block->cache, from, block->len_bytes);
        start = guest < cache ? guest : cache;
        if (start >= block->len_bytes)
            return 0;
        uint64_t guest_end = guest == start ? next_hole(&block->guest, start, block->len_bytes) : 0;
        uint64_t cache_end = cache == start ? next_hole(&block->cache, start, block->len_bytes) : 0;
        end = guest_end > cache_end ? guest_end : cache_end;
        end = (end + block->page_size - 1) / block->page_size * block->page_size;
        start -= start % block->page_size;
    }
    *first = start;
    *n_bytes = end - start < window ? end - start : window;
    return 1;
}
