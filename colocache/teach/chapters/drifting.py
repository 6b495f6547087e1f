# SPDX-License-Identifier: Apache-2.0
"""Both machines run the same workload, and still their memories part."""

from colocache.teach.play import Play, chapter


@chapter(
    "drifting",
    "Drifting apart",
    question="Both run the same workload: why are their memories not the same?",
    answer="Interrupts and clocks fall differently, so each machine writes its own pages; each side logs only its own.",
)
def drifting(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        play.step(
            pair,
            "In step at epoch 1",
            "Memory is the same on both sides, and both machines run on. "
            "They see the same network packets, but interrupts and clocks reach them at different moments.",
            target=1,
        )
        pair.pvm_writes(shape.pvm)
        play.step(
            pair,
            "The PVM writes",
            "The PVM's guest wrote some pages, marked P2: on the way to epoch 2. "
            "Its hypervisor's dirty log knows which; nobody else does yet.",
            actor="pvm",
        )
        pair.svm_writes(shape.svm)
        play.step(
            pair,
            "The SVM writes other pages, and other bytes",
            "The SVM's guest wrote pages too, marked S2, some of them where the PVM wrote and some where it did not. "
            "Even where both wrote, the bytes differ: these are two different machines now.",
            actor="svm",
        )
        pair.pvm.sync()
        play.step(
            pair,
            "The PVM's log becomes unacked",
            "The PVM takes its dirty log into unacked: what must be sent, and must not be forgotten. "
            "The SVM's writes are in no list on this side; the PVM cannot know of them.",
            actor="pvm",
            call="sender.sync_dirty_log(log)",
        )
        pair.on_svm("sync")
        play.step(
            pair,
            "The SVM's log becomes the SVM bitmap",
            "The SVM's own dirty log goes into the SVM bitmap, on its own host. "
            "Two lists on two hosts: only together do they say where the two memories may differ.",
            actor="svm",
            call="cache.sync_dirty_log(log)",
        )
