/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest_program.h -- what the reference machine's guest does, step by step.
 *
 * One function is the whole guest.  A KVM guest runs a copy of its bytes; the process guest calls it in a thread.  It
 * therefore calls nothing and refers to no data outside its mailbox and guest RAM.
 *
 * A step s under the salt S is decided by one hash and nothing else, so whoever knows the salts knows guest RAM:
 *
 *     h      = mix(S + (s + 1) * GUEST_STEP)
 *     kind   = h & 0xffff       below rewrite_below: rewrite;  else below run_below: run;  else one page
 *     page   = first_page + ((h >> 32) * n_pages >> 32)
 *     length = 1, of a run 2 + (((h >> 16 & 0xffff) * (run_pages - 1)) >> 16), cut at the end of the working set
 *
 * A page p that is written gets word i = mix(h ^ (p + 1) * GUEST_PAGE) + i * GUEST_WORD for i = 0 to 511: each version
 * of each page differs from every other in every word, so a page torn, stale or in the wrong place shows.  A rewrite
 * stores every word of the page that is there already: dirty, but unchanged.
 *
 * mix is the 64-bit finaliser x ^= x >> 30; x *= M1; x ^= x >> 27; x *= M2; x ^= x >> 31.
 */
#ifndef COLOCACHE_GUEST_PROGRAM_H
#define COLOCACHE_GUEST_PROGRAM_H

#include <stdint.h>

#define GUEST_STEP 0x9e3779b97f4a7c15u
#define GUEST_PAGE 0xd6e8feb86659fd93u
#define GUEST_WORD 0xa0761d6478bd642fu
#define GUEST_MIX_1 0xbf58476d1ce4e5b9u
#define GUEST_MIX_2 0x94d049bb133111ebu
#define GUEST_PAGE_BYTES 4096
#define GUEST_PAGE_WORDS (GUEST_PAGE_BYTES / 8)

/* All that lives across a step, in device memory of its own: no RAM block, not replicated.  Numbers of pages are of the
 * block pc.ram.  Written by the VMM while the guest stands still, but for `stop`, which it may set at any time. */
struct guest_mailbox {
    uint64_t step;  /* the next step; stored after each step */
    uint64_t limit; /* leave before this step */
    uint64_t stop;  /* not 0: leave at the next step boundary */
    uint64_t salt;
    uint64_t first_page; /* the working set: n_pages pages from here */
    uint64_t n_pages;
    uint64_t run_pages;     /* longest run */
    uint64_t rewrite_below; /* of 65536 */
    uint64_t run_below;     /* of 65536, at least rewrite_below */
    uint64_t split_page;    /* pages from here on lie at high_addr, those before at low_addr */
    uint64_t low_addr;
    uint64_t high_addr;
    uint64_t bitmap;       /* address of the program's own log, one bit a page of pc.ram, or 0: somebody else keeps one */
    uint64_t pages_stored; /* pages written and rewritten so far */
};

void guest_program(volatile struct guest_mailbox *box);

/* The bytes of guest_program as they stand in this build; entered at its first byte. */
const void *guest_program_text(uint64_t *len_bytes_out);

/* Take a log kept by guest_program: out[i] := words[i], words[i] := 0, each in one piece.  Returns the bits taken. */
uint64_t guest_take_words(uint64_t *words, uint64_t *out, uint64_t n_words);
/* Put bits back that could not be handed on. */
void guest_put_words(uint64_t *words, const uint64_t *bits, uint64_t n_words);

/* A 64-bit hash of len_bytes (a multiple of 8) at data.  No secret: it finds damage, not malice. */
uint64_t guest_hash(const void *data, uint64_t len_bytes);
/* The hash of each of n_pages pages of page_size bytes, one after the other from addr. */
void guest_hash_pages(const void *addr, uint64_t n_pages, uint64_t page_size, uint64_t *out);

#endif
