/* SPDX-License-Identifier: Apache-2.0 */
/* epoch.h -- the open epoch, and what state the secondary is in.  The table of what leads where is at the head of epoch.c. */
#ifndef CC_EPOCH_H
#define CC_EPOCH_H

#include "internal.h"

enum cc_state {
    CC_STATE_NONE = 0, /* in the table: this may not happen here */
    CC_EMPTY,          /* nothing to take over from yet, or no more */
    CC_LIVE,           /* the VM runs or may run; an epoch may be arriving */
    CC_CLAIMED_FIRST,  /* a seal or an abort has the open epoch, and there is nothing to take over from */
    CC_CLAIMED,        /* the same over a state that stands */
    CC_CLAIMED_ASKED,  /* and failover was asked for meanwhile */
    CC_SEALED,         /* the commit word is stored; the VM stands until its device state is loaded */
    CC_SEALED_ASKED,
    CC_RUNNING, /* the VM runs, and its flush is not committed yet: no page of a newer epoch may come */
    CC_LOAD_FAILED,
    CC_TAKING_OVER, /* decided; `taken_over` is not stored yet */
    CC_FAILED_OVER, /* this machine is the one the world sees, and shared memory says so */
    CC_STATES
};

void cc_epoch_init(struct colocache *cc);
void cc_epoch_destroy(struct colocache *cc);
enum cc_state cc_epoch_state(const struct colocache *cc);
bool cc_epoch_failover_asked(enum cc_state state);

/* ---- whoever receives; any thread ---- */

/* Into the gate, with `epoch` open: a new number opens it.  cc_epoch_leave after every 0.  E_EPOCH, E_SEALED, E_LOAD_FAILED, E_FAILED_OVER. */
int cc_epoch_enter(struct colocache *cc, uint64_t epoch);
/* The same in two steps, for what must be looked at inside the gate before an epoch opens; cc_epoch_leave after the first, whatever came. */
void cc_epoch_knock(struct colocache *cc);
int cc_epoch_open(struct colocache *cc, uint64_t epoch);
void cc_epoch_leave(struct colocache *cc);
int cc_epoch_check_inside(struct colocache *cc, uint64_t epoch); /* somebody is in the gate, and `epoch` is open.  E_EPOCH, E_ORDER */
void cc_epoch_received(struct colocache *cc, uint64_t n_pages);  /* inside the gate: pages that came whole */
void cc_epoch_stage(struct colocache *cc, const struct cc_staged *staged); /* inside the gate */
uint64_t cc_epoch_received_in_all(struct colocache *cc);

/* ---- the conductor ---- */

/* Only one of a seal, an abort and a failover can have the open epoch.  E_SEALED, E_LOAD_FAILED, E_FAILED_OVER. */
int cc_epoch_claim(struct colocache *cc, uint64_t epoch, const char *what_for);
/* After a claim.  Is `epoch` the open one and all of it there?  0, E_EPOCH, E_INCOMPLETE. */
int cc_epoch_check_complete(struct colocache *cc, uint64_t epoch, uint64_t n_pages);
int cc_epoch_close_gate(struct colocache *cc); /* 0: the last receiver is out, its bytes and bits are seen.  E_RECEIVING */
void cc_epoch_open_gate(struct colocache *cc);
/* A claim that led to no seal; `give_up`: the epoch's number is spent.  1: failover was asked for meanwhile and is granted.
 * E_RECEIVING: it can't be given up while somebody receives, and is still open. */
int cc_epoch_release(struct colocache *cc, bool give_up);
/* A claim that led to one: the commit word is stored.  Gate closed. */
void cc_epoch_sealed(struct colocache *cc);
void cc_epoch_committed(struct colocache *cc);
/* The load of the device state ended.  0, 1: taken over, E_NOT_SEALED. */
int cc_epoch_loaded(struct colocache *cc, bool ok, bool committed);
/* Bounded: nothing in the cache is wanted any more, and no bit is set for it. */
void cc_epoch_empty_cache(struct colocache *cc);
/* Any thread.  The state it led to, with `taken_over` stored if this machine takes over now; CC_STATE_NONE: not from `*from`. */
enum cc_state cc_epoch_failover(struct colocache *cc, enum cc_state *from);
/* Attach: guest RAM and device state are an epoch. */
void cc_epoch_recovered(struct colocache *cc);

#endif
