/* SPDX-License-Identifier: Apache-2.0 */
/* guest_program.c -- the guest, and the two things about its memory that Python is too slow for. See guest_program.h. */
#include "guest_program.h"

#include <string.h>

_Static_assert(sizeof(struct guest_mailbox) <= GUEST_PAGE_BYTES, "the mailbox is one page");

/* Whatever a build asks for, this function stays as it is written: a call or a counter put in would be a jump or a
 * store into nowhere in a guest.  See also the flags in _guest_build.py. */
#define GUEST_PLAIN __attribute__((no_instrument_function, no_profile_instrument_function))
#define GUEST_INLINE static inline __attribute__((always_inline)) GUEST_PLAIN

/* A section of its own, so that the linker marks both ends of the function's bytes. */
#define GUEST_TEXT "guest_text"
extern const char __start_guest_text[] __attribute__((visibility("hidden")));
extern const char __stop_guest_text[] __attribute__((visibility("hidden")));

GUEST_INLINE uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= GUEST_MIX_1;
    x ^= x >> 27;
    x *= GUEST_MIX_2;
    return x ^ x >> 31;
}

/* Stores are volatile throughout: a compiler that made a call to memset of them would make a guest that jumps into nothing,
 * and one that saw through a rewrite would leave it out. */
__attribute__((section(GUEST_TEXT), noinline, used, aligned(16))) GUEST_PLAIN void guest_program(volatile struct guest_mailbox *box)
{
    const uint64_t salt = box->salt, first_page = box->first_page, n_pages = box->n_pages;
    const uint64_t split_page = box->split_page, low = box->low_addr, high = box->high_addr;
    uint64_t *const log = (uint64_t *)(uintptr_t)box->bitmap;
    uint64_t step = box->step, stored = box->pages_stored;

    while (!box->stop && step != box->limit) {
        const uint64_t h = mix(salt + (step + 1) * GUEST_STEP);
        const uint64_t kind = h & 0xffff;
        const uint64_t at = (h >> 32) * n_pages >> 32;
        const int rewrite = kind < box->rewrite_below;
        uint64_t n = 1;
        if (!rewrite && kind < box->run_below) {
            n = 2 + ((h >> 16 & 0xffff) * (box->run_pages - 1) >> 16);
            if (n > n_pages - at)
                n = n_pages - at;
        }
        for (uint64_t page = first_page + at; n; n--, page++) {
            const uint64_t addr = page < split_page ? low + page * GUEST_PAGE_BYTES : high + (page - split_page) * GUEST_PAGE_BYTES;
            volatile uint64_t *word = (volatile uint64_t *)(uintptr_t)addr;
            volatile uint64_t *const end = word + GUEST_PAGE_WORDS;
            if (rewrite) {
                for (; word != end; word++)
                    *word = *word;
            } else {
                uint64_t value = mix(h ^ (page + 1) * GUEST_PAGE);
                for (; word != end; word++, value += GUEST_WORD)
                    *word = value;
            }
            /* After the page, never before: a taker that comes in between would read the old page and have the bit. */
            if (log)
                __atomic_fetch_or(&log[page >> 6], (uint64_t)1 << (page & 63), __ATOMIC_RELEASE);
            stored++;
        }
        box->pages_stored = stored;
        box->step = ++step;
    }
}

const void *guest_program_text(uint64_t *len_bytes_out)
{
    *len_bytes_out = (uint64_t)(__stop_guest_text - __start_guest_text);
    return __start_guest_text;
}

uint64_t guest_take_words(uint64_t *words, uint64_t *out, uint64_t n_words)
{
    uint64_t n_bits = 0;
    for (uint64_t i = 0; i < n_words; i++) {
        /* An empty word is not exchanged: a bit that comes just now is taken next time. */
        out[i] = __atomic_load_n(&words[i], __ATOMIC_RELAXED) ? __atomic_exchange_n(&words[i], 0, __ATOMIC_ACQ_REL) : 0;
        n_bits += (uint64_t)__builtin_popcountll(out[i]);
    }
    return n_bits;
}

void guest_put_words(uint64_t *words, const uint64_t *bits, uint64_t n_words)
{
    for (uint64_t i = 0; i < n_words; i++)
        if (bits[i])
            __atomic_fetch_or(&words[i], bits[i], __ATOMIC_RELEASE);
}

GUEST_INLINE uint64_t hash_step(uint64_t lane, uint64_t word)
{
    lane = (lane ^ word) * GUEST_STEP;
    return (lane ^ lane >> 32) * GUEST_WORD;
}

/* Eight lanes, word i to lane i mod 8: a multiplication takes four cycles and eight of them overlap.  Each step is a
 * bijection of its lane, so a change of one word always changes the hash.  Two multiplications, because a changed top
 * bit goes through one of them as it is, and a bit changed in the next word of the lane could take it back. */
uint64_t guest_hash(const void *data, uint64_t len_bytes)
{
    const unsigned char *at = data;
    uint64_t n_words = len_bytes / 8, w[8];
    uint64_t a = 1, b = 2, c = 3, d = 4, e = 5, f = 6, g = 7, h = 8;
    for (; n_words >= 8; n_words -= 8, at += 64) {
        memcpy(w, at, 64);
        a = hash_step(a, w[0]);
        b = hash_step(b, w[1]);
        c = hash_step(c, w[2]);
        d = hash_step(d, w[3]);
        e = hash_step(e, w[4]);
        f = hash_step(f, w[5]);
        g = hash_step(g, w[6]);
        h = hash_step(h, w[7]);
    }
    uint64_t lanes[8] = {a, b, c, d, e, f, g, h};
    for (uint64_t i = 0; i < n_words; i++, at += 8) {
        memcpy(w, at, 8);
        lanes[i] = hash_step(lanes[i], w[0]);
    }
    uint64_t all = len_bytes;
    for (int i = 0; i < 8; i++)
        all = mix(all ^ lanes[i]) * GUEST_PAGE;
    return all;
}

void guest_hash_pages(const void *addr, uint64_t n_pages, uint64_t page_size, uint64_t *out)
{
    for (uint64_t i = 0; i < n_pages; i++)
        out[i] = guest_hash((const char *)addr + i * page_size, page_size);
}
