/* SPDX-License-Identifier: Apache-2.0 */
/*
 * image.h -- one image of a RAM block: its file, and where it is mapped.
 *
 * An image has two addresses.  `addr` is ours: the library reads and writes there and nowhere else.  `vm_addr` is where the VM has it:
 * what is zapped and faulted by a flush that does not copy, and what the caller is told.  They are the same memory and, where the VMM
 * brought no mapping of its own, the same address; where it did, ours is a second mapping, so that nothing the VMM does to its own can
 * hurt a flush.  A block by address alone has the caller's address for both.
 */
#ifndef CC_IMAGE_H
#define CC_IMAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

struct cc_image {
    uint8_t *addr, *vm_addr;
    uint64_t map_bytes;    /* of our mapping; 0: there is none, the memory is the caller's */
    uint64_t vm_map_bytes; /* of a private mapping for the VM that is ours; 0: there is none */
    int fd;                /* own duplicate, or -1 */
    uint64_t offset;
    uint64_t granule; /* allocation unit of the file, bytes */
};

/* What file is this, and does it hold [offset, offset + len_bytes)?  0, E_LENGTH, -errno. */
int cc_image_identify(const char *name, int fd, uint64_t offset, uint64_t len_bytes, struct cc_image_identity *identity, uint64_t *granule);
/* Duplicates the descriptor and maps; vm_addr may be NULL.  private_vm: the VM then gets a private mapping of its own.  fd -1: by address alone.  Whatever it returned: cc_image_close. */
int cc_image_open(struct cc_image *image, int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, void *vm_addr, bool private_vm);
void cc_image_close(struct cc_image *image);
/* All of an image that is not sparse is there from now on: a page missing later would be a SIGBUS in a flush.  0, E_NO_MEMORY, -errno. */
int cc_image_reserve(int fd, uint64_t offset, uint64_t len_bytes, uint64_t granule, const char *name);

#endif
