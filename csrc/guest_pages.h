/* SPDX-License-Identifier: Apache-2.0 */
/* guest_pages.h -- guest RAM from the cache outside a flush: the whole image at a restart, single words before the first seal. */
#ifndef CC_GUEST_PAGES_H
#define CC_GUEST_PAGES_H

#include "internal.h"

/* Guest RAM := cache, every page that is there in either; a sparse image's holes stay holes.  0, E_NO_MEMORY, -errno. */
int cc_guest_copy_all(struct colocache *cc, uint64_t *n_pages_out);

#endif
