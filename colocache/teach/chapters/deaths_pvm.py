# SPDX-License-Identifier: Apache-2.0
"""The primary dies after it was told RECEIVED."""

from colocache.teach.play import Play, chapter


@chapter(
    "death-pvm",
    "The PVM dies after the seal",
    kind="death",
    question="What if the PVM dies while the SVM flushes?",
    answer="The epoch is sealed and its output may be out, so the SVM finishes the flush first and takes over "
    "from that epoch.",
)
def death_pvm(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("sync")
        pair.on_svm("device_state", 2)
        pair.seal(2)
        pair.received()
        play.step(
            pair,
            "Sealed, RECEIVED said",
            "The PVM was told that epoch 2 is safe and released the output it had withheld. "
            "The SVM has not copied anything yet.",
            actor="svm",
            call="cache.seal(2)",
            message="VMSTATE_RECEIVED(2)",
        )
        pair.pvm.alive = False
        answer = pair.on_svm("failover")
        play.step(
            pair,
            "The PVM dies, and the SVM asks: may I?",
            f'The engine answers: "{answer["sentence"]}". '
            "Taking over now, from the SVM's own old state, would contradict what the world has already seen.",
            actor="pvm",
            call="cache.failover()",
        )
        pair.on_svm("flush")
        play.step(
            pair,
            "The flush is finished first",
            "All it needs is on this host: cache, flush set and device state. "
            "Guest RAM becomes exactly epoch 2, though the machine it came from is dead.",
            actor="svm",
            call="cache.flush()",
            target=2,
        )
        pair.on_svm("loaded")
        play.step(
            pair,
            "Now it takes over",
            "loaded() answers: take over now. The SVM runs on from the very state whose output the world has seen.",
            actor="svm",
            call="cache.loaded()",
            target=2,
        )
