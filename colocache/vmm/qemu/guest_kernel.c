/* SPDX-License-Identifier: Apache-2.0 */
/* guest_kernel.c -- the guest that needs only a QEMU.  See guest_kernel.h. */
#pragma GCC visibility push(hidden) /* a call between functions that others could replace would go through a table elsewhere */
#include "guest_kernel.h"

#include "../guest_program.c" /* its code must be in the same section, which is copied as a whole */

#if defined(__x86_64__)

#define SERIAL 0x3f8
#define SERIAL_TRIES 10000 /* a console that takes nothing must not stop the guest */

#define HEARD_BYTES 32    /* of a line that is told again; the rest is forgotten */
#define HEARD_AT_ONCE 256 /* bytes: whoever types must not keep it from its steps */

GUEST_INLINE uint64_t ticks(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

GUEST_INLINE uint8_t in(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

GUEST_INLINE void out(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}

GUEST_INLINE void say(uint8_t byte)
{
    for (int i = 0; i < SERIAL_TRIES && !(in(SERIAL + 5) & 0x20); i++)
        ;
    out(SERIAL, byte);
}

/* "line N step S", numbers in hexadecimal */
GUEST_INLINE void say_number(uint8_t mark, uint64_t number)
{
    say(mark);
    for (int shift = 60; shift >= 0; shift -= 4) {
        uint8_t digit = number >> shift & 15;
        if (digit || shift == 0 || number >> shift)
            say(digit < 10 ? '0' + digit : 'a' + digit - 10);
    }
}

__attribute__((section(GUEST_TEXT), noinline, used, aligned(16))) GUEST_PLAIN void guest_kernel(volatile struct guest_control *control)
{
    volatile struct guest_mailbox *box = (volatile struct guest_mailbox *)(uintptr_t)control->mailbox;
    volatile uint64_t *ring = (volatile uint64_t *)(uintptr_t)control->ring;
    volatile uint64_t *started = (volatile uint64_t *)(uintptr_t)GUEST_STARTED;
    if (*started)
        for (uint64_t at = control->area; at < control->area_end; at += 8)
            *(volatile uint64_t *)(uintptr_t)at = 0;
    *started = 1;
    uint8_t heard[HEARD_BYTES];
    uint64_t n_heard = 0, n_told = 0;
    out(SERIAL + 2, 1); /* room for more than one byte */
    uint64_t due = ticks(), line = due;
    for (;;) {
        /* Volatile, so in this order: entry, count, salt.  Steps under a salt come after its entry is counted. */
        uint64_t salt = mix(box->salt ^ ticks()), n = control->n_salts;
        ring[n % GUEST_RING_ENTRIES * 2] = box->step;
        ring[n % GUEST_RING_ENTRIES * 2 + 1] = salt;
        control->n_salts = n + 1;
        box->salt = salt;
        box->limit = box->step + control->batch_steps;
        guest_program(box);

        /* Until `due`.  Too far behind to catch up, or a counter that jumped: begin anew from now. */
        const uint64_t pace = control->batch_ticks;
        due += pace;
        uint64_t now = ticks();
        if (due - now > pace && now - due > 8 * pace)
            due = now;
        while (due - now <= pace && due != now) {
            __asm__ volatile("pause");
            now = ticks();
        }
        /* What was typed: ">N LINE", N in hexadecimal from 0. */
        for (int n = 0; n < HEARD_AT_ONCE && in(SERIAL + 5) & 1; n++) {
            uint8_t byte = in(SERIAL);
            if (byte != '\r' && byte != '\n') {
                if (n_heard < HEARD_BYTES)
                    heard[n_heard++] = byte;
            } else if (n_heard) {
                say_number('>', n_told++);
                say(' ');
                for (uint64_t i = 0; i < n_heard; i++)
                    say(heard[i]);
                say('\r');
                say('\n');
                n_heard = 0;
            }
        }
        if (control->line_ticks && now - line >= control->line_ticks) {
            line = now;
            say_number('#', control->n_lines);
            say_number(' ', box->step);
            say('\r');
            say('\n');
            control->n_lines++;
        }
    }
}

/* From what a multiboot loader leaves (32-bit, flat, no paging) to guest_kernel(control) at level 3.  Everything it needs lies at fixed
 * addresses; the code runs where it was loaded, so labels are counted from GUEST_LOAD. */
#define STRING(x) #x
#define TEXT_OF(x) STRING(x)
__asm__(".pushsection guest_boot, \"a\", @progbits\n"
        ".set LOAD, " TEXT_OF(
            GUEST_LOAD) "\n"
                        ".set CONTROL, " TEXT_OF(
                            GUEST_CONTROL) "\n"
                                           ".balign 8\n"
                                           ".code32\n"
                                           "guest_boot_begin:\n"
                                           "  .long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000)\n" /* with the addresses that follow */
                                           "  .long LOAD, LOAD, 0, 0, LOAD + guest_boot_entry - guest_boot_begin\n"
                                           "guest_boot_entry:\n"
                                           "  cli\n"
                                           "  movl $LOAD + 0x3000, %eax\n"
                                           "  movl %eax, %cr3\n"
                                           "  movl %cr4, %eax\n"
                                           "  orl $0x620, %eax\n" /* PAE, SSE */
                                           "  movl %eax, %cr4\n"
                                           "  movl $0xc0000080, %ecx\n" /* EFER: long mode */
                                           "  rdmsr\n"
                                           "  orl $0x100, %eax\n"
                                           "  wrmsr\n"
                                           "  movl $LOAD + 0x14000, %esp\n"
                                           "  lgdt LOAD + 0x2f00\n"
                                           "  movl $0x80010033, %eax\n" /* paging, write protection, protection, and what goes with them */
                                           "  movl %eax, %cr0\n"
                                           "  ljmp $0x08, $LOAD + guest_boot_long - guest_boot_begin\n"
                                           ".code64\n"
                                           "guest_boot_long:\n"
                                           "  movl $0x10, %eax\n"
                                           "  movl %eax, %ss\n"
                                           "  movl $0x2b, %eax\n"
                                           "  movl %eax, %ds\n"
                                           "  movl %eax, %es\n"
                                           "  movl $CONTROL, %edi\n"
                                           "  cmpl $1, 16(%rdi)\n"
                                           "  je 1f\n"
                                           "  pushq $0x2b\n"
                                           "  pushq 8(%rdi)\n"
                                           "  pushq $0x3002\n" /* IOPL 3: level 3 uses ports, and no interrupt comes */
                                           "  pushq $0x33\n"
                                           "  pushq (%rdi)\n"
                                           "  iretq\n"
                                           "1:\n"
                                           "  movl $0x174, %ecx\n" /* the base of SYSEXIT's segments: code 0x30, stack 0x38 */
                                           "  movl $0x10, %eax\n"
                                           "  xorl %edx, %edx\n"
                                           "  wrmsr\n"
                                           "  pushq $0x3002\n"
                                           "  popfq\n"
                                           "  movq (%rdi), %rdx\n"
                                           "  movq 8(%rdi), %rcx\n"
                                           "  sysexitq\n"
                                           "guest_boot_end:\n"
                                           ".popsection\n");

extern const char guest_boot_begin[] __attribute__((visibility("hidden")));
extern const char guest_boot_end[] __attribute__((visibility("hidden")));

const void *guest_kernel_boot(uint64_t *len_bytes_out)
{
    *len_bytes_out = (uint64_t)(guest_boot_end - guest_boot_begin);
    return guest_boot_begin;
}

const void *guest_kernel_text(uint64_t *len_bytes_out, uint64_t *entry_out)
{
    *entry_out = (uint64_t)((const char *)(uintptr_t)guest_kernel - __start_guest_text);
    return guest_program_text(len_bytes_out);
}

uint64_t guest_kernel_ticks(void)
{
    return ticks();
}

#else

const void *guest_kernel_boot(uint64_t *len_bytes_out)
{
    *len_bytes_out = 0;
    return "";
}

const void *guest_kernel_text(uint64_t *len_bytes_out, uint64_t *entry_out)
{
    *len_bytes_out = *entry_out = 0;
    return "";
}

uint64_t guest_kernel_ticks(void)
{
    return 0;
}

#endif
