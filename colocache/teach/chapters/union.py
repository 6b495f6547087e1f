# SPDX-License-Identifier: Apache-2.0
"""Why two bitmaps, and why the cache is a full copy."""

from colocache.teach.play import Play, chapter


@chapter(
    "union",
    "The union",
    question="Why two bitmaps, and why a full copy in the cache?",
    answer="What either machine wrote may differ. Pages that only the SVM wrote are not sent this time; their right "
    "bytes came with an older epoch and are still in the cache, because it holds every page.",
)
def union(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("device_state", 2)
        play.step(
            pair,
            "All of epoch 2 is in the cache",
            "The PVM paused and sent every page it wrote; the cache is now exactly PVM memory. "
            "The PVM bitmap says which pages came.",
            actor="wire",
            call="cache.receive_stream(socket)",
            message="PAGES(2), VMSTATE_SIZE(2)",
        )
        pair.on_svm("sync")
        play.step(
            pair,
            "And what the SVM wrote",
            "The SVM is paused and its log is taken into the SVM bitmap, before anything writes guest RAM again. "
            "Compare the two bitmaps: they overlap, but neither holds the other.",
            actor="svm",
            call="cache.sync_dirty_log(log)",
        )
        play.step(
            pair,
            "Pages that only the PVM wrote",
            "There SVM memory still holds the old P1, while the cache holds the new P2. "
            "Leave them out of the flush and the SVM runs on with yesterday's bytes.",
            focus=set(shape.pvm) - set(shape.svm),
        )
        play.step(
            pair,
            "Pages that only the SVM wrote",
            "There SVM memory holds S2, which the PVM never had; nothing was sent for them, because the PVM did "
            "not write them. "
            "The right bytes, P1, are in the cache, from an older epoch: that is why the cache is a full copy "
            "and not a list of what came.",
            focus=set(shape.svm) - set(shape.pvm),
        )
        counts = pair.seal(2)
        play.step(
            pair,
            "The union is the flush set",
            f"Sealing unites them: {counts['pvm']} pages by the PVM alone, {counts['svm']} by the SVM alone, "
            f"{counts['both']} by both. "
            f"These {sum(counts.values())} pages, and no others, can differ between cache and guest RAM.",
            actor="svm",
            call="cache.seal(2)",
        )
