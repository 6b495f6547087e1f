# SPDX-License-Identifier: Apache-2.0
"""A disk of the epoch, searched completely by the model checker spin: tests/model/disks.pml.

Each mutant breaks one law of colocache/disks/README.md, and spin must find a secondary whose disk is of another epoch
than its memory. tests/test_disks_laws.py tries the program's own halves against the same laws.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from spin_search import MODELS, mutants_of, needs_spin, search

MODEL = MODELS / "disks.pml"
BROKEN = "promise_the_disk_is_of_the_epoch"
pytestmark = needs_spin

MUTANTS = {
    # name of the test: mutant
    "a_log_applied_before_its_seal": "APPLIED_BEFORE_THE_SEAL",
    "a_log_applied_after_its_epoch_is_called_committed": "APPLIED_AFTER_COMMITTED",
    "writes_of_an_aborted_epoch_dropped": "ABORTED_WRITES_DROPPED",
    "the_open_log_applied_too": "OPEN_LOG_APPLIED_TOO",
    "blocks_forgotten_once_sent": "FORGOTTEN_ONCE_SENT",
    "blocks_of_the_next_epoch_forgotten_at_received": "WRITES_OF_THE_NEXT_EPOCH_ACKNOWLEDGED",
}


def test_disk_and_memory_are_of_one_epoch_in_every_order_of_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With two deaths or lost connections at any moments; and the search really saw every event of the model."""
    result = search(MODEL, tmp_path, optimise="-O2")
    with capsys.disabled():
        print(f"\nmodel of a disk: {result}")
    assert result.errors == 0, f"{result}: {result.broken}; see {tmp_path}/disks.pml.trail"
    assert result.complete
    assert len(result.events) > 10
    never = {event for event, times in result.events.items() if times == 0}
    assert not never, f"the search never saw {', '.join(sorted(never))}: it says nothing about them"


@pytest.mark.parametrize("name", MUTANTS)
def test_checker_finds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one law broken, spin finds a way to a disk that is of another epoch than memory."""
    mutant = MUTANTS[name]
    assert mutant in mutants_of(MODEL)
    result = search(MODEL, tmp_path, f"MUTANT_{mutant}", optimise="-O0")
    with capsys.disabled():
        print(f"\nmodel of a disk with {mutant}: {result}")
    assert result.broken == BROKEN


def test_every_mutant_of_the_model_is_tried() -> None:
    """A mutant that no test runs would be decoration."""
    assert mutants_of(MODEL) == set(MUTANTS.values())
