# SPDX-License-Identifier: Apache-2.0
"""The secondary's process killed at each point of an epoch, for real, and what its successor finds."""

from colocache.teach.pair import Pair
from colocache.teach.play import Play, chapter


def kill(pair: Pair) -> None:
    """SIGKILL the secondary at the point where it stands."""
    assert pair.victim is not None  # noqa: S101 these chapters ask for one
    pair.victim.die()
    pair.svm_alive = False


def up_to_seal(pair: Pair) -> None:
    """Drift, a checkpoint that arrives whole, its log and device state: all but the seal."""
    shape = pair.shape
    pair.pvm_writes(shape.pvm)
    pair.svm_writes(shape.svm)
    pair.pvm_pauses(2)
    pair.deliver(2)
    pair.on_svm("sync")
    pair.on_svm("device_state", 2)


@chapter(
    "death-receiving",
    "Killed while pages arrive",
    kind="death",
    question="What if the secondary dies while an epoch arrives?",
    answer="Its registers are gone and the cache is no epoch any more: nothing to restart from, but the next "
    "checkpoint makes it whole without sending all of RAM.",
)
def death_receiving(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step(killable=True) as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm.sync()
        pair.deliver(2, len(shape.pvm) // 2)
        play.step(
            pair,
            "Epoch 2 is arriving",
            "Some of its pages are in the cache, which therefore is no longer exactly epoch 1. "
            "The SVM runs on its own memory, in a process of its own.",
            actor="wire",
            message="PAGES(2)",
        )
        kill(pair)
        play.step(
            pair,
            "SIGKILL",
            "The SVM's registers died with the process, so its guest RAM is of no use to anybody. "
            "The PVM notices and carries on alone; what it had sent is still in unacked.",
            actor="svm",
        )
        recovery = pair.attach()
        play.step(
            pair,
            "Attach: nothing to restart from",
            f'The engine reports: "{recovery.sentence}". '
            "The dead machine's dirty log is lost, so every page counts as written by the SVM: its bitmap is all "
            "ones.",
            actor="svm",
            call="Cache.attach(memory)",
        )
        pair.reconnect()
        pair.pvm_writes(shape.pvm_later)
        pair.pvm.sender.resend()
        pair.pvm_pauses(3)
        sent = pair.deliver(3)
        pair.on_svm("device_state", 3)
        pair.seal(3)
        play.step(
            pair,
            "The next checkpoint: little to send, all to flush",
            f"The PVM sends only what is unacked or new: {sent} pages of {shape.n_pages}. "
            "The cache, a full copy, has all the others; so the flush set may well be every page.",
            actor="wire",
            call="sender.resend(); cache.seal(3)",
            message="PAGES(3), VMSTATE_SIZE(3)",
        )
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "A whole secondary again",
            "Guest RAM is exactly epoch 3, with the registers of epoch 3. "
            "The successor's SVM runs, and the pair is protected once more.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            target=3,
        )


@chapter(
    "death-idle",
    "Killed between two checkpoints",
    kind="death",
    question="What if the secondary dies while nothing is arriving?",
    answer="The cache is still exactly the last epoch: the successor copies all of it and restarts from there.",
)
def death_idle(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step(killable=True) as pair:
        pair.svm_writes(shape.svm)
        play.step(
            pair,
            "The SVM has run on from epoch 1",
            "Its guest wrote pages of its own, and no page of epoch 2 has been sent yet. "
            "The cache, which nobody runs on, is still exactly epoch 1.",
            actor="svm",
        )
        kill(pair)
        play.step(
            pair,
            "SIGKILL",
            "The registers are lost, and with them any use of what the SVM had computed since. "
            "But cache and device state of epoch 1 are in shared memory.",
            actor="svm",
        )
        recovery = pair.attach()
        play.step(
            pair,
            "Attach: restart from epoch 1",
            f'The engine reports: "{recovery.sentence}". '
            "It does not trust the dead machine's dirty log, so it copies everything, and the VM restarts with "
            "the registers of epoch 1.",
            actor="svm",
            call="Cache.attach(memory)",
            target=1,
        )


@chapter(
    "death-sealed",
    "Killed between seal and flush",
    kind="death",
    question="What if the secondary dies right after the seal?",
    answer="The epoch is sealed, so it is finished: the successor replays the flush, and no page is missing.",
)
def death_sealed(play: Play) -> None:
    with play.pair_in_step(killable=True) as pair:
        up_to_seal(pair)
        pair.seal(2)
        pair.received()
        play.step(
            pair,
            "Sealed, and the PVM knows",
            "Epoch 2 is sealed and the PVM was told RECEIVED, so the world may already have seen its output. "
            "Guest RAM is still the old one: not one page has been copied.",
            actor="svm",
            call="cache.seal(2)",
            message="VMSTATE_RECEIVED(2)",
        )
        kill(pair)
        play.step(
            pair,
            "SIGKILL",
            "Cache, flush set and device state of epoch 2 are in shared memory, and the word that the seal stored "
            "names them. That is all that is needed.",
            actor="svm",
        )
        recovery = pair.attach()
        play.step(
            pair,
            "Attach: the flush is replayed",
            f'The engine reports: "{recovery.sentence}". '
            "The old state is not used any more: there is only one way, forward.",
            actor="svm",
            call="Cache.attach(memory)",
            target=2,
        )


@chapter(
    "death-mid-flush",
    "Killed in the middle of the flush",
    kind="death",
    question="What if the secondary dies half way through the flush?",
    answer="Guest RAM is half old and half new, but cache and flush set are whole: the successor copies again "
    "and gets exactly the epoch.",
)
def death_mid_flush(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step(killable=True) as pair:
        up_to_seal(pair)
        pair.seal(2)
        pair.received()
        play.step(
            pair,
            "The flush is about to begin",
            "Epoch 2 is sealed; the flush set holds the union. "
            "In this run the process is made to stand still when the copy reaches the middle of memory.",
            actor="svm",
            call="cache.seal(2)",
        )
        assert pair.victim is not None  # noqa: S101 asked for above
        chosen = [pfn for pfn, bit in enumerate(pair.svm_bits()["flush"]) if bit == "1"]
        pair.victim.stop_at("flush_until", chosen[len(chosen) // 2])
        play.step(
            pair,
            "In the middle of the copy",
            "Guest RAM is now half epoch 2 and half the SVM's own, and pages that were just being copied may be torn "
            "themselves: no machine was ever in this state, and nobody could run on it. "
            "This is not a drawing: the engine's flush stands still at this page.",
            actor="svm",
            call="cache.flush()",
            target=2,
        )
        pair.victim.kill()
        pair.svm_alive = False
        play.step(
            pair,
            "SIGKILL",
            "The memory stays as torn as it was. "
            "But nothing was taken from the cache or out of the flush set while copying: both still say all that "
            "is to be done.",
            actor="svm",
            target=2,
        )
        recovery = pair.attach()
        play.step(
            pair,
            "Attach: copied again, from the start",
            f'The engine reports: "{recovery.sentence}". '
            f"It copies all {len(chosen)} pages once more, and copying a page twice gives the same page.",
            actor="svm",
            call="Cache.attach(memory)",
            target=2,
        )
        pair.pvm_writes(shape.pvm_later)
        pair.svm_writes(shape.svm_later)
        pair.on_svm("sync")
        play.step(
            pair,
            "Life goes on",
            "The successor's SVM runs from epoch 2, and both drift towards epoch 3. "
            "Nobody who looks at the guest could tell that a process died.",
        )
