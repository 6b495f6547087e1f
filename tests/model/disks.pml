/* SPDX-License-Identifier: Apache-2.0 */
/*
 * disks.pml -- a disk that belongs to the epoch, for the model checker spin: conversation.pml has the rest of the pair.
 *
 * The disk is one block of which every version is known; blocks are treated alike, so one that could go missing or be of
 * another epoch could be this one.  The primary's guest writes it while it runs; each write goes through the pair's stream
 * and is unacked.  The secondary keeps it in the open log, and the seal makes that the sealed log, in one store.
 * tests/test_disks_model.py runs it and its mutants (one law of colocache/disks/README.md broken: -DMUTANT_...).
 * Epoch 1 is committed at the start; the first copy happens in here after the secondary's host has died.
 * Left out: the limit of the log and its reserve, the count of writes (a stream loses nothing but its end), the overlay of
 * the secondary's own guest, which dies with its process.
 */

#ifndef MAX_EPOCH
#define MAX_EPOCH 4            /* the newest epoch number */
#endif
#define MAX_VERSION 5          /* of the block */
#define MAX_FAILURES 2
#define CAPACITY 3             /* messages on their way in one direction */
#define TORN 255               /* a block that is being written, or was when somebody died */
#define NOTHING 0              /* of a log that has no write of the block */

/* Each of these must really happen in the search, or the search proves nothing: pan counts them while it runs. */
#define EVENTS \
    X(write_while_the_secondary_applies) X(write_before_the_acknowledgement) X(write_without_a_link) \
    X(epoch_aborted_with_writes) X(write_after_an_abort) \
    X(sealed_with_writes_of_an_aborted_epoch) X(sent_again) \
    X(received_lost_after_seal) X(epoch_unsealed_at_reconnection) X(first_copy) X(attach_applied) X(attach_applied_twice) \
    X(died_while_applying) X(takeover) X(open_log_lost)
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

/* The name makes pan's message say what is broken; never set. */
hidden byte promise_the_disk_is_of_the_epoch = 0;
#define DISK_IS_OF_THE_EPOCH assert(promise_the_disk_is_of_the_epoch || image == right)

mtype = { DISK, SIZE, ABORT, RECEIVED, HELLO };
chan to_s = [CAPACITY] of { mtype, byte };     /* message; version (DISK), epoch (SIZE, ABORT) */
chan to_p = [CAPACITY] of { mtype, byte };     /* message; epoch */
hidden mtype msg;
hidden byte value;
bool link = true, p_seen = true, s_seen = true;
#define ROOM_S (!link || len(to_s) < CAPACITY)
#define ROOM_P (!link || len(to_p) < CAPACITY)
inline tell_s(m, v) { if :: link -> to_s!m, v :: else fi }
inline tell_p(m, v) { if :: link -> to_p!m, v :: else fi }
inline forget_to_s() { do :: len(to_s) > 0 -> to_s?msg, value :: else -> break od }
inline forget_to_p() { do :: len(to_p) > 0 -> to_p?msg, value :: else -> break od }

/* ---- the primary ---- */
mtype:primary = { P_RUNS, P_STANDS, P_SENT, P_LOST, P_HELLO, P_DEAD };
mtype:primary p = P_RUNS;
byte p_epoch = 1;              /* newest number used */
byte disk = 1;                 /* version of the block, of which the guest was told that it is done */
bool unacked, flight;          /* the block is in no sealed epoch that we know of; it is in the one in flight */
bool heard;                    /* RECEIVED, and what it acknowledges is still to be forgotten */
bool again;                    /* unacked blocks are still to be sent on this connection */
byte p_unsure = 0;             /* the epoch in flight when the connection was lost */
byte at_stop[6] = 1;           /* version when the machine stood for epoch N: what its memory knows of the disk */
/* It runs again at RECEIVED; without a connection and while it meets another it runs too. */
#define GUEST_RUNS (p == P_RUNS || p == P_LOST || p == P_HELLO)

/* ---- the secondary: its process; its host's memory and disk ---- */
mtype:secondary = { S_IDLE, S_COMPLETE, S_SEALED, S_APPLYING, S_DEAD, S_TOOK_OVER };
mtype:secondary s = S_IDLE;
byte s_open;                   /* the epoch that is complete */
bool s_aborted;                /* an epoch was given up on this connection, and none sealed since */
byte log[2] = NOTHING;         /* two files */
bool slot;                     /* named by the record of the sealed epoch; the other is the open log */
byte image = 1;
byte sealed = 1, committed = 1;
byte right = 1;                /* ghost: version of the block in the sealed epoch */
byte n_failures = 0;
#define MAY_FAIL (n_failures < MAX_FAILURES && s != S_TOOK_OVER && p != P_DEAD)

inline give_up() { unacked = unacked || flight; flight = false }
/* "One of an epoch that is given up is the beginning of the next": the guest was told that these writes are done. */
inline s_gives_up() {
#ifdef MUTANT_ABORTED_WRITES_DROPPED
    log[1 - slot] = NOTHING;
#endif
    s_aborted = true
}

active proctype primary() {
end:do
    /* "The guest is told that a write is done when it is done on its own disk, and stands in the pair's stream and among the
     * unacked blocks."  Without a connection it is among the unacked blocks, and that is all. */
    :: d_step { GUEST_RUNS && ROOM_S && disk < MAX_VERSION ->
        disk++; unacked = true;
        if :: s == S_APPLYING -> HAPPENED(write_while_the_secondary_applies) :: else fi;
        if :: p == P_RUNS -> tell_s(DISK, disk) :: else -> HAPPENED(write_without_a_link) fi }
    /* the machine stands; what it wrote is in the stream; unacked becomes in flight, SIZE(N) leaves */
    :: d_step { p == P_RUNS && p_seen && !again && !heard && p_epoch < MAX_EPOCH -> p_epoch++; at_stop[p_epoch] = disk; p = P_STANDS }
    :: d_step { p == P_STANDS && ROOM_S ->
        flight = flight || unacked; unacked = false;
#ifdef MUTANT_FORGOTTEN_ONCE_SENT
        flight = false;
#endif
        tell_s(SIZE, p_epoch); p = P_SENT }
    /* it gives an epoch up, before or after SIZE: then that may cross with the seal, whose RECEIVED is not believed */
    :: d_step { (p == P_STANDS || p == P_SENT) && p_seen && ROOM_S ->
        if :: flight || unacked -> HAPPENED(epoch_aborted_with_writes) :: else fi;
        tell_s(ABORT, p_epoch); give_up(); p = P_RUNS }
    :: d_step { p_seen && !heard && len(to_p) > 0 ->
        to_p?msg, value;
        if
        :: msg == RECEIVED && p == P_SENT && value == p_epoch -> heard = true; p = P_RUNS    /* first it runs */
        :: msg == ABORT && p == P_SENT && value == p_epoch -> give_up(); p = P_RUNS
        :: msg == HELLO ->
            if :: p_unsure != 0 && value >= p_unsure -> HAPPENED(received_lost_after_seal); flight = false
               :: p_unsure != 0 && value < p_unsure -> HAPPENED(epoch_unsealed_at_reconnection); give_up()
               :: else -> give_up()
            fi;
            if :: value == 0 -> HAPPENED(first_copy); unacked = true :: else fi;      /* a fresh secondary: all of it */
            p_unsure = 0; again = unacked; p = P_RUNS
        :: else
        fi }
    :: d_step { heard ->
        if :: unacked -> HAPPENED(write_before_the_acknowledgement) :: else fi;
        flight = false; heard = false;
#ifdef MUTANT_WRITES_OF_THE_NEXT_EPOCH_ACKNOWLEDGED
        unacked = false
#endif
        }
    /* unacked blocks are read by us and sent again: what they have now, after whatever was mirrored meanwhile */
    :: d_step { again && p_seen && p == P_RUNS && ROOM_S -> HAPPENED(sent_again); tell_s(DISK, disk); again = false }
    :: d_step { !link && p_seen && !heard && p != P_DEAD ->
        p_seen = false; forget_to_p(); again = false;
        if :: p == P_SENT -> p_unsure = p_epoch :: else fi;
        if :: p != P_SENT -> give_up() :: else fi;
        p = P_LOST }
    od
}

/* what every attach does, committed or not: "twice is harmless" */
inline apply_again() {
    if :: committed == sealed -> HAPPENED(attach_applied_twice) :: else -> HAPPENED(attach_applied) fi;
    if
#ifdef MUTANT_APPLIED_AFTER_COMMITTED
    :: committed == sealed
#else
    :: false
#endif
    :: else -> if :: log[slot] != NOTHING -> image = log[slot] :: else fi
    fi;
#ifdef MUTANT_OPEN_LOG_APPLIED_TOO
    if :: log[1 - slot] != NOTHING -> image = log[1 - slot] :: else fi;
#endif
    committed = sealed
}

active proctype secondary() {
end:do
    :: d_step { s_seen && s == S_IDLE && len(to_s) > 0 ->
        to_s?msg, value;
        if
        :: msg == DISK && sealed == 0 -> image = value             /* no epoch that the image must stay */
        :: msg == DISK && sealed > 0 ->
            if :: s_aborted -> HAPPENED(write_after_an_abort) :: else fi;
            log[1 - slot] = value
        :: msg == SIZE && value > sealed ->
#ifdef MUTANT_APPLIED_BEFORE_THE_SEAL
            if :: log[1 - slot] != NOTHING -> image = log[1 - slot] :: else fi;
#endif
            s_open = value; s = S_COMPLETE
        :: msg == ABORT && value > sealed -> s_gives_up()
        :: else
        fi }
    /* a veto of the device state, a wrong count */
    :: d_step { s == S_COMPLETE && ROOM_P -> tell_p(ABORT, s_open); s_gives_up(); s = S_IDLE }
    /* one store: the open log is the sealed one, and memory of that epoch */
    :: d_step { s == S_COMPLETE ->
        if :: s_aborted && log[1 - slot] != NOTHING -> HAPPENED(sealed_with_writes_of_an_aborted_epoch) :: else fi;
        s_aborted = false;
        slot = 1 - slot; sealed = s_open; right = at_stop[s_open]; log[1 - slot] = NOTHING;
        s = S_SEALED }
    :: d_step { s == S_SEALED && ROOM_P ->
        tell_p(RECEIVED, sealed);
#ifdef MUTANT_APPLIED_AFTER_COMMITTED
        committed = sealed;
#endif
        if :: log[slot] != NOTHING -> image = TORN :: else fi;
        s = S_APPLYING }
    :: d_step { s == S_APPLYING ->
        if :: log[slot] != NOTHING -> image = log[slot] :: else fi;
        DISK_IS_OF_THE_EPOCH;
        committed = sealed; s = S_IDLE }
    :: d_step { !link && s_seen && (s == S_IDLE || s == S_COMPLETE) -> s_seen = false; forget_to_s(); s = S_IDLE }
    :: d_step { !s_seen && s == S_IDLE && sealed > 0 && p == P_DEAD ->
        HAPPENED(takeover); DISK_IS_OF_THE_EPOCH; s = S_TOOK_OVER }
    /* a fresh process of the same region */
    :: d_step { s == S_DEAD ->
        if :: log[1 - slot] != NOTHING -> HAPPENED(open_log_lost) :: else fi;
        if :: sealed > 0 -> apply_again(); DISK_IS_OF_THE_EPOCH :: else fi;
        log[1 - slot] = NOTHING; s_aborted = false; s = S_IDLE }
    od
}

active proctype failures() {
end:do
    :: d_step { MAY_FAIL && link -> link = false; n_failures++ }                    /* the connection, both alive */
    :: d_step { MAY_FAIL -> n_failures++;                                           /* the primary, or its host */
        forget_to_p(); p = P_DEAD; p_seen = false; link = false }
    :: d_step { MAY_FAIL && s != S_DEAD -> n_failures++;                            /* the secondary's process */
        if :: image == TORN && sealed > 0 -> HAPPENED(died_while_applying) :: else fi;
        forget_to_s(); s = S_DEAD; s_seen = false; link = false }
    :: d_step { MAY_FAIL && s != S_DEAD -> n_failures++;                            /* its host: a fresh one comes */
        s = S_DEAD; s_seen = false; link = false; forget_to_s();
        image = TORN; log[0] = NOTHING; log[1] = NOTHING; sealed = 0; committed = 0 }
    /* both are there again: what came for no sealed epoch comes again */
    :: d_step { !link && p == P_LOST && !s_seen && s == S_IDLE ->
        link = true; p_seen = true; s_seen = true; p = P_HELLO;
        log[1 - slot] = NOTHING; s_aborted = false;
        to_p!HELLO, sealed }
    od
}
