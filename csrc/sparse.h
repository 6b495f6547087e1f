/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sparse.h -- the two images of a block that is not reserved: which of its pages are there.
 *
 * Reading a hole through a mapping allocates it, and on a full machine that is a SIGBUS.  So pages are allocated before
 * anything touches them through a mapping, and holes are found by asking the file.  For other blocks all is there and both cost nothing.
 *
 * A block that keeps its holes (`keeps_holes`: both images in files of 4 KiB pages that can be punched) takes no memory for pages of
 * zeros.  A page of the flush set that is a hole in the cache is a page of zeros: the flush punches it in guest RAM.
 *   - `allocated` is dropped before the cache is punched, and set after both images are there.
 *   - `punched` is set before guest RAM is punched.  A receiver may set `allocated` of the same page at that moment, so the seal
 *     (cc_sparse_prepare, gates closed) drops it again: it speaks of both images when a flush believes it.
 */
#ifndef CC_SPARSE_H
#define CC_SPARSE_H

#include <stdbool.h>
#include <stdint.h>

struct cc_block;
struct cc_image;

/* Can single pages of this file be given back?  Asked with a hole behind its end, which changes nothing.  0, -errno. */
int cc_sparse_can_punch(const struct cc_image *image, bool *can_out);
/* Bytes [at, at + n_bytes) of the image read as zeros and take no memory.  0, -errno: some of them may have been punched. */
int cc_sparse_punch(const struct cc_image *image, uint64_t at, uint64_t n_bytes);
/* A block that keeps its holes: pages of zeros in `image`, which receives write.  Pages not known to be there become holes; the others are
 * filled if `keep`, else given back.  0, -errno: some may have changed. */
int cc_sparse_zero(struct cc_block *block, const struct cc_image *image, uint64_t first_pfn, uint64_t n_pages, bool keep);
/* Pages of guest RAM given back, so that they are zeros. */
int cc_sparse_punch_guest(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
/* One page from the cache, where it is there, by a system call.  E_NO_MEMORY, -errno. */
int cc_sparse_write_guest(const struct cc_block *block, uint64_t pfn);
/* Before a flush, nobody receives: these pages are there in both images, or holes in the cache of a block that keeps them. */
int cc_sparse_prepare(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
/* Of the 64 pages from 64 * word on: which are to be copied (the others of a flush set are zeros) */
uint64_t cc_sparse_to_copy(const struct cc_block *block, uint64_t word);

/* Both images of these pages; known ones cost one bit test.  0, E_NO_MEMORY, -errno. */
int cc_sparse_allocate(struct cc_block *block, uint64_t first_pfn, uint64_t n_pages);
/* The next stretch (at most 2 MiB, whole pages) from byte `from` on in which guest RAM or cache holds data; false if there is none.  What
 * is left out is zero in both. */
bool cc_sparse_next_data(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes);
/* The next stretch (whole pages) from byte `from` on in which the cache holds data; false if none. */
bool cc_sparse_next_staged(const struct cc_block *block, uint64_t from, uint64_t *first, uint64_t *n_bytes);

#endif
