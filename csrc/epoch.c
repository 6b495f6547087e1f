/* SPDX-License-Identifier: Apache-2.0 */
/*
 * epoch.c -- the open epoch: state, number, what has come of it, its staged device state, and the gate its receivers pass.
 *
 * What always holds
 *   1. `receiving` is stored before the first byte of an epoch reaches the cache, and is never lowered.
 *   2. At most one epoch is open.  It has a number greater than every one used before, and loses it only by a seal or by being given up.
 *   3. Nobody is inside the gate while the open epoch is sealed or given up, so no page of it can follow a newer one into the cache.
 *   4. The state changes by compare-and-exchange, and only as the table says: of a seal, an abort and a failover at one moment one is
 *      first and the others see it.
 *   5. `taken_over` is stored before anybody is told that this machine took over, whichever thread decided it.
 *
 * Who may ask: receiving threads (receive), any thread (abort, failover), the conductor (the others), attach (recovered).
 *
 *   state          receive  claim          release     sealed        loaded      loaded,      load    committed  failover       told
 *                                                                                uncommitted  failed
 *   EMPTY          opens    CLAIMED_FIRST  -           -             -           -            -       -          -              -
 *   LIVE           opens    CLAIMED        -           -             -           -            -       -          TAKING_OVER    -
 *   CLAIMED_FIRST  -        -              EMPTY       SEALED        -           -            -       -          -              -
 *   CLAIMED        -        -              LIVE        SEALED        -           -            -       -          CLAIMED_ASKED  -
 *   CLAIMED_ASKED  -        -              TAKING_OVER SEALED_ASKED  -           -            -       -          same           -
 *   SEALED         -        -              -           -             LIVE        RUNNING      FAILED  same       SEALED_ASKED   -
 *   SEALED_ASKED   -        -              -           -             TAKING_OVER TAKING_OVER  FAILED  same       same           -
 *   RUNNING        -        -              -           -             -           -            -       LIVE       TAKING_OVER    -
 *   LOAD_FAILED    -        -              -           -             -           -            -       -          -              -
 *   TAKING_OVER    -        -              -           -             -           -            -       same       same           FAILED_OVER
 *   FAILED_OVER    -        -              -           -             -           -            -       same       same           same
 *
 * and by attach: EMPTY --recovered--> LIVE.  "-": refused, nothing changes.  A seal and an abort both claim; an abort releases, a seal that
 * fails releases, a seal that stores the commit word is `sealed`.
 */
#include "internal.h"

#include "bounds.h"
#include "epoch.h"
#include "error.h"
#include "fault.h"
#include "flush_set.h"
#include "gate.h"
#include "staging.h"
#include "word.h"

enum event { CLAIM, RELEASE, SEAL, LOADED, LOADED_UNCOMMITTED, LOADED_BADLY, COMMITTED, FAILOVER, TOLD, RECOVERED, EVENTS };

static const uint8_t table[CC_STATES][EVENTS] = {
    [CC_EMPTY] = {[CLAIM] = CC_CLAIMED_FIRST, [RECOVERED] = CC_LIVE},
    [CC_LIVE] = {[CLAIM] = CC_CLAIMED, [FAILOVER] = CC_TAKING_OVER},
    [CC_CLAIMED_FIRST] = {[RELEASE] = CC_EMPTY, [SEAL] = CC_SEALED},
    [CC_CLAIMED] = {[RELEASE] = CC_LIVE, [SEAL] = CC_SEALED, [FAILOVER] = CC_CLAIMED_ASKED},
    [CC_CLAIMED_ASKED] = {[RELEASE] = CC_TAKING_OVER, [SEAL] = CC_SEALED_ASKED, [FAILOVER] = CC_CLAIMED_ASKED},
    [CC_SEALED] = {[LOADED] = CC_LIVE,
                   [LOADED_UNCOMMITTED] = CC_RUNNING,
                   [LOADED_BADLY] = CC_LOAD_FAILED,
                   [COMMITTED] = CC_SEALED,
                   [FAILOVER] = CC_SEALED_ASKED},
    [CC_SEALED_ASKED] = {[LOADED] = CC_TAKING_OVER,
                         [LOADED_UNCOMMITTED] = CC_TAKING_OVER,
                         [LOADED_BADLY] = CC_LOAD_FAILED,
                         [COMMITTED] = CC_SEALED_ASKED,
                         [FAILOVER] = CC_SEALED_ASKED},
    [CC_RUNNING] = {[COMMITTED] = CC_LIVE, [FAILOVER] = CC_TAKING_OVER},
    [CC_TAKING_OVER] = {[COMMITTED] = CC_TAKING_OVER, [FAILOVER] = CC_TAKING_OVER, [TOLD] = CC_FAILED_OVER},
    [CC_FAILED_OVER] = {[COMMITTED] = CC_FAILED_OVER, [FAILOVER] = CC_FAILED_OVER, [TOLD] = CC_FAILED_OVER},
};

/* move -- what the table says; *from is the state it was in.  CC_STATE_NONE: not from there. */
static enum cc_state move(struct colocache *cc, enum event event, enum cc_state *from)
{
    uint32_t state = cc_observe32(&cc->epoch.state);
    uint8_t to;
    do {
        to = table[state][event];
        *from = state;
    } while (to && to != state && !cc_decide32(&cc->epoch.state, &state, to));
    return to;
}

/* take_over -- after the decision: so that no later attach brings back an epoch that the world has moved on from.  Whoever finds
 * TAKING_OVER does it too: a second thread that asks is told only when the word is there. */
static void take_over(struct colocache *cc)
{
    enum cc_state from;
    CC_CRASH_POINT("failover: decided, not told");
    cc_word_publish(&cc->region.control->taken_over, 1);
    CC_CRASH_POINT("failover: told");
    if (move(cc, TOLD, &from) && from == CC_TAKING_OVER)
        cc_log(cc, COLOCACHE_LOG_INFO, "this secondary took over");
}

void cc_epoch_init(struct colocache *cc)
{
    cc->epoch.state = CC_EMPTY;
    pthread_mutex_init(&cc->epoch.opening, NULL);
}

void cc_epoch_destroy(struct colocache *cc)
{
    pthread_mutex_destroy(&cc->epoch.opening);
}

enum cc_state cc_epoch_state(const struct colocache *cc)
{
    return cc_observe32(&cc->epoch.state);
}

bool cc_epoch_failover_asked(enum cc_state state)
{
    return state == CC_CLAIMED_ASKED || state == CC_SEALED_ASKED;
}

/* refuse -- why nothing of an epoch can be received, sealed or aborted in this state */
static int refuse(enum cc_state state, uint64_t epoch, const char *what_for)
{
    switch (state) {
    case CC_LOAD_FAILED:
        return cc_fail(COLOCACHE_E_LOAD_FAILED, "epoch %llu can't %s: the device state before it did not load, attach with a fresh VM",
                       (unsigned long long)epoch, what_for);
    case CC_TAKING_OVER:
    case CC_FAILED_OVER:
        return cc_fail(COLOCACHE_E_FAILED_OVER, "epoch %llu can't %s: this secondary took over", (unsigned long long)epoch, what_for);
    default:
        return cc_fail(COLOCACHE_E_SEALED, "epoch %llu can't %s: one is being sealed, flushed or loaded; call flush and loaded first",
                       (unsigned long long)epoch, what_for);
    }
}

/* ---- receiving -------------------------------------------------------------------------------------------------------- */

/* empty_stale -- of a bounded cache, what an epoch left that is committed or given up; `opening` held */
static int empty_stale(struct colocache *cc)
{
    if (!cc->epoch.stale)
        return 0;
    int rc = cc_staging_empty(cc);
    if (rc == 0)
        cc->epoch.stale = false;
    return rc;
}

/* open_epoch -- the first page (or device state) of a new epoch */
static int open_epoch(struct colocache *cc, uint64_t epoch)
{
    struct cc_epoch *mine = &cc->epoch;
    int rc = 0;
    pthread_mutex_lock(&mine->opening);
    uint64_t open = cc_observe(&mine->open);
    if (open == 0) {
        uint64_t newest = 0;
        rc = cc_word_read("newest received epoch", &cc->region.control->receiving, &newest);
        if (rc == 0)
            rc = cc_bounds_epoch(epoch);
        if (rc == 0 && epoch <= newest)
            rc = cc_fail(COLOCACHE_E_EPOCH, "epoch %llu can't be opened: the newest used is %llu, and no number is used again",
                         (unsigned long long)epoch, (unsigned long long)newest);
        if (rc == 0)
            rc = empty_stale(cc); /* before a page of this epoch is let in: nothing may show under its bits */
        if (rc == 0) {
            cc_add(&mine->received_before, cc_peek(&mine->received_pages));
            cc_poke(&mine->received_pages, 0);
            CC_CRASH_POINT("receive: before the receiving word");
            cc_word_publish(&cc->region.control->receiving, epoch); /* before the first byte */
            CC_CRASH_POINT("receive: after the receiving word");
            cc_publish(&mine->open, epoch);
            CC_CRASH_POINT("receive: the epoch is open");
        }
    } else if (open != epoch) {
        rc = cc_fail(COLOCACHE_E_EPOCH, "epoch %llu came while epoch %llu is open: seal or abort that first", (unsigned long long)epoch,
                     (unsigned long long)open);
    }
    pthread_mutex_unlock(&mine->opening);
    return rc;
}

void cc_epoch_knock(struct colocache *cc)
{
    cc_gate_enter(&cc->epoch.gate);
}

/* The state is looked at inside the gate, so that a claim or failover that closed the gate before is seen. */
int cc_epoch_open(struct colocache *cc, uint64_t epoch)
{
    enum cc_state state = cc_observe32(&cc->epoch.state);
    if (state != CC_EMPTY && state != CC_LIVE)
        return refuse(state, epoch, "arrive");
    if (epoch == 0 || cc_observe(&cc->epoch.open) != epoch) /* 0 also stands for "none is open": it must not pass for it */
        return open_epoch(cc, epoch);
    return 0;
}

int cc_epoch_enter(struct colocache *cc, uint64_t epoch)
{
    cc_epoch_knock(cc);
    int rc = cc_epoch_open(cc, epoch);
    if (rc)
        cc_gate_leave(&cc->epoch.gate);
    return rc;
}

void cc_epoch_leave(struct colocache *cc)
{
    cc_gate_leave(&cc->epoch.gate);
}

/* Whoever is inside keeps the epoch open, so what is found here stays true until cc_epoch_leave. */
int cc_epoch_check_inside(struct colocache *cc, uint64_t epoch)
{
    if (!(cc_observe32(&cc->epoch.gate.word) & ~CC_GATE_CLOSED))
        return cc_fail(COLOCACHE_E_ORDER, "no receive in place is under way: colocache_receive_begin comes first");
    uint64_t open = cc_observe(&cc->epoch.open);
    if (epoch == 0 || open != epoch)
        return cc_fail(COLOCACHE_E_EPOCH, "a receive into epoch %llu can't end: the open one is %llu", (unsigned long long)epoch,
                       (unsigned long long)open);
    return 0;
}

void cc_epoch_received(struct colocache *cc, uint64_t n_pages)
{
    cc_add(&cc->epoch.received_pages, n_pages);
}

void cc_epoch_stage(struct colocache *cc, const struct cc_staged *staged)
{
    cc->epoch.staged = *staged;
}

uint64_t cc_epoch_received_in_all(struct colocache *cc)
{
    pthread_mutex_lock(&cc->epoch.opening); /* pages pass from one count to the other under it */
    uint64_t n_pages = cc_peek(&cc->epoch.received_before) + cc_peek(&cc->epoch.received_pages);
    pthread_mutex_unlock(&cc->epoch.opening);
    return n_pages;
}

/* ---- the conductor ---------------------------------------------------------------------------------------------------- */

int cc_epoch_claim(struct colocache *cc, uint64_t epoch, const char *what_for)
{
    enum cc_state from;
    return move(cc, CLAIM, &from) ? 0 : refuse(from, epoch, what_for);
}

static int not_the_open_one(struct colocache *cc, uint64_t epoch, const char *what_for)
{
    uint64_t open = cc_observe(&cc->epoch.open), newest = 0;
    (void)cc_word_read("newest received epoch", &cc->region.control->receiving, &newest); /* for the sentence only */
    return cc_fail(COLOCACHE_E_EPOCH, "epoch %llu can't %s: %s%llu", (unsigned long long)epoch, what_for,
                   open ? "the open one is " : "none is open, the newest used is ", (unsigned long long)(open ? open : newest));
}

int cc_epoch_check_complete(struct colocache *cc, uint64_t epoch, uint64_t n_pages)
{
    if (epoch == 0 || epoch != cc_observe(&cc->epoch.open))
        return not_the_open_one(cc, epoch, "be sealed");
    if (cc->epoch.staged.epoch != epoch)
        return cc_fail(COLOCACHE_E_INCOMPLETE,
                       "epoch %llu is aborted, it has no device state: call device_state_begin, with length 0 if there is none",
                       (unsigned long long)epoch);
    uint64_t received = cc_observe(&cc->epoch.received_pages);
    if (n_pages != COLOCACHE_ANY_COUNT && n_pages != received)
        return cc_fail(COLOCACHE_E_INCOMPLETE, "epoch %llu is aborted: %llu pages were sent, %llu came", (unsigned long long)epoch,
                       (unsigned long long)n_pages, (unsigned long long)received);
    return 0;
}

int cc_epoch_close_gate(struct colocache *cc)
{
    uint32_t inside = cc_gate_close_within(&cc->epoch.gate, cc->epoch.receive_wait_ns);
    if (inside)
        return cc_fail(COLOCACHE_E_RECEIVING,
                       "%u receives into epoch %llu are still under way after %llu ms: end them (receive_done, or shut down their sockets) "
                       "and call again",
                       inside, (unsigned long long)cc_observe(&cc->epoch.open), (unsigned long long)(cc->epoch.receive_wait_ns / 1000000u));
    return 0;
}

void cc_epoch_open_gate(struct colocache *cc)
{
    cc_gate_open(&cc->epoch.gate);
}

/* What can't be freed now is freed before the next epoch opens. */
void cc_epoch_empty_cache(struct colocache *cc)
{
    pthread_mutex_lock(&cc->epoch.opening);
    cc->epoch.stale = true;
    (void)empty_stale(cc);
    pthread_mutex_unlock(&cc->epoch.opening);
}

/* discard -- what came of an epoch that is given up: the primary has no RECEIVED for it and sends it again.  Bits first: a hole under a
 * bit would be a page of zeros. */
static void discard(struct colocache *cc)
{
    CC_CRASH_POINT("abort: before the bits");
    cc_flush_set_drop(cc);
    CC_CRASH_POINT("abort: the bits are gone");
    cc_epoch_empty_cache(cc);
}

/* The VM's own state is intact, so a failover that was asked for meanwhile is granted. */
int cc_epoch_release(struct colocache *cc, bool give_up)
{
    enum cc_state from;
    int rc = give_up ? cc_epoch_close_gate(cc) : 0;
    if (give_up && rc == 0) { /* bits and cache stay until an epoch that contains them is sealed; a bounded cache gives its memory back */
        if (cc->bounded)
            discard(cc);
        cc->epoch.staged.epoch = 0;
        cc_publish(&cc->epoch.open, 0);
        cc_gate_open(&cc->epoch.gate);
        cc_add(&cc->epoch.n_given_up, 1);
    }
    if (move(cc, RELEASE, &from) != CC_TAKING_OVER)
        return rc;
    take_over(cc);
    return 1;
}

void cc_epoch_sealed(struct colocache *cc)
{
    enum cc_state from;
    cc->epoch.staged.epoch = 0;
    cc_publish(&cc->epoch.open, 0);
    move(cc, SEAL, &from); /* from here on there is a state to take over from */
}

void cc_epoch_committed(struct colocache *cc)
{
    enum cc_state from;
    pthread_mutex_lock(&cc->epoch.opening);
    cc->epoch.stale = cc->bounded;
    pthread_mutex_unlock(&cc->epoch.opening);
    move(cc, COMMITTED, &from);
}

int cc_epoch_loaded(struct colocache *cc, bool ok, bool committed)
{
    enum cc_state from, to = move(cc, !ok ? LOADED_BADLY : committed ? LOADED : LOADED_UNCOMMITTED, &from);
    if (to == CC_STATE_NONE)
        return cc_fail(COLOCACHE_E_NOT_SEALED, "loaded was called but no epoch is sealed");
    if (to == CC_TAKING_OVER)
        take_over(cc);
    return to == CC_TAKING_OVER;
}

void cc_epoch_recovered(struct colocache *cc)
{
    enum cc_state from;
    move(cc, RECOVERED, &from);
}

enum cc_state cc_epoch_failover(struct colocache *cc, enum cc_state *from)
{
    enum cc_state to = move(cc, FAILOVER, from);
    if (to == CC_TAKING_OVER)
        take_over(cc);
    return to;
}

/* ---- any thread ------------------------------------------------------------------------------------------------------- */

int colocache_abort(struct colocache *cc, uint64_t epoch, const char *reason)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    enum cc_state state = cc_epoch_state(cc);
    if (table[state][CLAIM] && (epoch == 0 || cc_observe(&cc->epoch.open) != epoch))
        return not_the_open_one(cc, epoch, "be aborted"); /* found out before the state changes: receives of the open one go on */
    CC_CRASH_POINT("abort: before the claim");
    int rc = cc_epoch_claim(cc, epoch, "be aborted");
    if (rc)
        return rc;
    CC_CRASH_POINT("abort: claimed");
    bool mine = cc_observe(&cc->epoch.open) == epoch; /* again: another epoch may have taken its place before the claim */
    if (!mine)
        rc = not_the_open_one(cc, epoch, "be aborted");
    int released = cc_epoch_release(cc, mine);
    if (released)
        return released; /* 1, whichever epoch was meant: this machine takes over now */
    if (mine)
        cc_log(cc, COLOCACHE_LOG_WARN, "epoch %llu aborted: %s", (unsigned long long)epoch, reason ? reason : "no reason given");
    return rc;
}

int colocache_free_staged(struct colocache *cc)
{
    if (!cc)
        return cc_fail(COLOCACHE_E_ARGUMENT, "the handle is NULL");
    pthread_mutex_lock(&cc->epoch.opening); /* an epoch that opens meanwhile waits, or has freed them itself */
    int rc = empty_stale(cc);
    pthread_mutex_unlock(&cc->epoch.opening);
    return rc;
}
