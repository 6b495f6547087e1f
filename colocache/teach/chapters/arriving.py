# SPDX-License-Identifier: Apache-2.0
"""A checkpoint takes time to arrive, and the PVM may die at any moment of it."""

from colocache.teach.play import Play, chapter


@chapter(
    "arriving",
    "Pages arrive in the cache",
    question="Why does the SVM's host hold a second copy of memory?",
    answer="Because half a checkpoint is worthless: until it is complete, the SVM must keep the memory it can run on.",
)
def arriving(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        play.step(
            pair,
            "Two machines have drifted apart",
            "The PVM wrote P2 pages, the SVM S2 pages. Both still run.",
        )
        pair.pvm.sync()
        pair.deliver(2, len(shape.pvm) // 2)
        play.step(
            pair,
            "The first pages come",
            "They go into the cache, and the PVM bitmap notes each one after its bytes are there. "
            "Guest RAM is not touched: the SVM runs on it at this very moment.",
            actor="wire",
            call="cache.receive_stream(socket)",
            message="PAGES(2)",
        )
        pair.svm_writes(shape.svm_later)
        play.step(
            pair,
            "The SVM runs meanwhile",
            "Pages travel in the background, and the SVM goes on writing its own. "
            "The cache now is neither epoch 1 nor epoch 2; that is no harm, as nobody runs on it.",
            actor="svm",
        )
        pair.pvm.alive = False
        pair.pvm.epoch = 0
        play.step(
            pair,
            "The PVM dies",
            "Half of its checkpoint is here and the rest will never come. "
            "Look at SVM memory: it is whole, the SVM's own state, as if no page had arrived.",
            actor="pvm",
        )
        pair.on_svm("failover")
        play.step(
            pair,
            "The SVM takes over, live",
            "Asked whether it may take over (failover), the engine says: now, from your own memory. "
            "The half that came stays in the cache, unused; that is what the second copy is for.",
            actor="svm",
            call="cache.failover()",
        )
