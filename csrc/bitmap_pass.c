/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap_pass.h"

#include "checksum.h"

static inline __attribute__((always_inline)) void unite(uint64_t *restrict f, const uint64_t *restrict p, const uint64_t *restrict s,
                                                        uint64_t n, uint64_t index, struct cc_union_counts *counts)
{
    uint64_t in_p = 0, in_s = 0, in_f = 0, sum = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t either = p[i] | s[i];
        f[i] = either;
        in_p += (uint64_t)__builtin_popcountll(p[i]);
        in_s += (uint64_t)__builtin_popcountll(s[i]);
        in_f += (uint64_t)__builtin_popcountll(either);
        sum += either ? cc_checksum_term(either, index + i) : 0;
    }
    counts->pvm += in_p;
    counts->svm += in_s;
    counts->both_or_either += in_f;
    counts->sum += sum;
}

void cc_unite_plain(uint64_t *f, const uint64_t *p, const uint64_t *s, uint64_t n, uint64_t index, struct cc_union_counts *counts)
{
    unite(f, p, s, n, index, counts);
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("popcnt"))) static void unite_popcnt(uint64_t *f, const uint64_t *p, const uint64_t *s, uint64_t n,
                                                           uint64_t index, struct cc_union_counts *counts)
{
    unite(f, p, s, n, index, counts);
}

__attribute__((target("avx2"))) static inline uint64_t add_lanes(__m256i v)
{
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)(void *)lanes, v);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

__attribute__((target("avx2,popcnt"))) static void unite_avx2(uint64_t *restrict f, const uint64_t *restrict p, const uint64_t *restrict s, uint64_t n,
                                                              uint64_t index, struct cc_union_counts *counts)
{
    const uint64_t key = CC_CHECKSUM_KEY;
    __m256i keys = _mm256_set_epi64x((long long)((index + 4) * key), (long long)((index + 3) * key), (long long)((index + 2) * key),
                                     (long long)((index + 1) * key));
    const __m256i four_keys = _mm256_set1_epi64x((long long)(4 * key));
    __m256i sum = _mm256_setzero_si256();
    uint64_t in_p = 0, in_s = 0, in_f = 0, i = 0;
    for (; i + 4 <= n; i += 4) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(const void *)(p + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(const void *)(s + i));
        __m256i either = _mm256_or_si256(a, b);
        _mm256_storeu_si256((__m256i *)(void *)(f + i), either);
        __m256i v = _mm256_xor_si256(either, keys); /* cc_checksum_term, four at a time; zero words count nothing */
        __m256i term = _mm256_add_epi64(_mm256_mul_epu32(v, _mm256_srli_epi64(v, 32)), v);
        __m256i is_zero = _mm256_cmpeq_epi64(either, _mm256_setzero_si256());
        sum = _mm256_add_epi64(sum, _mm256_andnot_si256(is_zero, term));
        keys = _mm256_add_epi64(keys, four_keys);
        /* The counts by the scalar instruction: never slower than byte shuffles, which older cores split in two. */
        for (uint64_t j = i; j < i + 4; j++) {
            in_p += (uint64_t)_mm_popcnt_u64(p[j]);
            in_s += (uint64_t)_mm_popcnt_u64(s[j]);
            in_f += (uint64_t)_mm_popcnt_u64(p[j] | s[j]);
        }
    }
    counts->pvm += in_p;
    counts->svm += in_s;
    counts->both_or_either += in_f;
    counts->sum += add_lanes(sum);
    unite(f + i, p + i, s + i, n - i, index + i, counts);
}
#endif

cc_unite_fn cc_pick_unite(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
        return unite_avx2;
    if (__builtin_cpu_supports("popcnt"))
        return unite_popcnt;
#endif
    return cc_unite_plain;
}
