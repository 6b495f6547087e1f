/* SPDX-License-Identifier: Apache-2.0 */
/* private.h -- what the kernel says of a mapping, and private copies of its pages. */
#ifndef CC_PRIVATE_H
#define CC_PRIVATE_H

#include <stdbool.h>
#include <stdint.h>

/* 0 if all of [addr, addr + len_bytes) is mapped here, readable and writable, from `fd` at `offset`, MAP_SHARED or MAP_PRIVATE as `shared`
 * says.  Asked of the kernel: a store to find out would make a private copy that hides the file's page for ever.  E_ARGUMENT, -errno. */
int cc_mapping_check(const char *name, const void *addr, uint64_t len_bytes, int fd, uint64_t offset, bool shared);

#endif
