/* SPDX-License-Identifier: Apache-2.0 */
#include "bitmap_pass.h"

#include <stddef.h>

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

__attribute__((target("popcnt"))) static void unite_popcnt(uint64_t *f, const uint64_t *p, const uint64_t *s, uint64_t n, uint64_t index,
                                                           struct cc_union_counts *counts)
{
    unite(f, p, s, n, index, counts);
}

__attribute__((target("avx2"))) static inline uint64_t add_lanes(__m256i v)
{
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)(void *)lanes, v);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

__attribute__((target("avx2,popcnt"))) static void unite_avx2(uint64_t *restrict f, const uint64_t *restrict p, const uint64_t *restrict s,
                                                              uint64_t n, uint64_t index, struct cc_union_counts *counts)
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

/* Not _mm512_reduce_add_epi64: its lanes are signed in gcc's header, and the checksum's sum wraps. */
__attribute__((target("avx512f"))) static inline uint64_t add_lanes_512(__m512i v)
{
    uint64_t lanes[8], sum = 0;
    _mm512_storeu_si512(lanes, v);
    for (unsigned i = 0; i < 8; i++)
        sum += lanes[i];
    return sum;
}

__attribute__((target("avx512f,avx512vpopcntdq,popcnt"))) static void unite_avx512(uint64_t *restrict f, const uint64_t *restrict p,
                                                                                   const uint64_t *restrict s, uint64_t n, uint64_t index,
                                                                                   struct cc_union_counts *counts)
{
    const uint64_t key = CC_CHECKSUM_KEY;
    __m512i keys = _mm512_set_epi64((long long)((index + 8) * key), (long long)((index + 7) * key), (long long)((index + 6) * key),
                                    (long long)((index + 5) * key), (long long)((index + 4) * key), (long long)((index + 3) * key),
                                    (long long)((index + 2) * key), (long long)((index + 1) * key));
    const __m512i eight_keys = _mm512_set1_epi64((long long)(8 * key));
    __m512i sum = _mm512_setzero_si512(), in_p = sum, in_s = sum, in_f = sum;
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m512i a = _mm512_loadu_si512(p + i), b = _mm512_loadu_si512(s + i), either = _mm512_or_si512(a, b);
        _mm512_storeu_si512(f + i, either);
        __m512i v = _mm512_xor_si512(either, keys); /* cc_checksum_term, eight at a time; zero words count nothing */
        __m512i term = _mm512_add_epi64(_mm512_mul_epu32(v, _mm512_srli_epi64(v, 32)), v);
        sum = _mm512_mask_add_epi64(sum, _mm512_test_epi64_mask(either, either), sum, term);
        keys = _mm512_add_epi64(keys, eight_keys);
        in_p = _mm512_add_epi64(in_p, _mm512_popcnt_epi64(a));
        in_s = _mm512_add_epi64(in_s, _mm512_popcnt_epi64(b));
        in_f = _mm512_add_epi64(in_f, _mm512_popcnt_epi64(either));
    }
    counts->pvm += add_lanes_512(in_p);
    counts->svm += add_lanes_512(in_s);
    counts->both_or_either += add_lanes_512(in_f);
    counts->sum += add_lanes_512(sum);
    unite(f + i, p + i, s + i, n - i, index + i, counts);
}
#endif

cc_unite_fn cc_unite_variant(unsigned n)
{
    cc_unite_fn had[4];
    unsigned n_had = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vpopcntdq"))
        had[n_had++] = unite_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
        had[n_had++] = unite_avx2;
    if (__builtin_cpu_supports("popcnt"))
        had[n_had++] = unite_popcnt;
#endif
    had[n_had++] = cc_unite_plain;
    return n < n_had ? had[n] : NULL;
}
