/* SPDX-License-Identifier: Apache-2.0 */
/* map.h -- mappings of files, their reservation, and what a mapping of the caller's is.  Knows no handle. */
#ifndef CC_MAP_H
#define CC_MAP_H

#include <stdbool.h>
#include <stdint.h>

/* MAP_SHARED.  0, E_NO_MEMORY, -errno. */
int cc_map_file(int fd, uint64_t offset, uint64_t n_bytes, bool writable, void **out);
/* MAP_PRIVATE, writable, without a reservation: for a VM over bounded memory.  At a boundary at which whole page tables can be moved (1 GiB,
 * or 2 MiB if it is smaller), which cc_map_aside is ten times as fast for.  0, E_NO_MEMORY, -errno. */
int cc_map_private(int fd, uint64_t offset, uint64_t n_bytes, void **out);
/* Zeroed memory of this process that ends at a page nobody may touch: who writes behind it gets EFAULT or dies, and spoils nothing.
 * *end_out is its end; given back by cc_unmap(*out, *map_bytes).  0, E_NO_MEMORY, -errno. */
int cc_map_guarded(uint64_t n_bytes, void **out, uint64_t *map_bytes, uint8_t **end_out);
/* Move what a private mapping has in memory to an address that is alike below `align`, and leave the mapping where it is, showing its file.
 * Nobody uses it meanwhile.  *moved_out: the new address, in a reservation of *map_bytes that is returned; NULL: not done.  Then
 * don't ask again: the place was freed perhaps, so it stays reserved. */
void *cc_map_aside(void *addr, uint64_t n_bytes, uint64_t align, uint8_t **moved_out, uint64_t *map_bytes);
void cc_unmap(void *addr, uint64_t n_bytes); /* NULL or no bytes: nothing */
/* Allocate a range of a file now, so that touching it later can't be a SIGBUS.  0, E_NO_MEMORY, -errno. */
int cc_map_reserve(int fd, uint64_t offset, uint64_t n_bytes, const char *what);
/* Is all of [addr, addr + n_bytes) mapped for reading and writing; and, with fd >= 0, a mapping of that file at `offset`, MAP_SHARED or
 * MAP_PRIVATE as `shared` says?  Touches none of it.  0, E_ARGUMENT with a sentence that begins with `what`, -errno. */
int cc_map_check(const char *what, const void *addr, uint64_t n_bytes, int fd, uint64_t offset, bool shared);

#endif
