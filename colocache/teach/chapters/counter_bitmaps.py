# SPDX-License-Identifier: Apache-2.0
"""Run wrongly on purpose: one bitmap instead of two."""

from colocache.teach.play import Play, chapter


@chapter(
    "only-pvm",
    "Only the PVM bitmap",
    kind="counter",
    question="What if only the pages that came are flushed?",
    answer="Pages that only the SVM wrote stay: the SVM runs on with memory that the PVM never had.",
)
def only_pvm(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("device_state", 2)
        play.step(
            pair,
            "Everything came, and nobody asks the SVM's log",
            "The same two machines as before, but the step that takes the SVM's dirty log is left out. "
            "The SVM bitmap stays empty, although the SVM wrote.",
            actor="wire",
            message="PAGES(2), VMSTATE_SIZE(2)",
        )
        pair.seal(2)
        play.step(
            pair,
            "The flush set is only half of the truth",
            "It holds what the PVM sent, and nothing else. "
            "The engine cannot know better: it can only unite what it was given.",
            actor="svm",
            call="cache.seal(2)",
        )
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "Stale SVM pages stay",
            "The marked pages still hold S2, on a machine whose registers are the PVM's at epoch 2. "
            "The guest will trip over them, perhaps at once, perhaps in a week.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            target=2,
        )


@chapter(
    "only-svm",
    "Only the SVM bitmap",
    kind="counter",
    question="What if only the pages that the SVM wrote are flushed?",
    answer="Pages that only the PVM wrote never reach guest RAM, though they are in the cache.",
)
def only_svm(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.past_engine(pair.cache, shape.pvm, 2)
        pair.on_svm("device_state", 2)
        play.step(
            pair,
            "Pages come, and nobody notes which",
            "The pages of epoch 2 are written into the cache image past the engine, so that no PVM bit is set. "
            "The cache is complete: it is exactly PVM memory.",
            actor="wire",
            message="PAGES(2), VMSTATE_SIZE(2)",
        )
        pair.on_svm("sync")
        pair.seal(2)
        play.step(
            pair,
            "The flush set holds the SVM's pages only",
            "It is tempting: undo what the SVM did, and it is back at the last epoch. "
            "But the PVM has moved on since the last epoch.",
            actor="svm",
            call="cache.sync_dirty_log(log); cache.seal(2)",
        )
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "The PVM's writes are missing",
            "The marked pages still hold P1, while the registers say epoch 2. "
            "The right bytes lie in the cache, one copy away, and nobody fetches them.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            target=2,
        )
