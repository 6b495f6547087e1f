/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_guest.h -- the reference guest in C: what a VMM has already before it meets colocache.  Knows nothing of it.
 *
 * The same machine as colocache/vmm/ in Python: two RAM blocks, three logged memory slots, one vCPU at privilege level 3, a
 * device state that the Python machine wrote.  guest_program.h says what the guest does; here every page is computed
 * again from the guest's history, step by step, and compared.
 *
 *     guest-physical  0        boot, all           slot 0
 *                     8 MiB    mailbox, no block   slot 3, not logged
 *                     16 MiB   pc.ram to `split`   slot 1
 *                     4 GiB+   pc.ram from `split` slot 2
 */
#ifndef VMM_GUEST_H
#define VMM_GUEST_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "guest_program.h"

#define GUEST_PAGE_SIZE 4096u
#define GUEST_SLOTS 3

struct guest_history {
    uint64_t first_step, salt;
};

struct guest {
    int kvm, vm, vcpu;
    bool manual_protect; /* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is on */
    uint32_t ring_bytes; /* of the vCPU's dirty ring; 0 = none */
    struct kvm_run *run;
    uint64_t run_bytes;
    volatile struct guest_mailbox *box;

    uint8_t *boot, *ram; /* where the blocks are mapped */
    uint64_t boot_pages, ram_pages, split, high_addr;

    struct guest_history *history;
    uint64_t n_history;
    uint64_t *boot_hashes;           /* of the newest device state; NULL = not known */
    uint8_t shadow[GUEST_PAGE_SIZE]; /* what the load of the device state wrote to the last page of boot */

    void (*wrote)(void *context, uint32_t block, uint64_t first_pfn, uint64_t n_pages); /* user space wrote guest RAM */
    void (*ring_full)(void *context);                                                   /* in the vCPU's thread */
    void *context;
    uint64_t n_ring_full;

    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool wanted, running, quit;
    const char *failure; /* why the vCPU runs no more */
};

/* KVM, slots, a vCPU and its thread, standing.  The blocks stay yours.  0, or -1 with a line on stderr; 77: no /dev/kvm here. */
int guest_create(struct guest *guest, uint8_t *boot, uint64_t boot_pages, uint8_t *ram, uint64_t ram_pages, uint32_t ring_bytes);
void guest_destroy(struct guest *guest);

/* Fill the boot block as a primary does, and stand before the first instruction. */
void guest_boot(struct guest *guest);
/* A fresh salt into the history; the vCPU runs. */
void guest_resume(struct guest *guest);
/* Back when the vCPU stands at a step boundary. */
void guest_pause(struct guest *guest);
/* The vCPU died.  At any time. */
bool guest_failed(struct guest *guest);

/* Is this a device state that this guest can load?  0, or a number that says where it is wrong.  `guest` fits a check callback. */
int guest_check_state(void *guest, const void *state, uint64_t len_bytes);
/* Become the machine whose RAM is here already.  First every page is compared with the hashes in the state, if it has any:
 * *wrong_out pages differ of *checked_out.  Then the last page of boot is written, as devices do.  0, or -1. */
int guest_load_state(struct guest *guest, const void *state, uint64_t len_bytes, uint64_t *checked_out, uint64_t *wrong_out);

/* Every page of both blocks against the history (standing): how many are wrong. */
uint64_t guest_verify(struct guest *guest);

#endif
