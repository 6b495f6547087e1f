/* SPDX-License-Identifier: Apache-2.0 */
#include "colocache.h"

#define VERSION_MAJOR 0u
#define VERSION_MINOR 1u
#define VERSION_PATCH 0u

uint32_t colocache_version(void)
{
    return VERSION_MAJOR << 16 | VERSION_MINOR << 8 | VERSION_PATCH;
}
