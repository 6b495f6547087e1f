/* SPDX-License-Identifier: Apache-2.0 */
#include "page_copy.h"

#include <string.h>

#include "colocache.h"

static void no_fence(void) {}

static void run_libc(void *dst, const void *src, uint64_t n_bytes)
{
    memcpy(dst, src, n_bytes);
}

static void pages_libc(void *dst, const void *src, const uint64_t *at, uint32_t n, uint32_t n_next)
{
    (void)n_next;
    for (uint32_t i = 0; i < n; i++)
        memcpy((char *)dst + at[i], (const char *)src + at[i], CC_COPY_PAGE);
}

#if defined(__x86_64__) || defined(__aarch64__)

#define TURN_BYTES 256u /* four cache lines: what is loaded before it is stored */
typedef void copy_turn(char *dst, const char *src);

static inline __attribute__((always_inline)) void copy_run(char *dst, const char *src, uint64_t n_bytes, copy_turn *turn)
{
    for (uint64_t at = 0; at < n_bytes; at += TURN_BYTES)
        turn(dst + at, src + at);
}

/* Scattered pages are bound by how many reads a core keeps under way, because the hardware prefetcher begins anew in each page.  So
 * CC_COPY_LANES of them are copied side by side, a turn of each, while the next ones come into the L2 cache in the same order.
 * Measured in a loop of nothing but these copies, two threads, 2 MiB mappings, shares of the best straight pass over the images, for
 * 10 and 50 % dirty; in brackets one after the other, with the head of the next prefetched:
 *   Zen 4                         single pages 0.89 and 0.93 (0.77 and 0.80), runs of 64 pages 0.95 and 0.97 (0.95 and 0.97)
 *   Intel Xeon with 300 MiB of L3 single pages 1.16 and 1.12 (0.84 and 0.92), runs of 64 pages 1.09 and 1.13 (0.95 and 1.00)
 * So long runs are copied like this, too.  4 to 16 lanes and turns of 64 to 512 bytes gave no more, prefetching into L1 less; a line of
 * each destination page prefetched for its translation cost 2 to 4 %. */
static inline __attribute__((always_inline)) void copy_pages(char *dst, const char *src, const uint64_t *at, uint32_t n, uint32_t n_next,
                                                             copy_turn *turn)
{
    while (n) {
        const uint32_t lanes = n < CC_COPY_LANES ? n : CC_COPY_LANES, left = n - lanes + n_next;
        const uint32_t next = left < CC_COPY_LANES ? left : CC_COPY_LANES;
        const uint32_t most = lanes > next ? lanes : next;
        for (unsigned i = 0; i < CC_COPY_PAGE; i += TURN_BYTES) {
            for (uint32_t lane = 0; lane < most; lane++) {
                for (unsigned line = 0; lane < next && line < TURN_BYTES; line += 64)
                    __builtin_prefetch(src + at[lanes + lane] + i + line, 0, 2);
                if (lane < lanes)
                    turn(dst + at[lane] + i, src + at[lane] + i);
            }
        }
        at += lanes;
        n -= lanes;
    }
}
#endif

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static inline void turn_avx2(char *dst, const char *src)
{
    for (unsigned i = 0; i < TURN_BYTES; i += 128) {
        const __m256i *s = (const __m256i *)(const void *)(src + i);
        __m256i *d = (__m256i *)(void *)(dst + i);
        __m256i a = _mm256_loadu_si256(s), b = _mm256_loadu_si256(s + 1);
        __m256i c = _mm256_loadu_si256(s + 2), e = _mm256_loadu_si256(s + 3);
        _mm256_stream_si256(d, a);
        _mm256_stream_si256(d + 1, b);
        _mm256_stream_si256(d + 2, c);
        _mm256_stream_si256(d + 3, e);
    }
}

__attribute__((target("avx2"))) static void run_avx2(void *dst, const void *src, uint64_t n_bytes)
{
    copy_run(dst, src, n_bytes, turn_avx2);
}

__attribute__((target("avx2"))) static void pages_avx2(void *dst, const void *src, const uint64_t *at, uint32_t n, uint32_t n_next)
{
    copy_pages(dst, src, at, n, n_next, turn_avx2);
}

__attribute__((target("avx512f"))) static inline void turn_avx512(char *dst, const char *src)
{
    __m512i a = _mm512_loadu_si512(src), b = _mm512_loadu_si512(src + 64);
    __m512i c = _mm512_loadu_si512(src + 128), e = _mm512_loadu_si512(src + 192);
    _mm512_stream_si512((void *)dst, a);
    _mm512_stream_si512((void *)(dst + 64), b);
    _mm512_stream_si512((void *)(dst + 128), c);
    _mm512_stream_si512((void *)(dst + 192), e);
}

__attribute__((target("avx512f"))) static void run_avx512(void *dst, const void *src, uint64_t n_bytes)
{
    copy_run(dst, src, n_bytes, turn_avx512);
}

__attribute__((target("avx512f"))) static void pages_avx512(void *dst, const void *src, const uint64_t *at, uint32_t n, uint32_t n_next)
{
    copy_pages(dst, src, at, n, n_next, turn_avx512);
}

static void fence_stores(void)
{
    _mm_sfence();
}

#elif defined(__aarch64__)

static inline void turn_neon(char *dst, const char *src)
{
    for (unsigned i = 0; i < TURN_BYTES; i += 64) {
        __asm__ volatile("ldp q0, q1, [%0]\n\tldp q2, q3, [%0, #32]\n\t"
                         "stnp q0, q1, [%1]\n\tstnp q2, q3, [%1, #32]"
                         :
                         : "r"(src + i), "r"(dst + i)
                         : "v0", "v1", "v2", "v3", "memory");
    }
}

static void run_neon(void *dst, const void *src, uint64_t n_bytes)
{
    copy_run(dst, src, n_bytes, turn_neon);
}

static void pages_neon(void *dst, const void *src, const uint64_t *at, uint32_t n, uint32_t n_next)
{
    copy_pages(dst, src, at, n, n_next, turn_neon);
}

static void fence_stores(void)
{
    __asm__ volatile("dmb ishst" ::: "memory");
}
#endif

bool cc_copy_supported(int variant)
{
    switch (variant) {
    case COLOCACHE_COPY_AUTO:
    case COLOCACHE_COPY_LIBC:
        return true;
#if defined(__x86_64__)
    case COLOCACHE_COPY_AVX2:
        return __builtin_cpu_supports("avx2");
    case COLOCACHE_COPY_AVX512:
        return __builtin_cpu_supports("avx512f");
#elif defined(__aarch64__)
    case COLOCACHE_COPY_NEON:
        return true;
#endif
    default:
        return false;
    }
}

int colocache_copy_supported(int variant)
{
    return cc_copy_supported(variant) ? 0 : COLOCACHE_E_UNSUPPORTED;
}

bool cc_copy_pick(int variant, struct cc_copy *out)
{
    static const int best_first[] = {COLOCACHE_COPY_AVX512, COLOCACHE_COPY_AVX2, COLOCACHE_COPY_NEON, COLOCACHE_COPY_LIBC};
    if (variant == COLOCACHE_COPY_AUTO) {
        for (unsigned i = 0; i < sizeof best_first / sizeof *best_first; i++) {
            if (cc_copy_pick(best_first[i], out))
                return true;
        }
    }
    if (!cc_copy_supported(variant))
        return false;
    *out = (struct cc_copy){.variant = COLOCACHE_COPY_LIBC, .run = run_libc, .pages = pages_libc, .fence = no_fence};
#if defined(__x86_64__)
    if (variant == COLOCACHE_COPY_AVX2)
        *out = (struct cc_copy){.variant = variant, .run = run_avx2, .pages = pages_avx2, .fence = fence_stores};
    if (variant == COLOCACHE_COPY_AVX512)
        *out = (struct cc_copy){.variant = variant, .run = run_avx512, .pages = pages_avx512, .fence = fence_stores};
#elif defined(__aarch64__)
    if (variant == COLOCACHE_COPY_NEON)
        *out = (struct cc_copy){.variant = variant, .run = run_neon, .pages = pages_neon, .fence = fence_stores};
#endif
    return true;
}

bool cc_is_zero(const void *data, uint64_t n_bytes)
{
    const unsigned char *bytes = data;
    for (uint64_t i = 0; i < n_bytes; i += 64) {
        uint64_t line[8];
        memcpy(line, bytes + i, 64);
        if (line[0] | line[1] | line[2] | line[3] | line[4] | line[5] | line[6] | line[7])
            return false;
    }
    return true;
}
