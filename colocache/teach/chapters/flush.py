# SPDX-License-Identifier: Apache-2.0
"""The copy that makes the SVM the PVM again."""

from colocache.teach.play import Play, chapter


@chapter(
    "flush",
    "Flush",
    question="How does the SVM become the PVM again?",
    answer="Every page of the flush set is copied from the cache over guest RAM; every other page was the same "
    "already.",
)
def flush(play: Play) -> None:
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
            "Sealed, not yet flushed",
            "The flush set shows who wrote each page: P, S, or B for both. "
            "Guest RAM still is the SVM's own state; the SVM stands still until the copy is done.",
            actor="svm",
            call="cache.seal(2)",
        )
        n_pages = pair.on_svm("flush")
        play.step(
            pair,
            "Flushed",
            f"{n_pages} pages were copied from the cache to guest RAM, and then epoch 2 was marked committed in "
            "the same way as it was sealed. "
            "SVM memory, cache and PVM memory are the same: every S2 is gone.",
            actor="svm",
            call="cache.flush()",
            target=2,
        )
        pair.on_svm("loaded")
        play.step(
            pair,
            "The registers follow, and both run on",
            "With memory and device state of epoch 2 the SVM is the machine that the PVM was when it paused. "
            "Both machines run, and they begin to drift again.",
            actor="svm",
            call="cache.loaded()",
            message="VMSTATE_LOADED(2)",
            target=2,
        )
        pair.pvm_writes(shape.pvm_later)
        pair.svm_writes(shape.svm_later)
        pair.pvm.sync()
        pair.deliver(3)
        pair.on_svm("sync")
        play.step(
            pair,
            "The next epoch",
            "New writes, marked P3 and S3, set new bits; what was flushed is forgotten, except that the cache "
            "still holds it. "
            "The flush set stays as it was until the next seal.",
            actor="wire",
            message="PAGES(3)",
        )
        pair.checkpoint(3)
        play.step(
            pair,
            "In step again, at epoch 3",
            "Most pages were not touched by anybody in this round, and so they were neither sent nor copied. "
            "Yet all of memory is the PVM's: that is what the two bitmaps buy.",
            actor="svm",
            call="cache.seal(3); cache.flush(); cache.loaded()",
            target=3,
        )
