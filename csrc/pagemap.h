/* SPDX-License-Identifier: Apache-2.0 */
/* pagemap.h -- PAGEMAP_SCAN of Linux 6.7 (include/uapi/linux/fs.h), for builds against older headers. */
#ifndef CC_PAGEMAP_H
#define CC_PAGEMAP_H

#include <stdint.h>
#include <sys/ioctl.h>

/* Categories of a page. */
#define CC_PAGE_IS_WRITTEN (1ull << 1) /* since it was write-protected through a userfaultfd */
#define CC_PAGE_IS_FILE (1ull << 2)    /* of a file or shared memory: not a private copy */
#define CC_PAGE_IS_PRESENT (1ull << 3)
#define CC_PAGE_IS_SWAPPED (1ull << 4)
#define CC_PAGE_IS_HUGE (1ull << 6) /* mapped as a huge page */

#define CC_SCAN_WP_MATCHING (1ull << 0)
#define CC_SCAN_CHECK_WPASYNC (1ull << 1)

struct cc_page_region {
    uint64_t start, end, categories;
};

struct cc_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define CC_PAGEMAP_SCAN _IOWR('f', 16, struct cc_scan_arg)

#endif
