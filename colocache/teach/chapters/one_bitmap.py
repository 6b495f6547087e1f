# SPDX-License-Identifier: Apache-2.0
"""One bitmap into which both sources are ORed: it works. What the second one buys is seen beside it."""

from colocache.teach.chapters.deaths import kill
from colocache.teach.play import Play, chapter


@chapter(
    "one-bitmap",
    "One bitmap, both ORed in",
    question="The flush only needs the union: would one bitmap for both not do?",
    answer="It would, and QEMU does it that way: for the copy itself the union is all that counts. The second bitmap "
    "tells who wrote a page, and keeps what one side knows when the other side's half is lost.",
)
def one_bitmap(play: Play) -> None:
    shape = play.shape
    with play.pair_in_step() as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.past_engine(pair.cache, shape.pvm, 2)
        pair.on_svm("device_state", 2)
        pair.on_svm("sync")
        assert pair.svm is not None  # noqa: S101 it runs in this process here
        for pfn in shape.pvm:
            pair.svm.cache.mark_dirty(pair.svm.block, pfn)
        play.step(
            pair,
            "One list for both",
            "This secondary notes a page that came in the same bitmap as the pages that its own guest wrote. "
            "The other bitmap is never used.",
            actor="svm",
            call="cache.mark_dirty(block, pfn); cache.sync_dirty_log(log)",
            message="PAGES(2), VMSTATE_SIZE(2)",
        )
        counts = pair.seal(2)
        play.step(
            pair,
            "The flush set is complete",
            f"The seal counts {sum(counts.values())} pages, which is the whole union. "
            f"Asked who wrote them, the engine can only repeat what it was told: {counts['pvm']} the PVM, "
            f"{counts['svm']} the SVM.",
            actor="svm",
            call="cache.seal(2)",
        )
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        play.step(
            pair,
            "It works",
            "Guest RAM is exactly epoch 2. No page is missing, so nothing is wrong with one bitmap; "
            "QEMU's COLO has one, and this is what it does.",
            actor="svm",
            call="cache.flush(); cache.loaded()",
            target=2,
        )
    with play.pair_in_step(killable=True) as pair:
        pair.pvm_writes(shape.pvm)
        pair.svm_writes(shape.svm)
        pair.pvm_pauses(2)
        pair.deliver(2)
        pair.on_svm("sync")
        pair.on_svm("device_state", 2)
        counts = pair.seal(2)
        play.step(
            pair,
            "With two: who wrote a page",
            f"The same run with two bitmaps: {counts['pvm']} pages by the PVM alone, {counts['svm']} by the SVM alone, "
            f"{counts['both']} by both. The PVM's are what the network carried, the SVM's are how far the two machines "
            "had drifted: to shorten a checkpoint, one must know which of them makes it long.",
            actor="svm",
            call="cache.seal(2)",
        )
        pair.received()
        pair.on_svm("flush")
        pair.on_svm("loaded")
        pair.pvm_writes(shape.pvm_later)
        pair.svm_writes(shape.svm_later)
        pair.pvm.sync()
        came = pair.deliver(3)
        kill(pair)
        play.step(
            pair,
            "With two: the SVM's process dies",
            f"{came} pages of epoch 3 had come when the process was killed. The SVM's dirty log died with it: "
            "which pages its guest wrote since the last checkpoint, nobody can say any more.",
            actor="svm",
            message="PAGES(3)",
        )
        pair.attach()
        still = pair.svm_bits()["pvm"].count("1")
        play.step(
            pair,
            "Only one half is lost",
            "The next process must count every page as written by the SVM: its half becomes all ones. "
            f"The PVM's half still names the {still} pages of the cache that are newer than epoch 2; in one bitmap for "
            f"both, they would be {shape.n_pages} of {shape.n_pages}.",
            actor="svm",
            call="Cache.attach(memory)",
            focus=shape.pvm_later,
        )
