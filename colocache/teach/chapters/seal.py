# SPDX-License-Identifier: Apache-2.0
"""The commit point."""

from colocache.teach.play import Play, chapter


@chapter(
    "seal",
    "Seal",
    question="What is a seal?",
    answer="One word, stored once: before it the epoch can be dropped, after it the epoch will be finished, "
    "whoever dies.",
)
def seal(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("sync")
        pair.on_svm("device_state", 2)
        play.step(
            pair,
            "Complete, but not yet decided",
            "Everything of epoch 2 has come, and the SVM's log is taken. "
            "If the PVM dies now, the SVM drops epoch 2 and takes over from its own memory; nothing has been "
            "promised to anybody.",
            actor="wire",
            message="VMSTATE_SIZE(2)",
        )
        pair.seal(2)
        play.step(
            pair,
            "The seal",
            "The flush set is fixed and written down; then one aligned word in shared memory changes: epoch 2 is "
            "sealed. "
            "Both bitmaps are cleared, since from here on they belong to epoch 3; guest RAM is still untouched.",
            actor="svm",
            call="cache.seal(2)",
        )
        play.step(
            pair,
            "From here on there is only forward",
            "Cache and flush set together say how to finish, and copying a page twice does no harm. "
            "So this process may die at any point now: the next one repeats the flush and comes to the same memory.",
        )
        pair.received()
        play.step(
            pair,
            "Only now: RECEIVED",
            "The PVM is told that epoch 2 is safe; it empties unacked and lets out what it had withheld, such as "
            "network packets. "
            "The world may see epoch 2 now: while one of the two hosts stands, it can no longer be lost.",
            actor="wire",
            call="sender.received()",
            message="VMSTATE_RECEIVED(2)",
        )
