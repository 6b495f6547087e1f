/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest_kernel.h -- the small guest program that needs only a QEMU: guest_program.h's steps, as a kernel of its own.
 *
 * QEMU loads it as a multiboot kernel.  boot (asm, at the end of guest_kernel.c) goes from 32-bit mode to 64-bit mode at privilege level 3,
 * where a KVM without hardware underneath runs natively, and never comes back.  guest_kernel then does batches of steps at a rate, and
 * before each batch draws a new salt from the time stamp counter: two machines that resumed from the same state write different pages soon
 * after, as they must for a check to mean anything.  What it drew it keeps in a ring in its own memory, so whoever reads guest RAM knows what
 * every page of the working set must hold.
 *
 * Guest-physical from GUEST_LOAD on, one page each unless said otherwise; pc.ram begins at 0 and is mapped one to one:
 *
 *     0        multiboot header and boot
 *     1        struct guest_control: written by the host when it makes the image, but for what is said to be the guest's
 *     2        descriptor table
 *     3 to 8   page tables
 *     9 to 16  code: guest_kernel and guest_program
 *     17       struct guest_mailbox
 *     18       stack, two pages
 *     20       the ring of salts, GUEST_RING_PAGES
 *     84       a word that is not 0 after the first start: the loader leaves it alone
 *
 * At a reboot the loader makes all but the last two anew; the guest then clears what it wrote before, so that its history is the whole truth.
 *
 * Now and then it writes a line on its serial port: "#N STEP", in hexadecimal; and it tells each line that is typed there again: ">N LINE".
 *
 * Stopped anywhere, not only between two steps: the pages of the step that is under way may be new up to one word and old after it.
 */
#ifndef COLOCACHE_GUEST_KERNEL_H
#define COLOCACHE_GUEST_KERNEL_H

#include <stdint.h>

#include "../guest_program.h"

#define GUEST_LOAD 0x100000
#define GUEST_CONTROL (GUEST_LOAD + 0x1000)
#define GUEST_RING_PAGES 64
#define GUEST_STARTED (GUEST_LOAD + (20 + GUEST_RING_PAGES) * GUEST_PAGE_BYTES)
#define GUEST_RING_ENTRIES (GUEST_RING_PAGES * GUEST_PAGE_BYTES / 16)

struct guest_control {
    uint64_t entry;       /* address of guest_kernel */
    uint64_t stack;       /* its end */
    uint64_t by_sysexit;  /* how level 3 is entered: 1 SYSEXIT, else IRETQ */
    uint64_t mailbox;     /* addresses */
    uint64_t ring;        /* GUEST_RING_ENTRIES of {first step, salt} */
    uint64_t batch_steps; /* a new salt every so many steps */
    uint64_t batch_ticks; /* of the time stamp counter, from one batch to the next; 0 = flat out */
    uint64_t line_ticks;  /* between two lines on the console; 0 = none */
    uint64_t area;        /* guest-physical: what is cleared at a reboot */
    uint64_t area_end;
    uint64_t n_salts; /* the guest's: drawn so far; the newest is entry (n_salts - 1) mod GUEST_RING_ENTRIES */
    uint64_t n_lines; /* the guest's: lines written */
};

void guest_kernel(volatile struct guest_control *control);

/* Bytes of the boot code, and of all other code with the offsets of its entry; 0 bytes where the guest can't be built. */
const void *guest_kernel_boot(uint64_t *len_bytes_out);
const void *guest_kernel_text(uint64_t *len_bytes_out, uint64_t *entry_out);

/* The time stamp counter of this CPU; 0 where there is none. */
uint64_t guest_kernel_ticks(void);

#endif
