/* SPDX-License-Identifier: Apache-2.0 */
/*
 * atomics.h -- the only file that says memory order.
 *
 * All words that several threads or processes touch go through these.  They work on plain integers, so that the
 * same words can be scanned with ordinary (vector) loads while a gate keeps writers out (gate.h).
 *
 * Which order is used where, and why:
 *   publish / observe   release store and acquire load: whoever observes the word sees everything written before
 *                       it was published (commit word, receiving word, number of blocks, phase).
 *   set / take          sequentially consistent read-modify-writes.  A setter ORs its bit into the word and then
 *                       reads the summary; a taker clears the summary and then takes the word.  That is Dekker's
 *                       pattern: if the setter still saw the summary bit set, the taker must see the setter's bit.
 *                       Acquire/release can't promise it, a single total order can.
 */
#ifndef CC_ATOMICS_H
#define CC_ATOMICS_H

#include <stdbool.h>
#include <stdint.h>

static inline uint64_t cc_observe(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
static inline void cc_publish(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
static inline uint32_t cc_observe32(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
static inline void cc_publish32(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* A struct of n words that one thread may write while others read it: each word by itself, in an order that lets the reader find out.
 * It reads the word that names the struct, copies, and reads the name again: a copied word that was stored after a newer name
 * was (release after release) makes the acquiring reader see that newer name, and the copy is thrown away. */
static inline void cc_publish_words(void *to, const void *from, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        cc_publish((uint64_t *)to + i, ((const uint64_t *)from)[i]);
}

static inline void cc_observe_words(void *to, const void *from, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        ((uint64_t *)to)[i] = cc_observe((const uint64_t *)from + i);
}

/* Counters and snapshots on which nothing else depends. */
static inline uint64_t cc_peek(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}
static inline void cc_poke(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
static inline uint64_t cc_add(uint64_t *word, uint64_t n)
{
    return __atomic_fetch_add(word, n, __ATOMIC_ACQ_REL);
}

static inline uint64_t cc_set_bits(uint64_t *word, uint64_t bits)
{
    return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
}
static inline uint64_t cc_take_word(uint64_t *word)
{
    return __atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST);
}
static inline uint64_t cc_drop_bits(uint64_t *word, uint64_t bits)
{
    return __atomic_fetch_and(word, ~bits, __ATOMIC_SEQ_CST);
}
static inline uint64_t cc_read_summary(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}

static inline uint32_t cc_add32(uint32_t *word, uint32_t n)
{
    return __atomic_add_fetch(word, n, __ATOMIC_SEQ_CST);
}
static inline uint32_t cc_or32(uint32_t *word, uint32_t bits)
{
    return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
}
static inline uint32_t cc_and32(uint32_t *word, uint32_t bits)
{
    return __atomic_fetch_and(word, bits, __ATOMIC_SEQ_CST);
}

/* One decision between several threads: true if *word was *expected and is `desired` now; else *expected is what it is. */
static inline bool cc_decide32(uint32_t *word, uint32_t *expected, uint32_t desired)
{
    return __atomic_compare_exchange_n(word, expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* In a loop that watches a word, or asks the kernel: the CPU's other thread goes faster meanwhile. */
static inline void cc_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
