/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image.c -- one image of a RAM block: what file it is, its two addresses, its reservation.
 */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "colocache.h"
#include "error.h"
#include "map.h"

#define HUGETLBFS_MAGIC 0x958458f6

int cc_image_identify(const char *name, int fd, uint64_t offset, uint64_t len_bytes, struct cc_image_identity *identity, uint64_t *granule)
{
    struct stat st;
    struct statfs fs;
    if (fstat(fd, &st) != 0 || fstatfs(fd, &fs) != 0)
        return cc_fail_errno("looking at an image");
    *granule = (uint64_t)fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : CC_PAGE;
    if (offset % *granule || offset > COLOCACHE_BLOCK_BYTES_MAX)
        return cc_fail(COLOCACHE_E_LENGTH, "block %s begins at offset %llu of its image: it must be a multiple of %llu", name,
                       (unsigned long long)offset, (unsigned long long)*granule);
    uint64_t end = offset + (len_bytes + *granule - 1) / *granule * *granule;
    if ((uint64_t)st.st_size < end)
        return cc_fail(COLOCACHE_E_LENGTH, "the image of block %s has %llu bytes, %llu are needed", name, (unsigned long long)st.st_size,
                       (unsigned long long)end);
    *identity = (struct cc_image_identity){
        .device = (uint64_t)st.st_dev, .inode = (uint64_t)st.st_ino, .size_bytes = (uint64_t)st.st_size, .offset = offset};
    return 0;
}

int cc_image_open(struct cc_image *image, int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, void *vm_addr, bool private_vm)
{
    *image = (struct cc_image){.addr = vm_addr, .vm_addr = vm_addr, .fd = -1, .offset = offset, .granule = granule};
    if (fd < 0)
        return 0;
    image->addr = NULL;
    image->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (image->fd < 0)
        return cc_fail_errno("duplicating an image's descriptor");
    uint64_t map_bytes = (len_bytes + granule - 1) / granule * granule;
    void *mapped;
    int rc = cc_map_file(image->fd, offset, map_bytes, true, &mapped);
    if (rc)
        return rc;
    image->addr = mapped;
    image->map_bytes = map_bytes;
    if (vm_addr)
        return 0;
    image->vm_addr = mapped;
    if (!private_vm)
        return 0;
    rc = cc_map_private(image->fd, offset, map_bytes, &mapped);
    if (rc)
        return rc;
    image->vm_addr = mapped;
    image->vm_map_bytes = map_bytes;
    return 0;
}

void cc_image_close(struct cc_image *image)
{
    cc_unmap(image->vm_addr, image->vm_map_bytes);
    cc_unmap(image->addr, image->map_bytes);
    if (image->fd >= 0)
        close(image->fd);
}

int cc_image_reserve(int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, const char *name)
{
    struct stat st;
    if (fd < 0 || granule != CC_PAGE) /* on hugetlb the mapping reserves */
        return 0;
    if (fstat(fd, &st) != 0)
        return cc_fail_errno("looking at an image");
    if ((uint64_t)st.st_blocks * 512 >= (uint64_t)st.st_size) /* its block count shows it whole */
        return 0;
    return cc_map_reserve(fd, offset, cc_round_to_page(len_bytes), name);
}
