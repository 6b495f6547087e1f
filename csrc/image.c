/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image.c -- one image of a RAM block: what file it is, its mapping, its reservation; and what of a sparse one is there.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define HUGETLBFS_MAGIC 0x958458f6

/* cc_image_identify -- what file is this, and does it hold [offset, offset+len)? */
int cc_image_identify(const char *name, int fd, uint64_t offset, uint64_t len_bytes, struct cc_image_identity *identity,
                    uint64_t *granule)
{
    struct stat st;
    struct statfs fs;
    if (fstat(fd, &st) != 0 || fstatfs(fd, &fs) != 0)
        return cc_fail_errno("looking at an image");
    *granule = (uint64_t)fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : CC_PAGE;
    if (offset % *granule || offset > CC_BLOCK_BYTES_MAX)
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

/* cc_image_open -- duplicate the descriptor and map, or take the caller's mapping */
int cc_image_open(struct cc_image *image, int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, void *addr)
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

void cc_image_close(struct cc_image *image)
{
    cc_unmap(image->addr, image->map_bytes);
    if (image->fd >= 0)
        close(image->fd);
}

/* cc_image_reserve -- an image that is not sparse is there whole from now on: a page missing later would be a SIGBUS in a flush.  On
 * hugetlb the mapping reserves; an image that its block count shows to be whole costs one fstat. */
int cc_image_reserve(int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, const char *name)
{
    struct stat st;
    if (fd < 0 || granule != CC_PAGE)
        return 0;
    if (fstat(fd, &st) != 0)
        return cc_fail_errno("looking at an image");
    return (uint64_t)st.st_blocks * 512 >= (uint64_t)st.st_size ? 0 : cc_reserve(fd, offset, cc_round_to_page(len_bytes), name);
}

/* cc_block_check_shared -- does a store through the caller's mapping reach the file, at its first and its last word?  A private
 * mapping would run well and be lost with the process.  Only when a block is added, while its memory is nobody's. */
int cc_block_check_shared(const struct cc_block *block, const struct colocache_images *images)
{
    const uint64_t at[2] = {0, block->len_bytes - 8};
    if (images->guest_fd < 0 || !images->guest_addr || block->sparse) /* a sparse one has no memory that could be stored to yet */
        return 0;
    for (int i = 0; i < 2; i++) {
        uint64_t *word = (uint64_t *)(void *)(block->guest.addr + at[i]);
        const uint64_t before = *word, probe = ~before;
        uint64_t seen = before;
        cc_publish(word, probe);
        ssize_t n = pread(block->guest.fd, &seen, sizeof seen, (off_t)(block->guest.offset + at[i]));
        cc_publish(word, before);
        if (n == (ssize_t)sizeof seen && seen != probe)
            return cc_fail(COLOCACHE_E_ARGUMENT, "block %s: guest_addr is no MAP_SHARED mapping of guest_fd at guest_offset %llu",
                           block->name, (unsigned long long)block->guest.offset);
    }
    return 0;
}

/* ---- sparse images ------------------------------------------------------------------------------------------------------ */

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
