# SPDX-License-Identifier: Apache-2.0
"""The two states in which the secondary's machine stands: what each hears, word for word.

The model checker has one state for both (test_conversation_model.py), so it can't see what stands in the wrong one.
"""

from __future__ import annotations

from colocache.replication.conversation import State


def heard_in(state: State) -> set[str]:
    """MESSAGE of EPOCH; an ABORT with its kind."""
    return {
        f"{entry.message.name}{f' {entry.kind.name}' if entry.kind else ''} of {entry.of.name}"
        for entry in state.value.hears
    }


# Pages and output of the epoch may come before the device state (of a far primary, which wrote much before it heard
# that the secondary stands) and after it; a typed line or a disk's write may still be on its way.
IN_BOTH = {
    "PAGES of THIS", "OUTPUT of THIS", "INPUT of NONE", "DISK of NONE", "PING of ANY",
    "ABORT CHECKPOINT of THIS", "ABORT SESSION of ANY",
}  # fmt: skip


def test_before_the_device_state_is_here_only_it_may_end_the_wait() -> None:
    assert heard_in(State.PAUSED) == IN_BOTH | {"VMSTATE_SEND of THIS"}


def test_counts_of_what_the_epoch_took_in_come_after_the_device_state() -> None:
    """Saving the state is the last that the primary's machine does: input, disk writes and pages are counted then."""
    assert heard_in(State.COMPLETING) == IN_BOTH | {"INPUT of THIS", "DISKS of THIS", "VMSTATE_SIZE of THIS"}
