/* SPDX-License-Identifier: Apache-2.0 */
/*
 * conversation.pml -- the checkpoint conversation of primary and secondary, for the model checker spin.
 *
 * Two processes talk over one connection: primary (PVM) and secondary (SVM).  A third, failures, kills them or cuts the
 * connection, at most once until the pair is in step again, connects them anew, and looks at how it all ends.
 * tests/test_conversation_model.py runs it and its mutants (one rule broken: -DMUTANT_...), which spin must notice.  By hand:
 *     spin -a conversation.pml && gcc -O2 -DSAFETY -DNOREDUCE -o pan pan.c && ./pan -m10000
 *     ./pan -r conversation.pml.trail          the way to what is broken, step by step: D_STEPn is line n of this file
 *
 * Memory is one page of which every version is known, and "other pages", of which only matters that they travel: the
 * protocol treats all pages alike, so a page that could go missing or stay old could be this one.  A copy under way makes
 * the page TORN, so half a copy is never taken for a whole one.  What the SVM writes itself is OWN.
 * Epoch 1 is committed at the start; the initial copy happens in here after the SVM's host has died.
 * What each side hears in which state is recorded (HEARS), and the test compares it with the table that the program
 * reads, colocache/replication/conversation.py.
 * Left out: several streams, console input, writes to disks (they have no number and no state: disks.pml has their laws), output that travels while the machines run (what counts is that the rest of it comes in time), the lazy flush, preflush, PING (a time limit that passes is a lost connection), checkpoints
 * the SVM asks for, a death during attach (it would be the second failure; the crash tests have it).
 */

#ifndef MAX_EPOCH
#define MAX_EPOCH 3            /* the newest epoch number the PVM may use */
#endif
#ifndef MAX_FAILURES
#define MAX_FAILURES 2
#endif
#ifndef MAX_ABORTS
#define MAX_ABORTS 9           /* by choice; those that a failure brings don't count.  9: no limit but the epochs */
#endif
#define CAPACITY 3             /* messages on their way in one direction */
#define TORN 255               /* a page that is being copied, or was when somebody died */
#define OWN  254               /* a page the SVM wrote on its own branch, since it last resumed */

/* Each of these must really happen in the search, or the search proves nothing: pan counts them while it runs. */
#define EVENTS \
    X(takeover_live) X(sealed_epoch_finished_alone) X(takeover_asked_for_while_sealing) X(takeover_while_the_primary_lives) \
    X(takeover_after_having_been_declared_lost_and_in_step_again) \
    X(attach_replayed) X(attach_restarted) X(attach_cannot_restart) X(made_whole_after_it_could_not_restart) \
    X(initial_copy_after_host_death) X(load_failed) X(reconnected) X(received_lost_after_seal) \
    X(epoch_unsealed_at_reconnection) X(abort_by_primary) X(abort_by_secondary) X(abort_crosses_seal) \
    X(declared_alone) X(output_while_alone) X(takeover_refused_to_a_declared_lost_secondary) X(in_step_after_alone) \
    X(alone_refused_after_takeover) X(second_failure_after_a_commit) \
    X(output_of_the_epoch_taken_over_released_late) X(nothing_moves_any_more) \
    X(operator_takes_over_from_a_primary_that_lives) X(told_of_the_takeover) \
    X(P_HELLO_hears_HELLO) X(P_HELLO_hears_READY) X(P_HELLO_hears_TOOK_OVER) \
    X(P_IDLE_hears_ABORT) X(P_IDLE_hears_TOOK_OVER) \
    X(P_REQUESTED_hears_REPLY) X(P_REQUESTED_hears_ABORT) X(P_REQUESTED_hears_TOOK_OVER) \
    X(P_SENDING_hears_ABORT) X(P_SENDING_hears_TOOK_OVER) \
    X(P_SENT_hears_RECEIVED) X(P_SENT_hears_ABORT) X(P_SENT_hears_TOOK_OVER) \
    X(P_RECEIVED_hears_LOADED) X(P_RECEIVED_hears_ABORT_LOAD) X(P_RECEIVED_hears_TOOK_OVER) \
    X(S_IDLE_hears_HELLO) X(S_IDLE_hears_PAGES) X(S_PAUSED_hears_OUTPUT) X(output_let_out_by_the_svm) X(S_IDLE_hears_REQUEST) X(S_IDLE_hears_ABORT) \
    X(S_PAUSED_hears_SEND) X(S_PAUSED_hears_PAGES) X(S_PAUSED_hears_SIZE) X(S_PAUSED_hears_ABORT)
c_decl {
#define X(event) event,
    enum { EVENTS n_events };
#undef X
    extern unsigned long happened[];
}
c_code {
    unsigned long happened[n_events];
    static void print_events(void) {
#define X(event) printf("event %s %lu\n", #event, happened[event]);
        EVENTS
#undef X
    }
    __attribute__((constructor)) static void at_end(void) { atexit(print_events); }
}
#define HAPPENED(event) c_code { happened[event]++; }

/* The names make pan's message say which promise is broken.  Never set, but -DONLY=n looks for breaks of promise n alone. */
#ifndef ONLY
#define ONLY 0
#endif
#define IGNORED(n) (ONLY != 0 && ONLY != n)
hidden byte promise_1_a_state_to_take_over_from = IGNORED(1), promise_2_no_output_of_what_can_be_lost = IGNORED(2),
            promise_3_one_machine_the_world_sees = IGNORED(3), promise_4_memory_is_the_epoch = IGNORED(4),
            promise_5_no_dead_end = IGNORED(5), promise_6_no_output_is_missing = IGNORED(6);
#define PROMISE(name, condition) assert(name || (condition))

mtype:message = { HELLO, READY, PAGES, REQUEST, REPLY, SEND, SIZE, RECEIVED, LOADED, ABORT, ABORT_LOAD, TOOK_OVER };
chan to_s = [CAPACITY] of { mtype:message, byte, byte };   /* message, epoch, version of the page (PAGES; 0: other pages) */
chan to_p = [CAPACITY] of { mtype:message, byte };         /* message, epoch */
hidden mtype:message msg;
hidden byte epoch, page;

/* ---- the connection: what was sent before it was lost may still be read, until its reader notices the loss ---- */
bool link = true;              /* false: lost; what is sent now goes nowhere */
bool p_seen = true, s_seen = true;   /* this side has not noticed a loss */
#define NOBODY_READS (!link || s == S_TOOK_OVER)   /* what is sent goes nowhere */
#define ROOM_S (NOBODY_READS || len(to_s) < CAPACITY)
#define ROOM_P (!link || len(to_p) < CAPACITY)
inline tell_s(m, e, v) { if :: !NOBODY_READS -> to_s!m, e, v :: else fi }
inline tell_p(m, e)    { if :: link -> to_p!m, e :: else fi }
inline forget_to_s() { do :: len(to_s) > 0 -> to_s?msg, epoch, page :: else -> break od }
inline forget_to_p() { do :: len(to_p) > 0 -> to_p?msg, epoch :: else -> break od }

/* ---- the PVM ---- */
mtype:primary = { P_IDLE, P_REQUESTED, P_SENDING, P_SENT, P_RECEIVED, P_LOST, P_HELLO, P_STOPPED, P_DEAD };
mtype:primary p = P_IDLE;
byte p_epoch = 1;              /* newest number used: an aborted one is not used again */
bool p_open = false;           /* p_epoch is neither acknowledged nor aborted */
byte p_unsure = 0;             /* sent whole when the connection was lost: sealed or not?  HELLO tells */
bool p_alone = false;          /* declared alone: output is not withheld */
byte memory = 1;               /* version of the page; 2N and 2N+1 are written in the interval that ends with epoch N */
bool p_log, unacked, pending;  /* is the page in the dirty log, in unacked, still to be sent? */
byte at_pause = 1;             /* version of the page when the PVM paused last */
/* it runs in P_REQUESTED and P_HELLO too: as if it had just before.  At RECEIVED it need not wait for the flush */
#define P_RUNS_FREELY (p == P_IDLE || p == P_LOST || p == P_RECEIVED)
#define INTERVAL (p_open -> p_epoch : p_epoch + 1)     /* what happens now is part of this epoch, or of a later one */

/* ---- the SVM: its process ---- */
mtype:secondary = { S_IDLE, S_PAUSED, S_COMPLETE, S_TOLD_TOO_EARLY, S_SEALED, S_FLUSHING, S_LOADING, S_DEAD, S_TOOK_OVER };
mtype:secondary s = S_IDLE;
bool s_live = true;            /* there is a VM that runs or can run */
byte s_open = 0;               /* the epoch that arrives */
byte s_done = 1;               /* newest number sealed or aborted: what comes of it or of older ones is dropped */
/* P→S OUTPUT(N), the rest of what the PVM sent before it stood, leaves right after SEND: here they are one message. */
#ifdef MUTANT_OUTPUT_STAYS_BEHIND
#define WITH_OUTPUT 0
#else
#define WITH_OUTPUT 1
#endif
bool s_came = false, s_output = true;    /* the output of the open, of the sealed epoch is here; dies with the process */
bool s_output_died;            /* ... as it did, and no epoch was sealed since */
byte s_hold = 0;               /* page on its way into the cache */
bool s_log;                    /* the SVM's dirty log: dies with its process */
bool s_granted;                /* the arbiter said yes; takes over as soon as nothing is half done */
#define S_SEALING (s == S_SEALED || s == S_FLUSHING || s == S_LOADING)
#ifdef MUTANT_ASKED_WITHOUT_A_STATE
#define S_HAS_A_STATE true
#else
#define S_HAS_A_STATE s_live   /* looked at before the arbiter is asked: its yes to the SVM is its no to the PVM */
#endif
/* ---- the SVM: shared memory, dies with its host only ---- */
byte cache = 1, guest = 1;
bool pvm_bit, svm_bit, flush_set;
byte sealed = 1, committed = 1, receiving = 1;

/* ---- the arbiter: truthful means it never says yes to both, and knows which epoch the asking SVM has sealed ---- */
#ifdef MUTANT_TAKEOVER_WITHOUT_ASKING
#define ARBITER_GAVE_TO_S false
#else
#define ARBITER_GAVE_TO_S s_granted
#endif
byte alone_since = 0;          /* newest number the PVM had used when it was declared alone; 0: it never was */
#ifdef MUTANT_ARBITER_WAITS_FOR_THE_PRIMARY_TO_SAY_IN_STEP
#define MUST_NOT_TAKE_OVER (alone_since != 0)
#else
#define MUST_NOT_TAKE_OVER (sealed <= alone_since)
#endif

/* ---- what nobody in the model may read: what the world saw and what is right ---- */
byte released = 1;             /* newest interval of which output left */
byte right = 1;                /* version of the page in the sealed epoch */
bool calm = true;              /* a failure now would be the first since the pair was in step */
byte n_failures = 0, n_aborts = 0;

inline release(n) {
    if :: s == S_TOOK_OVER && n <= sealed -> HAPPENED(output_of_the_epoch_taken_over_released_late) :: else fi;
    if :: n > released -> released = n :: else fi;
    PROMISE(promise_3_one_machine_the_world_sees, s != S_TOOK_OVER || n <= sealed)
}
inline all_is_well() { calm = (n_failures < MAX_FAILURES) }
inline count_abort() { if :: MAX_ABORTS < MAX_EPOCH -> n_aborts++ :: else fi }
inline failure() {
    calm = false; n_failures++;
    if :: n_failures > 1 -> HAPPENED(second_failure_after_a_commit) :: else fi
}
#define MAY_ABORT (MAX_ABORTS >= MAX_EPOCH || n_aborts < MAX_ABORTS)
#define MAY_FAIL (calm && s != S_TOOK_OVER && p != P_DEAD && p != P_STOPPED)

/* ================================================= the PVM ================================================= */

/* "After an abort or a reconnection it sends unacked ∪ its log." */
inline p_gives_up_epoch() {
    p_open = false;
#ifdef MUTANT_ABORTED_NUMBER_USED_AGAIN
    p_epoch--;
#endif
#ifdef MUTANT_UNACKED_DROPPED_AT_ABORT
    unacked = false;
#endif
    pending = pending || unacked
}
/* "Whatever is taken from the dirty log goes into unacked before its page is read" */
inline p_takes_log() { unacked = unacked || p_log; pending = pending || p_log; p_log = false }
/* RECEIVED(n), or HELLO says that n is sealed: "unacked is cleared only by" these; withheld output leaves. */
inline p_acknowledged(n) {        /* n is not a variable that changes in here */
    unacked = false; p_open = false; p_unsure = 0;
#ifdef MUTANT_ARBITER_WAITS_FOR_THE_PRIMARY_TO_SAY_IN_STEP
    alone_since = 0;
#endif
    release(n)
}

active proctype primary() {
end:do
    /* the guest runs; write-protect first, then read: a write after the log was taken is in the log again */
    :: d_step { P_RUNS_FREELY && !p_log && INTERVAL <= MAX_EPOCH && memory != 2 * INTERVAL + 1 ->
        memory = (memory < 2 * INTERVAL -> 2 * INTERVAL : 2 * INTERVAL + 1);
        p_log = true }
    /* "A PVM without its SVM keeps withheld output until the arbiter or the operator declares it alone" */
    :: d_step { P_RUNS_FREELY && p_alone && released < INTERVAL ->
        HAPPENED(output_while_alone); epoch = INTERVAL; release(epoch) }

    /* P→S PAGES(N) in the background, both machines running, any number of times */
    :: d_step { (p == P_IDLE || (p == P_LOST
#ifndef MUTANT_LOG_TAKEN_WHILE_UNSURE
            && p_unsure == 0        /* else HELLO, if it says "sealed", clears from unacked what is not in that epoch */
#endif
            )) && p_log -> p_takes_log() }
    :: d_step { p == P_IDLE && ROOM_S && pending && (p_open || p_epoch < MAX_EPOCH) ->
        if :: !p_open -> p_epoch++; p_open = true :: else fi;
        tell_s(PAGES, p_epoch, memory); pending = false }
    :: d_step { p == P_IDLE && ROOM_S && !p_open && p_epoch < MAX_EPOCH ->      /* other pages */
        p_epoch++; p_open = true; tell_s(PAGES, p_epoch, 0) }

    /* P→S CHECKPOINT_REQUEST(N) */
    :: d_step { p == P_IDLE && ROOM_S && (p_open || p_epoch < MAX_EPOCH) ->
        if :: !p_open -> p_epoch++; p_open = true :: else fi;
        tell_s(REQUEST, p_epoch, 0); p = P_REQUESTED }
    /* remaining PAGES(N), then VMSTATE_SIZE(N): the device state went with SEND, and here with nothing.  Now the SVM may seal N, and from then on could take
     * over from N: so what comes after N is withheld again, whatever the PVM was declared before. */
    :: d_step { p == P_SENDING && ROOM_S && pending -> tell_s(PAGES, p_epoch, memory); pending = false }
    :: d_step { p == P_SENDING && ROOM_S && !pending ->
        tell_s(SIZE, p_epoch, 0); p = P_SENT;
#ifndef MUTANT_ALONE_UNTIL_RECEIVED
        p_alone = false
#endif
        }
    /* ABORT from the PVM: its checkpoint failed, or RECEIVED did not come in time.  Then it may cross with the seal; what
     * comes of an epoch that is given up is dropped, RECEIVED included: its output goes out with the next one. */
    :: d_step { p_open && p_seen && (p == P_IDLE || p == P_REQUESTED || p == P_SENDING || p == P_SENT) && ROOM_S && MAY_ABORT ->
        HAPPENED(abort_by_primary); count_abort();
        tell_s(ABORT, p_epoch, 0); p_gives_up_epoch(); p = P_IDLE }

    /* the SVM's messages */
#ifdef MUTANT_ABORTED_NUMBER_USED_AGAIN
    :: d_step { p_seen && len(to_p) > 0 && ROOM_S ->    /* an answer to the first use of the number may find no room for SEND */
#else
    :: d_step { p_seen && len(to_p) > 0 ->
#endif
        to_p?msg, epoch;
        if :: msg == HELLO -> HAPPENED(P_HELLO_hears_HELLO) :: else fi;
        if
        /* reconnection: "go on from the last epoch sealed on both sides" */
        :: msg == HELLO && epoch == 0 ->                    /* a new secondary: all of RAM is sent */
            unacked = true; pending = true; p_log = false; p_unsure = 0
        :: msg == HELLO && epoch > 0 && p_unsure != 0 && (epoch >= p_unsure
#ifdef MUTANT_HELLO_NOT_COMPARED
            || true
#endif
            ) -> HAPPENED(received_lost_after_seal); epoch = p_unsure; p_acknowledged(epoch)
        :: msg == HELLO && epoch > 0 && p_unsure != 0 && epoch < p_unsure ->
            HAPPENED(epoch_unsealed_at_reconnection); p_unsure = 0; p_gives_up_epoch()
        :: msg == HELLO && epoch > 0 && p_unsure == 0 -> pending = pending || unacked
        :: msg == READY -> HAPPENED(P_HELLO_hears_READY); p = P_IDLE;
            /* the pair is in step: S could take over from what the PVM knows it has */
            if :: link && s_live && sealed == committed && !MUST_NOT_TAKE_OVER -> all_is_well() :: else fi
        /* S→P CHECKPOINT_REPLY(N): the PVM pauses; the rest of its log; VMSTATE_SEND(N) */
        :: msg == REPLY && p_open && epoch == p_epoch && p == P_REQUESTED ->
            HAPPENED(P_REQUESTED_hears_REPLY);
            at_pause = memory; p_takes_log(); tell_s(SEND, p_epoch, WITH_OUTPUT); p = P_SENDING;
#ifdef MUTANT_UNACKED_CLEARED_AT_SEND
            unacked = false
#endif
        /* S→P VMSTATE_RECEIVED(N): P may release withheld output */
        :: msg == RECEIVED && p_open && epoch == p_epoch && p == P_SENT ->
            HAPPENED(P_SENT_hears_RECEIVED); p_acknowledged(epoch); p = P_RECEIVED
#ifdef MUTANT_LATE_RECEIVED_BELIEVED
        :: msg == RECEIVED && p != P_SENT -> unacked = false; release(epoch)
#endif
        :: msg == LOADED && p == P_RECEIVED && epoch == p_epoch -> HAPPENED(P_RECEIVED_hears_LOADED); p = P_IDLE
        :: msg == ABORT && p_open && epoch == p_epoch ->
            if :: p == P_IDLE -> HAPPENED(P_IDLE_hears_ABORT) :: p == P_REQUESTED -> HAPPENED(P_REQUESTED_hears_ABORT)
               :: p == P_SENDING -> HAPPENED(P_SENDING_hears_ABORT) :: p == P_SENT -> HAPPENED(P_SENT_hears_ABORT)
               :: else
            fi;
            p_gives_up_epoch(); p = P_IDLE; at_pause = 0
        /* ABORT(N, "load"): the secondary is lost, not the epoch; the connection ends, the PVM carries on */
        :: msg == ABORT_LOAD ->
            if :: p == P_RECEIVED -> HAPPENED(P_RECEIVED_hears_ABORT_LOAD) :: else fi;   /* else it is dropped, as below */
            link = false
        /* the SVM is the machine the world sees now, and says so before it runs: this one stands still */
        :: msg == TOOK_OVER ->
            HAPPENED(told_of_the_takeover);
            if :: p == P_HELLO -> HAPPENED(P_HELLO_hears_TOOK_OVER) :: p == P_IDLE -> HAPPENED(P_IDLE_hears_TOOK_OVER)
               :: p == P_REQUESTED -> HAPPENED(P_REQUESTED_hears_TOOK_OVER)
               :: p == P_SENDING -> HAPPENED(P_SENDING_hears_TOOK_OVER)
               :: p == P_SENT -> HAPPENED(P_SENT_hears_TOOK_OVER)
               :: p == P_RECEIVED -> HAPPENED(P_RECEIVED_hears_TOOK_OVER)
               :: else
            fi;
            p = P_STOPPED
        :: else         /* of an epoch that is given up */
        fi }

    /* the loss is noticed: the PVM runs on, its output withheld.  If N was sent whole, it can't know whether it was sealed. */
    :: d_step { !link && p_seen && p != P_DEAD && p != P_STOPPED ->
        p_seen = false; forget_to_p();
        if :: p == P_SENT -> p_unsure = p_epoch; p_open = false
           :: else -> if :: p_open -> p_gives_up_epoch() :: else fi
        fi;
        p = P_LOST }
    /* declared alone; refused if the SVM took over, and then this machine stops */
    :: d_step { p == P_LOST && !p_alone && !ARBITER_GAVE_TO_S ->
        HAPPENED(declared_alone); p_alone = true;
#ifdef MUTANT_ALONE_SINCE_ACKED
        alone_since = released     /* the newest epoch the PVM knows to be sealed */
#else
        alone_since = p_epoch      /* an epoch in flight counts: the SVM may have sealed it, and the PVM has run on since */
#endif
        }
    :: d_step { p == P_LOST && ARBITER_GAVE_TO_S -> HAPPENED(alone_refused_after_takeover); p = P_STOPPED }
    od
}

/* ================================================= the SVM ================================================= */

/* "Abort clears nothing: PVM bits, SVM bits and cache contents stay"; its number is not used again; the VM runs on. */
inline s_gives_up_epoch(n) {
    if :: n > s_done -> s_done = n :: else fi;
#ifdef MUTANT_SVM_BITS_CLEARED_AT_ABORT
    svm_bit = false;
#endif
    s_open = 0; s_came = false; s = S_IDLE; at_pause = 0
}
inline s_takes_over() {
    PROMISE(promise_1_a_state_to_take_over_from, s_live && sealed == committed);
    PROMISE(promise_4_memory_is_the_epoch, guest == right || guest == OWN);
    PROMISE(promise_2_no_output_of_what_can_be_lost, released <= sealed);
    PROMISE(promise_3_one_machine_the_world_sees, p == P_DEAD || !p_alone);
    /* what the PVM did not let out of the epoch that this goes on from, the SVM lets out first */
    PROMISE(promise_6_no_output_is_missing, released >= sealed || s_output || s_output_died);
    if :: released < sealed && s_output -> HAPPENED(output_let_out_by_the_svm) :: else fi;
    if :: p != P_DEAD -> HAPPENED(takeover_while_the_primary_lives) :: else fi;
#ifndef MUTANT_TAKEOVER_NOT_TOLD
    if :: link && s_seen && len(to_p) < CAPACITY -> to_p!TOOK_OVER, 0      /* said before it runs, and never waited for: */
       :: link && s_seen && len(to_p) >= CAPACITY -> link = false          /* who can't be told finds a broken connection */
       :: else
    fi;
#endif
    if :: alone_since != 0 -> HAPPENED(takeover_after_having_been_declared_lost_and_in_step_again) :: else fi;
    s = S_TOOK_OVER; cache = 0; guest = 0
}

active proctype secondary() {
end:do
    /* the SVM runs its own branch */
    :: d_step { s == S_IDLE && s_live && s_open == 0 && guest != OWN -> guest = OWN; s_log = true }

    :: d_step { s_seen && s_hold == 0 && (s == S_IDLE || s == S_PAUSED) && len(to_s) > 0 && ROOM_P ->
        to_s?msg, epoch, page;
        if
        :: msg == HELLO -> HAPPENED(S_IDLE_hears_HELLO); tell_p(READY, 0)
        :: msg != HELLO && epoch <= s_done ->       /* of an epoch that is over: dropped, no error (PVM's ABORT included) */
            if :: msg == ABORT && epoch == sealed -> HAPPENED(abort_crosses_seal) :: else fi
        /* `receiving` "is stored before the first byte of that epoch and never lowered"; half a page may be there */
        :: msg == PAGES && epoch > s_done ->
            if :: s == S_IDLE -> HAPPENED(S_IDLE_hears_PAGES) :: else -> HAPPENED(S_PAUSED_hears_PAGES) fi;
            s_open = epoch;
#ifndef MUTANT_RECEIVING_AFTER_FIRST_BYTE
            receiving = epoch;
#endif
            if :: page != 0 -> s_hold = page; cache = TORN :: else -> receiving = epoch fi
        :: msg == REQUEST && epoch > s_done ->
            HAPPENED(S_IDLE_hears_REQUEST); s_open = epoch; s = S_PAUSED; tell_p(REPLY, epoch)
        :: msg == SEND && epoch > s_done -> HAPPENED(S_PAUSED_hears_SEND);
            if :: page == 1 -> HAPPENED(S_PAUSED_hears_OUTPUT); s_came = true :: else fi
        /* VMSTATE_SIZE, after the device state: count checked, "S: sync dirty log" */
        :: msg == SIZE && epoch > s_done ->
            PROMISE(promise_5_no_dead_end, s == S_PAUSED && epoch == s_open);
            HAPPENED(S_PAUSED_hears_SIZE);
            svm_bit = svm_bit || s_log; s_log = false; s = S_COMPLETE
        :: msg == ABORT && epoch > s_done ->
            if :: s == S_IDLE -> HAPPENED(S_IDLE_hears_ABORT) :: else -> HAPPENED(S_PAUSED_hears_ABORT) fi;
            s_gives_up_epoch(epoch)
        :: else
        fi }
    :: d_step { s_hold != 0 -> cache = s_hold; pvm_bit = true; receiving = s_open; s_hold = 0 }    /* bytes, then the bit */

    /* ABORT from the SVM before seal: bad packet, wrong count, veto of the device state, time limit */
    :: d_step { s_open != 0 && s_hold == 0 && (s == S_IDLE || s == S_PAUSED || s == S_COMPLETE) && ROOM_P && MAY_ABORT ->
        HAPPENED(abort_by_secondary); count_abort(); tell_p(ABORT, s_open); s_gives_up_epoch(s_open) }

#ifdef MUTANT_RECEIVED_BEFORE_SEAL
    :: d_step { s == S_COMPLETE && ROOM_P -> tell_p(RECEIVED, s_open); s = S_TOLD_TOO_EARLY }
#endif
    /* seal: flush set := PVM ∪ SVM, then the commit word; then both bitmaps are cleared and S→P VMSTATE_RECEIVED(N) */
    :: d_step {
#ifdef MUTANT_RECEIVED_BEFORE_SEAL
        s == S_TOLD_TOO_EARLY ->
#else
        s == S_COMPLETE ->
#endif
        flush_set = pvm_bit || svm_bit; sealed = s_open; right = at_pause; at_pause = 0; s_done = s_open;
        s_open = 0; s_output = s_came; s_came = false; s_output_died = false;
        s = S_SEALED }
    :: d_step { s == S_SEALED && ROOM_P ->
        pvm_bit = false; svm_bit = false;
#ifndef MUTANT_RECEIVED_BEFORE_SEAL
        tell_p(RECEIVED, sealed);
#endif
        if :: flush_set -> guest = TORN :: else fi;     /* the flush begins */
        s = S_FLUSHING }
    /* flush, committed; load device state, resume, S→P VMSTATE_LOADED(N) */
    :: d_step { s == S_FLUSHING ->
        if :: flush_set -> guest = cache :: else fi;
        PROMISE(promise_4_memory_is_the_epoch, guest == right);
        if :: link -> all_is_well();                    /* the pair has committed an epoch again */
            if :: !s_live && committed > 0 -> HAPPENED(made_whole_after_it_could_not_restart)
               :: !s_live && committed == 0 -> HAPPENED(initial_copy_after_host_death)
               :: else fi;
            if :: alone_since != 0 -> HAPPENED(in_step_after_alone) :: else fi
           :: else
        fi;
        committed = sealed; s = S_LOADING }
    :: d_step { s == S_LOADING && ROOM_P ->
        s_live = true; s = S_IDLE;
        if :: !s_granted -> tell_p(LOADED, committed) :: else fi }     /* it takes over: another word than LOADED comes */
    /* "that VM is never resumed half loaded; ABORT(N, "load") tells the PVM ...; memory and device state N stay for a fresh VM" */
    :: d_step { s == S_LOADING && ROOM_P && MAY_FAIL ->
        HAPPENED(load_failed); failure(); tell_p(ABORT_LOAD, committed);
        link = false; s_seen = false; s_live = false; forget_to_s(); s = S_DEAD }

    /* the loss is noticed: an epoch that is not sealed is aborted, "the SVM can take over live"; a sealed one is finished */
    :: d_step { !link && s_seen && s != S_DEAD && s != S_TOOK_OVER ->
        s_seen = false; forget_to_s(); s_hold = 0;       /* half a page may stay in the cache: it is in unacked */
        if :: S_SEALING -> HAPPENED(sealed_epoch_finished_alone) :: else -> s_gives_up_epoch(s_open) fi }
    /* "takes over only if its arbiter says so"; asked for while an epoch is sealed and not loaded, it waits for that */
    :: d_step { (!s_seen && !s_granted && s != S_TOOK_OVER && ((s == S_IDLE && S_HAS_A_STATE) || S_SEALING)
#ifndef MUTANT_DECLARED_LOST_NOT_REFUSED
#ifndef MUTANT_TAKEOVER_WITHOUT_ASKING
            && !MUST_NOT_TAKE_OVER
#endif
#endif
        ) -> s_granted = true;
        if :: S_SEALING -> HAPPENED(takeover_asked_for_while_sealing) :: else fi }
    :: d_step { s_granted && s == S_IDLE -> HAPPENED(takeover_live); s_takes_over() }
    /* the operator's word that the primary is dead, on a connection that stands: it may be wrong, and the primary lives */
    :: d_step { (s_seen && link && !s_granted && s_live && s_hold == 0 && p != P_DEAD && p != P_STOPPED
            && !MUST_NOT_TAKE_OVER && (s == S_IDLE || s == S_PAUSED || s == S_COMPLETE || S_SEALING)) ->
        HAPPENED(operator_takes_over_from_a_primary_that_lives); s_granted = true;
        if :: s == S_PAUSED || s == S_COMPLETE -> s_gives_up_epoch(s_open) :: else fi;
        if :: s == S_IDLE -> s_takes_over() :: else fi }        /* else when the sealed epoch is finished */
#ifdef MUTANT_TAKEOVER_WHILE_FLUSHING
    :: d_step { s_granted && S_SEALING -> s_takes_over() }
#endif

    /* a fresh process attaches: the promise when the SVM's process is killed */
    :: d_step { s == S_DEAD ->
        s = S_IDLE; s_open = 0; s_hold = 0; s_log = false;
        s_done = (receiving > sealed -> receiving : sealed);
        if
        :: sealed == 0 -> svm_bit = true                    /* "attach starts the initial copy again" */
        :: sealed > committed -> HAPPENED(attach_replayed);  /* from cache + flush set + device state: exactly epoch N */
            if :: flush_set -> guest = cache :: else fi;
            PROMISE(promise_4_memory_is_the_epoch, guest == right);
            committed = sealed; s_live = true
        :: sealed > 0 && sealed == committed && (receiving <= sealed
#ifdef MUTANT_RESTART_ALWAYS
            || true
#endif
            ) -> HAPPENED(attach_restarted);            /* no byte of N+1 in the cache: the whole cache is copied */
            guest = cache;
            PROMISE(promise_4_memory_is_the_epoch, guest == right);
            s_live = true
        :: else -> HAPPENED(attach_cannot_restart);         /* "the SVM bitmap counts as all ones" */
#ifndef MUTANT_LOST_LOG_COUNTS_AS_CLEAN
            svm_bit = true;
#endif
            guest = TORN                                    /* nobody looks at it before the next flush */
        fi }
    od
}

/* ================================ deaths, the connection, and how it ends ================================ */

active proctype failures() {
    do
    :: d_step { MAY_FAIL && link -> link = false; failure() }                       /* the connection, both alive */
    :: d_step { MAY_FAIL ->                                                         /* the PVM, or its host */
        PROMISE(promise_1_a_state_to_take_over_from, (s == S_IDLE && s_live) || s == S_PAUSED || s == S_COMPLETE || s == S_TOLD_TOO_EARLY || S_SEALING);
        p = P_DEAD; p_seen = false; link = false; forget_to_p();
        memory = 0; p_log = false; unacked = false; pending = false; p_open = false; p_unsure = 0; failure() }
    :: d_step { MAY_FAIL ->                                                         /* the SVM's process */
        s = S_DEAD; s_live = false; s_seen = false; link = false; forget_to_s(); s_log = false;
        s_came = false; s_output = false; s_output_died = true;
        s_granted = false;                                                          /* the operator's word dies with it */
        failure() }
    :: d_step { MAY_FAIL ->                                                         /* the SVM's host: memory is gone */
        s = S_DEAD; s_live = false; s_seen = false; link = false; forget_to_s(); s_log = false; s_granted = false; failure();
        s_came = false; s_output = false; s_output_died = true;
        cache = TORN; guest = TORN; pvm_bit = false; svm_bit = false; flush_set = false;
        sealed = 0; committed = 0; receiving = 0 }
    /* within reconnect_limit both are there again: HELLO both ways.  An SVM that took over does not listen any more. */
    :: d_step { !link && p == P_LOST && !s_seen && s == S_IDLE && !s_granted ->
        HAPPENED(reconnected);
        if :: MUST_NOT_TAKE_OVER -> HAPPENED(takeover_refused_to_a_declared_lost_secondary) :: else fi;
        link = true; p_seen = true; s_seen = true; p = P_HELLO; to_s!HELLO, 0, 0; to_p!HELLO, sealed }
    /* nothing can move any more: somebody serves the world, and nobody waits */
    :: timeout -> HAPPENED(nothing_moves_any_more);
        PROMISE(promise_1_a_state_to_take_over_from, p != P_DEAD || s == S_TOOK_OVER);
        PROMISE(promise_5_no_dead_end, (s == S_TOOK_OVER && (p == P_DEAD || p == P_STOPPED)) || (p == P_IDLE && s == S_IDLE && link && !p_open && p_epoch == MAX_EPOCH));
        break
    od
}
