/* SPDX-License-Identifier: Apache-2.0 */
/* version.h -- structs that an older or a newer caller passes: each begins with struct_size, which says what its header had. */
#ifndef CC_VERSION_H
#define CC_VERSION_H

#include <stdint.h>

/* Copy a caller's struct into ours of `our_bytes`: a shorter one is an older caller's, the rest stays zero; of a longer one only what
 * we know is read.  0, or E_ARGUMENT if it does not even have its first `least_bytes`. */
int cc_take_struct(void *ours, uint64_t our_bytes, const void *given, uint64_t least_bytes, const char *what);
/* Give a result out: as many bytes as the caller's struct_size says it has room for.  NULL is a caller that does not want it. */
int cc_give_struct(void *given, const void *ours, uint64_t our_bytes, const char *what);

#endif
