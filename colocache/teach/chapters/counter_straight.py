# SPDX-License-Identifier: Apache-2.0
"""Run wrongly on purpose: no cache."""

from colocache.teach.play import Play, chapter


@chapter(
    "straight",
    "Straight into guest RAM",
    kind="counter",
    question="What if arriving pages are written straight into guest RAM?",
    answer="If the PVM dies half way, guest RAM is neither its state nor the SVM's own, and nobody can take over.",
)
def straight(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        play.step(
            pair,
            "Let us save half of the memory",
            "Why keep a second copy, if the pages are going to guest RAM in the end? "
            "So this secondary has no use for its cache, and the SVM pauses while pages come.",
        )
        pair.pvm_pauses(2)
        pair.past_engine(pair.guest, shape.pvm[: len(shape.pvm) // 2], 2)
        play.step(
            pair,
            "Half of epoch 2 is here",
            "The first pages were written over guest RAM, past the engine. "
            "From this moment the SVM cannot go back to its own state, and it cannot go on either, until the "
            "rest has come.",
            actor="wire",
            message="PAGES(2)",
            target=2,
        )
        pair.pvm.alive = False
        answer = pair.on_svm("failover")
        play.step(
            pair,
            "The PVM dies",
            f'The engine was never told, so it answers: "{answer["sentence"]}". '
            "But there is nothing to run on: old, new and own pages are mixed, and the other half will never come.",
            actor="pvm",
            call="cache.failover()",
            target=2,
        )
