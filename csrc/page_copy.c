/* SPDX-License-Identifier: Apache-2.0 */
#include "page_copy.h"

#include <string.h>

#include "colocache.h"

static void no_fence(void)
{
}

static void run_libc(void *dst, const void *src, uint64_t n_bytes, const void *next_src, const void *next_dst)
{
    (void)next_src;
    (void)next_dst;
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

/* The head of the next run, 1280 bytes, is prefetched line by line between the stores of this run's last page, from SPREAD_FROM on. */
#define SPREAD_FROM 1536u

static inline __attribute__((always_inline)) void copy_run(char *dst, const char *src, uint64_t n_bytes, const char *next_src,
                                                           const char *next_dst, copy_turn *turn)
{
    for (uint64_t page = 0; page < n_bytes; page += CC_COPY_PAGE) {
        const bool last = page + CC_COPY_PAGE == n_bytes;
        if (last)
            __builtin_prefetch(next_dst, 1, 0); /* for its translation: streaming stores don't read the line itself */
        for (unsigned i = 0; i < CC_COPY_PAGE; i += TURN_BYTES) {
            for (unsigned at = i; last && at >= SPREAD_FROM && at < i + TURN_BYTES; at += 128)
                __builtin_prefetch(next_src + (at - SPREAD_FROM) / 2, 0, 0);
            turn(dst + page + i, src + page + i);
        }
    }
}

/* Single pages are bound by how many reads a core keeps under way, because the hardware prefetcher begins anew in each page.  So
 * CC_COPY_LANES of them are copied side by side, a turn of each, while the next ones come into the L2 cache in the same order.  On a
 * Zen 4 with 2 MiB mappings, in a loop of nothing but these copies, single pages 10 and 50 % dirty came to 0.91 and 0.92 of the peak with
 * two threads and to 0.78 and 0.85 with one; one after the other, with the head of the next prefetched, to 0.82 and 0.74, 0.57 and 0.62.
 * 4 to 16 lanes and turns of 64 to 512 bytes gave no more, prefetching into L1 less. */
static inline __attribute__((always_inline)) void copy_pages(char *dst, const char *src, const uint64_t *at, uint32_t n,
                                                             uint32_t n_next, copy_turn *turn)
{
    while (n) {
        const uint32_t lanes = n < CC_COPY_LANES ? n : CC_COPY_LANES, left = n - lanes + n_next, next = left < CC_COPY_LANES ? left : CC_COPY_LANES;
        const uint32_t most = lanes > next ? lanes : next;
        for (uint32_t lane = 0; lane < next; lane++)
            __builtin_prefetch(dst + at[lanes + lane], 1, 0); /* for its translation */
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

__attribute__((target("avx2"))) static void run_avx2(void *dst, const void *src, uint64_t n_bytes, const void *next_src, const void *next_dst)
{
    copy_run(dst, src, n_bytes, next_src, next_dst, turn_avx2);
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

__attribute__((target("avx512f"))) static void run_avx512(void *dst, const void *src, uint64_t n_bytes, const void *next_src, const void *next_dst)
{
    copy_run(dst, src, n_bytes, next_src, next_dst, turn_avx512);
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

static void run_neon(void *dst, const void *src, uint64_t n_bytes, const void *next_src, const void *next_dst)
{
    copy_run(dst, src, n_bytes, next_src, next_dst, turn_neon);
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
