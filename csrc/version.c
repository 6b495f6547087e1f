/* SPDX-License-Identifier: Apache-2.0 */
/* version.c -- the version, and structs of callers that were built with another one. */
#include "version.h"

#include <string.h>

#include "colocache.h"
#include "error.h"

#define VERSION_MAJOR 0u
#define VERSION_MINOR 1u
#define VERSION_PATCH 0u

uint32_t colocache_version(void)
{
    return VERSION_MAJOR << 16 | VERSION_MINOR << 8 | VERSION_PATCH;
}

int cc_take_struct(void *ours, uint64_t our_bytes, const void *given, uint64_t least_bytes, const char *what)
{
    memset(ours, 0, our_bytes);
    if (!given)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%s is NULL", what);
    uint64_t given_bytes;
    memcpy(&given_bytes, given, sizeof given_bytes);
    if (given_bytes < least_bytes || given_bytes > 65536)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%s.struct_size is %llu, must be at least %llu: set it to sizeof", what,
                       (unsigned long long)given_bytes, (unsigned long long)least_bytes);
    memcpy(ours, given, given_bytes < our_bytes ? given_bytes : our_bytes);
    return 0;
}

int cc_give_struct(void *given, const void *ours, uint64_t our_bytes, const char *what)
{
    if (!given)
        return 0;
    uint64_t given_bytes;
    memcpy(&given_bytes, given, sizeof given_bytes);
    if (given_bytes < sizeof given_bytes || given_bytes > 65536)
        return cc_fail(COLOCACHE_E_ARGUMENT, "%s.struct_size is %llu: set it to sizeof", what, (unsigned long long)given_bytes);
    uint64_t n = given_bytes < our_bytes ? given_bytes : our_bytes;
    memcpy((char *)given + sizeof given_bytes, (const char *)ours + sizeof given_bytes, n - sizeof given_bytes);
    return 0;
}
