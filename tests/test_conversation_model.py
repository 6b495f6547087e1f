# SPDX-License-Identifier: Apache-2.0
"""The checkpoint conversation of primary and secondary, searched completely by the model checker spin.

The model (tests/model/conversation.pml) must keep every promise in every state it can reach, with one death or one lost
connection at any point until the pair is in step again.  Each mutant breaks one rule of the conversation, and spin must
find where that ends; if it does not, the model could not have noticed.  Every test prints its number of states.

To look at a counter-example: the commands stand at the top of the model; add the mutant's -D to `spin`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from spin_search import MODELS, mutants_of, needs_spin, search

from colocache.replication.conversation import Meaning, State
from colocache.replication.messages import AbortKind, MessageType

MODEL = MODELS / "conversation.pml"
pytestmark = needs_spin

# Complete searches, each with other bounds: no search can have many epochs, failures and aborts together.
BOUNDS = {
    "two failures, any aborts, 3 epochs": ("MAX_EPOCH=3", "MAX_FAILURES=2"),
    "one failure, one abort, 4 epochs": ("MAX_EPOCH=4", "MAX_FAILURES=1", "MAX_ABORTS=1"),
    "two failures, no abort, 4 epochs": ("MAX_EPOCH=4", "MAX_FAILURES=2", "MAX_ABORTS=0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bounds", BOUNDS)
def test_no_failure_breaks_a_promise_of_the_conversation(
    bounds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No reachable state breaks a promise, and the search really went through every event the model knows."""
    result = search(MODEL, tmp_path, *BOUNDS[bounds], optimise="-O2")
    with capsys.disabled():
        print(f"\nmodel of the conversation, {bounds}: {result}")
    assert result.errors == 0, f"{result}: {result.broken}; see {tmp_path}/conversation.pml.trail"
    assert result.complete, "the search stopped before its end: raise its limits or lower the bounds"
    assert len(result.events) > 20
    never = {event for event, times in result.events.items() if times == 0}
    if "no abort" in bounds:
        never -= {"abort_by_primary", "abort_by_secondary", "abort_crosses_seal"}
        never -= {event for event in never if event.endswith("_hears_ABORT")}
    if "one failure" in bounds:
        never -= {"second_failure_after_a_commit", "takeover_after_having_been_declared_lost_and_in_step_again"}
    assert not never, f"the search never saw {', '.join(sorted(never))}: it says nothing about them"


# ---- the model and the program hear the same ----

STATES = {  # of conversation.py: what they are in the model
    State.AT_THE_DOOR: "S_IDLE",
    State.READY: "S_IDLE",
    State.BETWEEN: "S_IDLE",
    State.PAUSED: "S_PAUSED",
    State.COMPLETING: "S_PAUSED",
    State.GREETING: "P_HELLO",
    State.ACCEPTED: "P_HELLO",
    State.AT_REST: "P_IDLE",
    State.REQUESTED: "P_REQUESTED",
    State.SENT: "P_SENT",
    State.SEALED: "P_RECEIVED",
}
MESSAGES = {
    (MessageType.HELLO, None): "HELLO",
    (MessageType.CHECKPOINT_READY, None): "READY",
    (MessageType.PAGES, None): "PAGES",
    (MessageType.OUTPUT, None): "OUTPUT",
    (MessageType.CHECKPOINT_REQUEST, None): "REQUEST",
    (MessageType.CHECKPOINT_REPLY, None): "REPLY",
    (MessageType.VMSTATE_SEND, None): "SEND",
    (MessageType.VMSTATE_SIZE, None): "SIZE",
    (MessageType.VMSTATE_RECEIVED, None): "RECEIVED",
    (MessageType.VMSTATE_LOADED, None): "LOADED",
    (MessageType.ABORT, AbortKind.CHECKPOINT): "ABORT",
    (MessageType.ABORT, AbortKind.LOAD): "ABORT_LOAD",
    (MessageType.ABORT, AbortKind.TOOK_OVER): "TOOK_OVER",
}
# What the model leaves out (its head says so): several streams, console input (test_outputs_typed.py), PING and PONG,
# checkpoints that the SVM asks for, and ends of a connection, which are a lost connection there.
LEFT_OUT_STATES = {State.STREAMS, State.ON_A_STREAM, State.TAKING_BACK}
LEFT_OUT_MEANINGS = {
    Meaning.ALIVE,
    Meaning.JOINS,
    Meaning.TYPED,
    Meaning.TAKEN_IN,
    Meaning.CHECKPOINT_WANTED,
    Meaning.SESSION_ENDS,
    Meaning.REFUSED,
    Meaning.ENDED,
    Meaning.DISK,  # it has no number and no state: disks.pml has its laws
    Meaning.DISKS,
}
LEFT_OUT = {"S_IDLE_hears_OUTPUT"}  # output that travels while the machines run
# What the model allows besides: a secondary that gives up an epoch before it was asked for it, which this program's
# never does, so that for its primary it is out of order; and a primary that hears while it sends, where ours reads when
# it has sent.
MODEL_ONLY = {"P_IDLE_hears_ABORT", "P_SENDING_hears_ABORT", "P_SENDING_hears_TOOK_OVER"}


def heard_in_the_program() -> set[str]:
    """What the table of conversation.py lets each side hear, in the model's words."""
    assert set(STATES) | LEFT_OUT_STATES == set(State), "a state that is neither in the model nor left out of it"
    return {
        f"{STATES[state]}_hears_{MESSAGES[entry.message, entry.kind]}"
        for state in STATES
        for entry in state.value.hears
        if entry.meaning not in LEFT_OUT_MEANINGS
    } - LEFT_OUT


def test_the_program_hears_what_the_model_hears(tmp_path: Path) -> None:
    """The table that both sides read, and what the search saw them hear, are the same."""
    result = search(MODEL, tmp_path, "MAX_EPOCH=3", "MAX_FAILURES=1", optimise="-O2")
    assert result.errors == 0
    heard = {event for event, times in result.events.items() if "_hears_" in event and times}
    assert heard - MODEL_ONLY == heard_in_the_program()
    assert heard >= MODEL_ONLY


STATE, OUTPUT, ONE, MEMORY, DEAD_END, MISSING = 1, 2, 3, 4, 5, 6  # the numbers of the promises in the model
PROMISES = {
    STATE: "promise_1_a_state_to_take_over_from",
    OUTPUT: "promise_2_no_output_of_what_can_be_lost",
    ONE: "promise_3_one_machine_the_world_sees",
    MEMORY: "promise_4_memory_is_the_epoch",
    DEAD_END: "promise_5_no_dead_end",
    MISSING: "promise_6_no_output_is_missing",
}
NO_ABORT = ("MAX_ABORTS=0",)
NO_FAILURE = ("MAX_EPOCH=4", "MAX_FAILURES=0", "MAX_ABORTS=2")
LONGER = ("MAX_EPOCH=4", "MAX_FAILURES=1", "MAX_ABORTS=1")
MUTANTS = {
    # name of the test: (mutant, promise it breaks, bounds that make the search short)
    "output_released_too_early": ("RECEIVED_BEFORE_SEAL", OUTPUT, NO_ABORT),
    "an_epoch_sealed_before_its_output_came": ("OUTPUT_STAYS_BEHIND", MISSING, NO_ABORT),
    "pages_forgotten_once_sent": ("UNACKED_CLEARED_AT_SEND", MEMORY, ()),
    "a_takeover_nobody_allowed": ("TAKEOVER_WITHOUT_ASKING", ONE, ()),
    "pages_forgotten_at_abort": ("UNACKED_DROPPED_AT_ABORT", MEMORY, ()),
    "hello_taken_for_received_output": ("HELLO_NOT_COMPARED", OUTPUT, NO_ABORT),
    "hello_taken_for_received_pages": ("HELLO_NOT_COMPARED", MEMORY, NO_ABORT),
    "late_received_believed_after_abort": ("LATE_RECEIVED_BELIEVED", MEMORY, NO_FAILURE),
    "pages_dirtied_while_the_fate_of_an_epoch_was_unknown_lost": ("LOG_TAKEN_WHILE_UNSURE", MEMORY, LONGER),
    "a_secondary_declared_lost_that_takes_over": ("DECLARED_LOST_NOT_REFUSED", OUTPUT, ()),
    "output_not_withheld_again_before_the_seal": ("ALONE_UNTIL_RECEIVED", OUTPUT, ()),
    "declared_alone_without_counting_the_epoch_in_flight": ("ALONE_SINCE_ACKED", OUTPUT, ()),
    "an_arbiter_asked_by_a_secondary_that_has_no_state": ("ASKED_WITHOUT_A_STATE", STATE, ()),
    "an_arbiter_that_refuses_a_secondary_in_step": ("ARBITER_WAITS_FOR_THE_PRIMARY_TO_SAY_IN_STEP", STATE, ()),
    "receiving_stored_too_late": ("RECEIVING_AFTER_FIRST_BYTE", MEMORY, ()),
    "a_restart_though_pages_had_come": ("RESTART_ALWAYS", MEMORY, ()),
    "a_lost_dirty_log_taken_for_clean": ("LOST_LOG_COUNTS_AS_CLEAN", MEMORY, NO_ABORT),
    "svm_bits_cleared_at_abort": ("SVM_BITS_CLEARED_AT_ABORT", MEMORY, ("MAX_FAILURES=0",)),
    "an_aborted_number_used_again": ("ABORTED_NUMBER_USED_AGAIN", DEAD_END, ("MAX_FAILURES=0", "MAX_ABORTS=1")),
    "a_takeover_in_the_middle_of_a_flush": ("TAKEOVER_WHILE_FLUSHING", MEMORY, ()),
    "a_takeover_that_the_primary_is_not_told_of": ("TAKEOVER_NOT_TOLD", DEAD_END, ("MAX_FAILURES=0", "MAX_ABORTS=0")),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_checker_finds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one rule of the conversation broken, spin finds a way to a state in which that promise is broken."""
    mutant, promise, bounds = MUTANTS[name]
    assert mutant in mutants_of(MODEL)
    # -O0: these searches are so short that the compiler would be the longer part
    result = search(MODEL, tmp_path, f"MUTANT_{mutant}", f"ONLY={promise}", *bounds, optimise="-O0")
    with capsys.disabled():
        print(f"\nmodel with {mutant}: {result}")
    assert result.broken == PROMISES[promise]


def test_every_mutant_of_the_model_is_tried() -> None:
    """A mutant that no test runs would be decoration."""
    assert mutants_of(MODEL) == {mutant for mutant, _, _ in MUTANTS.values()}
